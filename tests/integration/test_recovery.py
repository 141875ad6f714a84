"""Kafka to Kafka through a mini-cluster with Python in processes of its own, and a kill."""

from benchmarks import recovery


def test_a_killed_worker_loses_and_doubles_nothing(broker, tmp_path):
    found = recovery.measure(broker.bootstrap_servers, tmp_path, count=1500, kills=1, rate=300)
    assert found.pop("in_flight_at_kill_min") >= 100
    assert found == {
        "requests": 1500,
        "lost": 0,
        "duplicated": 0,
        "failures": 0,
        "not_stop": 0,
        "kills": 1,
        "state_errors": 0,
    }
