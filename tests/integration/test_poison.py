"""Bad input through the main job, with the demo's model and features."""

from collections import Counter

import pytest

from benchmarks import poison

COUNT = 44


def test_good_and_bad_are_mixed_and_no_conflict_comes_first():
    records = poison.mixed(200)
    assert len({record.kind for record in records[:100]}) > 15, "bad ones among the good from the start"
    assert Counter(record.code is None for record in records) == {True: 200, False: 200}
    ids = [
        (record.kind, b'"good-%d"' % i) for i in range(200) for record in [poison.bad(i)] if record.kind == "conflict"
    ]
    for kind, name in ids:
        about = [record.kind for record in records if name in (record.value or b"")]
        assert about == ["good", kind]


@pytest.mark.timeout(300)
def test_bad_records_become_failures_and_stop_nothing(broker, tmp_path):
    found = poison.measure(broker.bootstrap_servers, tmp_path, COUNT)
    bad = [poison.bad(i) for i in range(COUNT)]
    assert found == {
        "responses": COUNT,
        "failures": COUNT,
        "restarts": 0,
        "duplicated": 0,
        "unexpected": 0,
        "codes": Counter(record.code for record in bad),
        "kinds": len({record.kind for record in bad}),
    }
