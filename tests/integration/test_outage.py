"""Parts that are gone for longer than a deadline: no record's fault."""

import pytest

from benchmarks import outage


@pytest.mark.timeout(240)
def test_an_outage_costs_time_and_nothing_else(broker, tmp_path):
    found = outage.measure(broker.bootstrap_servers, tmp_path, outage_s=6.0, deadline_s=2.0)
    assert found.pop("answered_while_out") == [0, 0]
    assert found["requests"] > 400
    assert {name: found[name] for name in ("lost", "duplicated", "failures", "restarts")} == dict.fromkeys(
        ("lost", "duplicated", "failures", "restarts"), 0
    )
