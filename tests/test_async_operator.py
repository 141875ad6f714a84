"""What the Flink operator does before and around the runner; the rest is tested where it is, or in integration."""

import msgspec
import pytest

from flink_llm.errors import ConfigError
from flink_llm.udfs import async_operator
from flink_llm.udfs.event_time import low_mark


@pytest.mark.parametrize(
    ("watermark", "oldest", "low"),
    [(None, None, None), (10, None, 10), (10, 5, 4), (3, 5, 3), (2**63 - 1, 7, 6), (-(2**63), None, None)],
)
def test_time_comes_no_further_than_the_oldest_in_flight(watermark, oldest, low):
    assert low_mark(watermark, oldest) == low


class Ends:
    """A shard whose call ends after `seconds`, as the places tell."""

    def __init__(self, seconds):
        self.in_flight, self.events, self.seconds, self.waits = 1, [], seconds, 0
        self.places = self

    def wait_until(self, there, timeout):
        self.waits += 1
        if self.seconds <= timeout:
            self.events.append("end")


def test_a_call_that_ends_in_a_moment_is_waited_for():
    shard = Ends(0.0)
    patience = async_operator._Patience(shard)
    for bundle in range(100):
        shard.events.clear()
        patience.wait(shard, bundle)
        assert shard.events


def test_calls_that_take_longer_are_soon_not_waited_for():
    shard = Ends(1.0)
    patience = async_operator._Patience(shard)
    for bundle in range(2000):
        patience.wait(shard, bundle)
    assert shard.waits < 30


def test_a_bundle_waits_for_a_moment_in_all(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(async_operator.time, "perf_counter", lambda: now[0])
    shard = Ends(0.0)
    waited = []

    def wait(there, timeout):
        waited.append(timeout)
        now[0] += min(timeout, 0.002)
        shard.events.append("end")

    shard.wait_until = wait
    patience = async_operator._Patience(shard)
    for _ in range(5):
        shard.events.clear()
        patience.wait(shard, bundle=1)
    assert waited == pytest.approx([0.003, 0.001])


def test_a_record_class_of_the_jobs_own_file_is_refused():
    """Pickled by value it would arrive without its fields, and every record fail for a reason of its own."""
    here = msgspec.defstruct("Order", [("n", int)], module=__name__)
    own = msgspec.defstruct("Order", [("n", int)], module="__main__")
    async_operator._check_records("Reply", dict, here)
    with pytest.raises(
        ConfigError, match=r"Reply: Order is a msgspec.Struct of the job's own file.* module of its own"
    ):
        async_operator._check_records("Reply", own, None)
