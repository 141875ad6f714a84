"""What the Flink operator does before and around the runner; the rest is tested where it is, or in integration."""

from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest

from flink_llm.arrivals import Arrival
from flink_llm.call import OperatorSettings
from flink_llm.errors import ConfigError
from flink_llm.handler import AsyncUdf
from flink_llm.kept import Kept
from flink_llm.runner import Runner
from flink_llm.shard import Shard
from flink_llm.testing import FakeServices, MemoryMap
from flink_llm.udfs import async_operator, patience
from flink_llm.udfs.event_time import low_mark


@pytest.mark.parametrize(
    ("watermark", "oldest", "low"),
    [(None, None, None), (10, None, 10), (10, 5, 4), (3, 5, 3), (2**63 - 1, 7, 6), (-(2**63), None, None)],
)
def test_time_comes_no_further_than_the_oldest_in_flight(watermark, oldest, low):
    assert low_mark(watermark, oldest) == low


class Ends:
    """A runner whose calls end after `seconds`, as the places tell."""

    def __init__(self, seconds):
        self.calls, self.seconds, self.waits = [], seconds, []
        self.places = self

    def wait_until(self, there, timeout):
        self.waits.append(timeout)
        for call in self.calls:
            call.ended = self.seconds <= timeout
        assert there() is (self.seconds <= timeout)


def run_piece(runner, waiting, calls=1):
    runner.calls = [SimpleNamespace(ended=False) for _ in range(calls)]
    for call in runner.calls:
        waiting.begun(call)
    waiting.wait()


def test_calls_that_end_in_a_moment_are_waited_for_together():
    runner = Ends(0.0)
    waiting = patience.Patience(runner)
    for _ in range(100):
        run_piece(runner, waiting, calls=125)
        assert all(call.ended for call in runner.calls)
    assert runner.waits == [patience.MOMENT_S] * 100


def test_calls_that_take_longer_are_soon_not_waited_for():
    runner = Ends(1.0)
    waiting = patience.Patience(runner)
    for _ in range(2000):
        run_piece(runner, waiting)
    assert 0 < len(runner.waits) < 30


def test_a_piece_without_calls_is_not_waited_for():
    runner = Ends(0.0)
    patience.Patience(runner).wait()
    assert runner.waits == []


def test_a_record_class_of_the_jobs_own_file_is_refused():
    """Pickled by value it would arrive without its fields, and every record fail for a reason of its own."""
    here = msgspec.defstruct("Order", [("n", int)], module=__name__)
    own = msgspec.defstruct("Order", [("n", int)], module="__main__")
    async_operator._check_records("Reply", dict, here)
    with pytest.raises(
        ConfigError, match=r"Reply: Order is a msgspec.Struct of the job's own file.* module of its own"
    ):
        async_operator._check_records("Reply", own, None)


class Timers:
    """The timer service of one bundle, by the key that is set."""

    def __init__(self):
        self.set = []

    def register_processing_time_timer(self, moment):
        self.set.append(moment)


class Chatty(AsyncUdf):
    async def call(self, request: dict, ctx) -> dict:
        for number in range(1500):  # more than may wait for their emission
            await ctx.emit({"number": number})
        return {"id": request["id"]}


@pytest.mark.parametrize("ends", [(0, 1), (1, 0)])
def test_the_end_of_one_shard_waits_for_no_other_in_vain(ends):
    runner = Runner(Chatty(), FakeServices(), OperatorSettings(capacity=2, deadline=20.0))
    runner.start()
    operator = async_operator._AsyncOperator(None, None, None, [0, 1], None)
    operator._runner = runner
    shards = operator._shards = {number: Shard(number, Kept(MemoryMap()), runner) for number in range(2)}
    operator._emit = lambda outputs, ctx: outputs
    try:
        for number, shard in enumerate((1, 1, 0)):  # two of shard 1 have the places, that of shard 0 waits for one
            data = Arrival(key="k", value=b'{"id": 1}', from_kafka=True, topic="t", partition=0, offset=number)
            assert shards[shard].receive(data.to_bytes()) == []
        kinds = Counter(output.kind for shard in ends for output in operator._finish(shards[shard], None))
    finally:
        runner.close()
    assert kinds == {"partial": 4500, "result": 3}


def test_every_shard_of_a_piece_has_its_own_timers_and_its_beat():
    """Only the last element of a piece goes on to emit: the shards of the others must not be forgotten."""
    operator = async_operator._AsyncOperator(None, None, None, [0, 1, 2], None)
    operator._shards = {number: SimpleNamespace(in_flight=number) for number in range(3)}
    operator._shard_timers, operator._beats = {}, {}
    operator._watch = SimpleNamespace(beat_ms=7)
    timers = Timers()
    for number in (0, 1, 2, 1):
        operator._look_after(number, SimpleNamespace(timer_service=lambda: timers))
    assert set(operator._shard_timers) == {1, 2}  # nothing of shard 0 is in flight
    assert set(operator._beats) == {0, 1, 2}
    assert sorted(timers.set) == sorted([*operator._shard_timers.values(), *operator._beats.values()])
