"""The jobs that `benchmarks.operator` compares: one operator each, from a generator in Java to counts in Java.

Each is a job of its own on one cluster, with one Python worker. A worker that has opened stops itself
(SIGSTOP) and says its process id in a file: jobs are up side by side and run by turns. What comes out is
counted in Java, by second and by how late it is, and printed to the task manager's output.
"""

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from pyflink.common import Row, Time, Types, WatermarkStrategy
from pyflink.datastream import AsyncDataStream, AsyncFunction, DataStream, StreamExecutionEnvironment
from pyflink.datastream.connectors.number_seq import NumberSequenceSource
from pyflink.table import StreamTableEnvironment

from flink_llm import environment
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf, CallContext, Context
from flink_llm.udfs.async_operator import apply
from flink_llm.udfs.bundles import lean_bundles  # noqa: F401 — see _stock

KEYS = 100_000
"""So many that calls of one key hardly meet: waiting for a turn is no cost of the operator's."""
TIMEOUT_S = 3600.0
"""Longer than a worker stands still between its turns: stock fails a job for a call that has timed out."""
REMEMBER_S = 60.0
CHECKPOINT_MS = 1000
_VALUE = Types.ROW_NAMED(["value"], [Types.PRIMITIVE_ARRAY(Types.BYTE())])


class Contender(Struct, frozen=True, kw_only=True):
    """One job. `bundle` is size and milliseconds, None for ours, which are chosen by `configure`."""

    name: str
    stock: bool = False
    work_ms: float = 100.0
    in_flight: int = 1000
    full: bool = False
    timeout: bool = True
    bundle: tuple[int, int] | None = None


class Plan(Struct, frozen=True, kw_only=True):
    """What one client submits. `folder` is where workers write their process ids."""

    folder: str
    contenders: list[Contender]


class Item(Struct, frozen=True):
    """What both are asked."""

    request_id: str
    session_id: str


async def work(ms: float) -> int:
    """Some milliseconds on the average, exponentially distributed; when it ended, in epoch milliseconds."""
    if ms:
        await asyncio.sleep(random.expovariate(1000 / ms))
    return int(time.time() * 1000)


def stand_by(folder: str, name: str) -> None:
    """The worker is up: it says so, and stops itself until its turn comes."""
    path = Path(folder) / name
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path.with_suffix(".pid"))
    os.kill(os.getpid(), signal.SIGSTOP)


class Plain(AsyncUdf):
    """Ours."""

    def __init__(self, folder: str, contender: Contender) -> None:
        self._folder, self._contender = folder, contender

    async def open(self, ctx: Context) -> None:
        stand_by(self._folder, self._contender.name)

    async def call(self, request: Item, ctx: CallContext) -> int:
        return await work(self._contender.work_ms)


class Full(Plain):
    """With a count in its key's state."""

    stateful = True

    async def call(self, request: Item, ctx: CallContext) -> int:
        ctx.state["count"] = ctx.state.get("count", 0) + 1
        return await work(self._contender.work_ms)


class Stock(AsyncFunction):  # type: ignore[misc]
    """PyFlink's."""

    def __init__(self, folder: str, contender: Contender) -> None:
        self._folder, self._contender = folder, contender

    def open(self, runtime_context: Any) -> None:
        stand_by(self._folder, self._contender.name)

    async def async_invoke(self, value: Any) -> list[Any]:
        msgspec.json.decode(value[0], type=Item)
        return [Row(b"%d" % await work(self._contender.work_ms))]


def submit(plan: Plan) -> None:
    """Submits every job, detached."""
    for contender in plan.contenders:
        env = environment.environment({"python.fn-execution.arrow.batch.size": "1000"}, kafka=False)
        rate = 1000 * contender.in_flight / contender.work_ms if contender.work_ms else None
        settings = FlinkSettings(
            expected_rate=rate, checkpoint_interval_ms=CHECKPOINT_MS, properties=_properties(contender)
        )
        environment.configure(env, settings, capacity=contender.in_flight)
        if contender.stock:
            env.set_buffer_timeout(100)
        tables = environment.tables(env)
        out = (_stock if contender.stock else _ours)(env, tables, contender, plan.folder)
        count(tables, out, contender.name)
        env.execute_async(contender.name)


def _properties(contender: Contender) -> dict[str, str]:
    properties = {"pipeline.name": contender.name, "execution.checkpointing.timeout": "1 h"}
    if contender.bundle is not None:
        size, ms = contender.bundle
        properties |= {environment.BUNDLE_SIZE: str(size), environment.BUNDLE_TIME: str(ms)}
    return properties


def requests(env: StreamExecutionEnvironment, tables: StreamTableEnvironment, columns: str) -> DataStream:
    """Endless requests `r<i>` over the keys, generated in Java, as these columns of `i` and `value`."""
    numbers = env.from_source(
        NumberSequenceSource(0, 10**12), WatermarkStrategy.no_watermarks(), "numbers", Types.LONG()
    )
    tables.create_temporary_view("numbers", tables.from_data_stream(numbers).alias("i"))
    value = f"""CAST(CONCAT('{{"request_id":"r', CAST(`i` AS STRING), '","session_id":"s',
                CAST(MOD(`i`, {KEYS}) AS STRING), '"}}') AS BYTES)"""
    query = f"SELECT {columns} FROM (SELECT `i`, {value} AS `value` FROM numbers)"
    return tables.to_data_stream(tables.sql_query(query))


def _ours(
    env: StreamExecutionEnvironment, tables: StreamTableEnvironment, contender: Contender, folder: str
) -> DataStream:
    stream = requests(
        env,
        tables,
        """CAST(NULL AS BYTES) AS `key`, `value`, CAST(NULL AS MAP<STRING, BYTES>) AS `headers`, 'requests' AS `topic`,
           0 AS `partition`, `i` AS `offset`, CURRENT_ROW_TIMESTAMP() AS `time`""",
    )
    settings = OperatorSettings(
        capacity=contender.in_flight, deadline=TIMEOUT_S, remember_s=REMEMBER_S if contender.full else 0
    )
    udf = (Full if contender.full else Plain)(folder, contender)
    return apply(stream, udf, key="session_id", uid="ours", settings=settings).results


def _stock(
    env: StreamExecutionEnvironment, tables: StreamTableEnvironment, contender: Contender, folder: str
) -> DataStream:
    timeout = Time.milliseconds(int(TIMEOUT_S * 1000) if contender.timeout else 0)
    stream = requests(env, tables, "`value`")
    return AsyncDataStream.unordered_wait(stream, Stock(folder, contender), timeout, contender.in_flight, _VALUE)


def count(tables: StreamTableEnvironment, stream: DataStream, name: str) -> None:
    """Prints, each second, how many results came how many milliseconds after their calls' ends."""
    rows = tables.from_data_stream(stream)
    tables.execute_sql(
        f"""CREATE TEMPORARY TABLE counts (`second` STRING, `late` BIGINT, `count` BIGINT)
            WITH ('connector' = 'print', 'print-identifier' = '{name}')"""
    )
    late = """EXTRACT(EPOCH FROM CURRENT_ROW_TIMESTAMP()) * 1000 + EXTRACT(MILLISECOND FROM CURRENT_ROW_TIMESTAMP())
              - CAST(CAST(`value` AS STRING) AS BIGINT)"""
    tables.create_temporary_view(
        "results", tables.sql_query(f"SELECT {late} AS `late`, PROCTIME() AS `at` FROM {rows}")
    )
    statements = tables.create_statement_set()
    statements.add_insert_sql(
        """INSERT INTO counts SELECT DATE_FORMAT(window_start, 'HH:mm:ss'), `late`, COUNT(*)
           FROM TABLE(TUMBLE(TABLE results, DESCRIPTOR(`at`), INTERVAL '1' SECOND))
           GROUP BY window_start, window_end, `late`"""
    )
    tables.get_config().set("table.exec.uid.generation", "DISABLED")  # a benchmark has no savepoints
    statements.attach_as_datastream()


def main() -> None:
    """The job script's: its argument is the file of a `Plan`."""
    submit(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan))
