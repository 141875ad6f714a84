"""What the Flink operator does before and around the runner; the rest is tested where it is, or in integration."""

from types import SimpleNamespace
from typing import Any

import pytest

from flink_llm.call import OperatorSettings
from flink_llm.errors import FlinkLlmError
from flink_llm.handler import AsyncUdf
from flink_llm.testing import FakeServices
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


class Broken(AsyncUdf):
    async def open(self, ctx):
        raise RuntimeError("no database")

    async def call(self, request: dict[str, Any], ctx) -> dict[str, Any]:
        return request


def test_a_handler_that_cannot_open_is_one_line_of_the_job(monkeypatch, capsys):
    for name in ("lean_bundles", "KeyedState", "Kept"):  # Flink's side
        monkeypatch.setattr(async_operator, name, lambda *given: None)
    context = SimpleNamespace(get_map_state=lambda descriptor: None)
    reader = SimpleNamespace(open=lambda: None)
    operator = async_operator._AsyncOperator(Broken(), OperatorSettings(operator="mine"), FakeServices, [0], reader)
    with pytest.raises(FlinkLlmError, match=r"^Broken\.open failed: RuntimeError: no database$"):
        operator.open(context)
    said = "flink-llm: mine: Broken.open failed: RuntimeError: no database; Flink restarts the job\n"
    assert capsys.readouterr().err == said
