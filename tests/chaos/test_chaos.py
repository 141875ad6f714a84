"""The short form of the chaos benchmark: four kills on one cluster, under load."""

import pytest

from benchmarks import chaos
from benchmarks.faults.scenarios import SHORT


@pytest.mark.timeout(600)
def test_kills_of_every_kind_lose_and_double_nothing(tmp_path):
    *_, found = chaos.measure(tmp_path, [SHORT], records=400, rate=80, parallelism=1)
    assert found["blows"] == 4
    assert found["in_flight_at_blow_min"] >= 100
    counted = ("lost", "duplicated", "failures", "not_stop", "state_errors", "torn_texts", "orphans")
    assert {name: found[name] for name in counted} == dict.fromkeys(counted, 0)
    assert found["revived"] <= 1, "task managers end themselves at times, see docs/exactly-once.md"
