"""Event time behind `apply`: windows downstream are complete, however fast the input and slow a call."""

import json

import pytest
from pyflink.common import Time, Types, WatermarkStrategy
from pyflink.common.watermark_strategy import TimestampAssigner
from pyflink.datastream.functions import ProcessWindowFunction
from pyflink.datastream.window import TumblingEventTimeWindows

from flink_llm import environment
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf
from flink_llm.udfs.async_operator import apply
from flink_llm.udfs.event_time import low_mark

RECORDS, STEP_MS, WINDOW_S = 400, 1000, 10
FIRST_S = -200
"""Half of the records are from before 1970."""


def uneven() -> AsyncUdf:
    class Uneven(AsyncUdf):  # inside: the worker cannot import the tests
        async def call(self, request: dict, ctx):
            import asyncio

            await asyncio.sleep(0.3 if request["number"] % 7 == 0 else 0.001)
            if request["number"] % 10 == 5:
                raise ValueError("a failure has its record's time too")
            return {"number": request["number"], "timestamp": ctx.timestamp}

    return Uneven()


class Stamp(TimestampAssigner):
    def extract_timestamp(self, value, record_timestamp):
        return json.loads(value)["number"] * STEP_MS + FIRST_S * 1000


def counting() -> ProcessWindowFunction:
    class Count(ProcessWindowFunction):
        def process(self, key, context, elements):
            rows = list(elements)
            inside = all(context.window().start <= row.time.to_epoch_milli() < context.window().end for row in rows)
            yield json.dumps([context.window().start // 1000, len(rows), inside, context.current_watermark()])

    return Count()


@pytest.mark.timeout(240)
def test_no_outcome_is_late_for_its_window():
    env = environment.environment()
    environment.configure(env, FlinkSettings(checkpoint_interval_ms=500), capacity=64)
    numbers = env.from_collection([json.dumps({"number": i}) for i in range(RECORDS)], Types.STRING())
    strategy = WatermarkStrategy.for_monotonous_timestamps().with_timestamp_assigner(Stamp())
    stream = numbers.assign_timestamps_and_watermarks(strategy)
    # The deadline is far shorter, in event time, than what lies between the calls that run side by side.
    out = apply(stream, uneven(), key="number", uid="uneven", settings=OperatorSettings(deadline=5, capacity=64))

    def windows(rows, kind):
        every = rows.key_by(lambda row: 0, Types.INT()).window(TumblingEventTimeWindows.of(Time.seconds(WINDOW_S)))
        return every.process(counting(), Types.STRING()).map(lambda text: f"{kind} {text}", Types.STRING())

    both = windows(out.results, "results").union(windows(out.failures, "failures"))
    with both.execute_and_collect("event time") as collected:
        found = [line.split(" ", 1) for line in collected]
    counts = {(kind, json.loads(text)[0]): json.loads(text)[1:3] for kind, text in found}
    starts = range(FIRST_S, FIRST_S + RECORDS * STEP_MS // 1000, WINDOW_S)
    assert {start: counts["results", start] for start in starts} == {start: [9, True] for start in starts}
    assert {start: counts["failures", start] for start in starts} == {start: [1, True] for start in starts}
    # Time passes while records are in flight, not only at the end of the input.
    assert any(json.loads(text)[3] < FIRST_S * 1000 + RECORDS * STEP_MS for _, text in found)


@pytest.mark.parametrize(
    ("watermark", "oldest", "low"),
    [
        (None, None, None),
        (-(2**63), 5, None),
        (100, None, 100),
        (100, 50, 49),
        (100, 500, 100),
        (2**63 - 1, None, None),
        (2**63 - 1, 50, 49),
        (2**63 - 1, 2**60, None),
        (100, 0, -1),
        (-(10**15), None, None),
    ],
)
def test_time_comes_as_far_as_the_watermark_but_not_past_what_is_in_flight(watermark, oldest, low):
    assert low_mark(watermark, oldest) == low
