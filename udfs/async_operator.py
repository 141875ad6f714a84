"""`apply`: an `AsyncUdf` on a stream, as an operator that never waits for a bundle.

A keyed process function over shards. An arriving record is kept in keyed state, its coroutine is
started on the runner's loop, and a processing-time timer every few milliseconds emits what has ended in
any shard, for as long as anything is in flight. Each shard with something in flight has a slow timer of
its own as well, which a restore finds. Adapter only: what happens to a record is in `flink_llm.runner`
and `flink_llm.shard`.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

from msgspec import Struct
from pyflink.common import Row, Types
from pyflink.datastream import DataStream, OutputTag, RuntimeExecutionMode, TimeDomain
from pyflink.datastream.functions import KeyedProcessFunction, RuntimeContext
from pyflink.datastream.state import MapStateDescriptor
from pyflink.table import Table

from flink_llm import codec, environment
from flink_llm.arrivals import KeySpec
from flink_llm.call import OperatorSettings
from flink_llm.errors import ConfigError, StateError
from flink_llm.garbage import spare
from flink_llm.handler import AsyncUdf, signature_of
from flink_llm.kept import IN_FLIGHT, Kept
from flink_llm.logs import shape_logs
from flink_llm.orphans import end_with_task_manager
from flink_llm.runner import Runner
from flink_llm.services import ServiceSettings, open_services
from flink_llm.shard import Output, Shard
from flink_llm.telemetry import Telemetry, open_telemetry
from flink_llm.transactions import PARAMETER, AliveWatch
from flink_llm.udfs.bundles import KeyedState, lean_bundles, more_to_come
from flink_llm.udfs.counters import REPORT_MS, Counters
from flink_llm.udfs.event_time import BYTES, emitted_type, low_mark, table_with_event_time, with_event_time
from flink_llm.udfs.keying import Reader, keyed, shard_keys
from flink_llm.udfs.patience import Patience
from flink_llm.udfs.rows import lean_rows, written
from flink_llm.udfs.tables import Shape, TableOutputs, Wanted, records_of, shapes

TIMER_MS = 5
SHARD_TIMER_MS = 1000
END_OF_TIME = 2**63 - 1
_BYTES = Types.PRIMITIVE_ARRAY(Types.BYTE())
_STATE = MapStateDescriptor("shard", _BYTES, _BYTES)
_TAGS = {"partial": OutputTag("partials", emitted_type()), "failure": OutputTag("failures", emitted_type())}


class Outputs(Struct, frozen=True):
    """The three streams of an operator, of rows that `flink_llm.kafka.sink` takes.

    A row has the record's `key`, the encoded `value`, its `headers`, the `topic` that `reply_to` named
    (null for the default), and `time`, its record's. That is its timestamp too, and no watermark
    overtakes a record in flight (`low` is what they are made of): an outcome is never late unless its
    record was.
    """

    results: DataStream
    partials: DataStream
    failures: DataStream


@overload
def apply(
    stream: DataStream, udf: AsyncUdf, *, key: KeySpec, uid: str, settings: OperatorSettings | None = None,
    services: ServiceSettings | Callable[[], Any] | None = None,
) -> Outputs: ...  # fmt: skip
@overload
def apply(
    stream: Table, udf: AsyncUdf, *, key: KeySpec, uid: str, settings: OperatorSettings | None = None,
    services: ServiceSettings | Callable[[], Any] | None = None, result: Wanted | None = None,
    partial: Wanted | None = None,
) -> TableOutputs: ...  # fmt: skip
def apply(
    stream: DataStream | Table,
    udf: AsyncUdf,
    *,
    key: KeySpec,
    uid: str,
    settings: OperatorSettings | None = None,
    services: ServiceSettings | Callable[[], Any] | None = None,
    result: Wanted | None = None,
    partial: Wanted | None = None,
) -> Outputs | TableOutputs:
    """Runs `udf` on every record of a stream, or on every row of a table that is only appended to.

    `stream` is one from `flink_llm.kafka`, or any other: its elements are then decoded to what `call`
    takes, and outcomes have no place to be read again from. `key` is the name of a field or a function
    of the request; it decides whose turn, order and state a record shares. `uid` names the operator in
    savepoints and must stay the same. `services` are the models and features that `ctx` offers, or a
    function that makes them.

    A table's row is a request of its columns, and outcomes are tables again: results have the columns of
    `result`, a class or a JSON Schema, by default of the class that `call` returns, partials those of
    `partial`. What is not declared has one column `value`, its JSON.

    Raises ConfigError when the handler, the settings, the table or the environment do not fit.
    """
    settings = settings or OperatorSettings()
    settings = _replace(settings, operator=uid)
    name = type(udf).__name__
    takes, returns = signature_of(udf)
    _check_records(name, takes, returns)
    tables, shape = None, None
    if isinstance(stream, Table):
        tables, shape = stream._t_env, shapes(name, returns, result, partial)
        stream = records_of(stream, key, uid)
    elif result is not None or partial is not None:
        raise ConfigError(f"{name}: result and partial are for a Table; a DataStream's outcomes are bytes")
    env = stream.get_execution_environment()
    _check_environment(env, settings)
    if tables is None:  # of tables, each job takes what its statements name
        _check_uid(env, uid)
    keys = shard_keys(settings.shards, settings.max_parallelism)
    by_shard, read = keyed(stream, key, takes, keys, uid)
    of_savepoint = environment.starts_from_savepoint(env)
    operator = _AsyncOperator(udf, settings, services, keys, read, shape, of_savepoint=of_savepoint)
    values = {kind: shape[kind].column() if shape else BYTES for kind in ("result", *_TAGS)}
    emitted = by_shard.process(operator, emitted_type(values["result"])).name(uid).uid(uid)
    emitted._j_data_stream.getTransformation().setMaxParallelism(settings.max_parallelism)
    sides = {kind: _side(emitted, OutputTag(tag.tag_id, emitted_type(values[kind]))) for kind, tag in _TAGS.items()}
    outs = {"result": emitted._j_data_stream, **sides}
    if tables is None or shape is None:
        tables = environment.tables(env)
        return Outputs(**{f"{kind}s": with_event_time(tables, out, f"{uid}-{kind}s") for kind, out in outs.items()})
    found = {}
    for kind, out in outs.items():
        rows = table_with_event_time(tables, out, f"{uid}-{kind}s", values[kind])
        found[f"{kind}s"] = tables.sql_query(shape[kind].select(str(rows)))
    return TableOutputs(**found)


class _AsyncOperator(KeyedProcessFunction):  # type: ignore[misc]
    """See the module's description."""

    def __init__(
        self, udf: AsyncUdf, settings: OperatorSettings, services: Any, keys: list[int], read: Reader,
        shape: dict[str, Shape] | None = None, *, of_savepoint: bool = False,
    ) -> None:  # fmt: skip
        self._submitted_ms = _now_ms()
        self._telemetry: Telemetry | None = None
        self._of_savepoint = of_savepoint
        self._udf = udf
        self._settings = settings
        self._services = services
        self._keys = keys
        self._read = read
        self._shape = shape

    def open(self, runtime_context: RuntimeContext) -> None:
        end_with_task_manager()
        lean_bundles()
        lean_rows()
        shape_logs(self._settings.telemetry.logs)
        self._read.open()
        self._numbers = {key: number for number, key in enumerate(self._keys)}
        self._shards: dict[int, Shard] = {}
        self._timer: int | None = None
        self._report: int | None = None
        self._shard_timers: dict[int, int] = {}
        self._beats: dict[int, int] = {}
        self._watch = self._watched(runtime_context)
        self._keyed = KeyedState(runtime_context, self._at_end)
        self._arrived: tuple[int, Any] | None = None
        self._telemetry = open_telemetry(
            self._settings.telemetry, job=self._settings.job, operator=self._settings.operator,
            subtask=runtime_context.get_index_of_this_subtask(),
        )  # fmt: skip
        if self._telemetry is not None:
            self._telemetry.start()
        self._runner = Runner(self._udf, open_services(self._services), self._settings)
        self._runner.start()
        spare()
        self._patience = Patience(self._runner)
        self._counters = Counters(runtime_context, self._runner, lambda: self.in_flight)

    def _watched(self, runtime_context: RuntimeContext) -> AliveWatch | None:
        """Where a sink of the job is transactional."""
        timeout = runtime_context.get_job_parameter(PARAMETER, "")
        if not timeout:
            return None
        submitted, of_savepoint = self._submitted_ms, self._of_savepoint
        return AliveWatch(int(timeout), submitted_ms=submitted, of_savepoint=of_savepoint, clock=_now_ms)

    def close(self) -> None:
        if hasattr(self, "_runner"):
            self._runner.close()
        if self._telemetry is not None:
            self._telemetry.stop()

    @property
    def in_flight(self) -> int:
        return sum(shard.in_flight for shard in self._shards.values())

    def process_element(self, value: Any, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        number = self._numbers[ctx.get_current_key()]
        data, arrival = self._read(value, number, ctx.timestamp())
        shard = self._shards.get(number)
        if shard is None:
            yield from self._touch(number, ctx)
            shard = self._shards[number]
        self._runner.inbox.held = more = more_to_come()
        refused = shard.receive(data, arrival)
        if refused:
            yield from self._emit(refused, ctx)
        elif shard.newest is not None:
            self._patience.begun(shard.newest)
        self._arrived = number, ctx
        if more:
            self._look_after(number, ctx)
            return
        self._runner.inbox.wake()
        self._patience.wait()
        yield from self._drain(ctx)
        self._schedule(number, ctx)

    def _at_end(self) -> None:
        """Of a bundle: should its last element not have been known for one, nothing of it may be forgotten."""
        self._runner.inbox.held = False
        self._runner.inbox.wake()
        if self._arrived is not None:
            self._schedule(*self._arrived)

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        number = self._numbers.get(ctx.get_current_key())
        if number is None:
            raise StateError("state holds a shard that the job does not have: set flink.shards back to what it was")
        self._runner.places.let_go()
        if number not in self._shards:
            yield from self._touch(number, ctx)
        if ctx.time_domain() == TimeDomain.EVENT_TIME:
            yield from self._finish(self._shards[number], ctx)
            return
        if self._timer is not None and timestamp >= self._timer:
            self._timer = None
        if timestamp >= self._shard_timers.get(number, timestamp):
            self._shard_timers.pop(number, None)
        if self._report is not None and timestamp >= self._report:
            self._report = None
        if timestamp >= self._beats.get(number, END_OF_TIME):
            del self._beats[number]
            self._shards[number].beat()
        yield from self._drain(ctx)
        self._schedule(number, ctx)

    def _touch(self, number: int, ctx: Any) -> Iterator[Any]:
        """A shard's first element or timer, in a new job or after a restore."""
        entries = self._keyed.map(_STATE, Row(self._keys[number]), once=IN_FLIGHT)
        shard = self._shards[number] = Shard(number, Kept(entries), self._runner, self._telemetry)
        if self._watch is not None:
            self._watch.check(shard.alive_ms)
            shard.beat()
        ctx.timer_service().register_event_time_timer(END_OF_TIME)
        yield from self._emit(shard.resume(), ctx)

    def _drain(self, ctx: Any) -> Iterator[Any]:
        """What has ended in any shard: one timer serves them all."""
        self._runner.check()
        ready = [shard for shard in self._shards.values() if shard.events]
        if not ready:
            return
        for shard in ready:
            yield from self._emit(shard.drain(), ctx)

    def _finish(self, shard: Shard, ctx: Any) -> Iterator[Any]:
        """The end of bounded input: waits until nothing of the shard is in flight.

        What others say goes on meanwhile: their calls may have the places, and wait for their partials to leave.
        """
        yield from self._drain(ctx)
        while shard.in_flight:
            self._runner.places.wait_until(lambda: any(each.events for each in self._shards.values()), 0.1)
            yield from self._drain(ctx)

    def _look_after(self, number: int, ctx: Any) -> None:
        """A shard's own timers: by the slow one a restored job finds it, at a beat it says that it is alive."""
        if number not in self._shard_timers and self._shards[number].in_flight:
            self._shard_timers[number] = _now_ms() + SHARD_TIMER_MS
            ctx.timer_service().register_processing_time_timer(self._shard_timers[number])
        if self._watch is not None and number not in self._beats:
            self._beats[number] = _now_ms() + self._watch.beat_ms
            ctx.timer_service().register_processing_time_timer(self._beats[number])

    def _schedule(self, number: int, ctx: Any) -> None:
        self._arrived = None
        if self._timer is None and self.in_flight:
            self._timer = _now_ms() + TIMER_MS
            ctx.timer_service().register_processing_time_timer(self._timer)
        self._look_after(number, ctx)
        if self._report is None and self._counters.untold:
            self._report = _now_ms() + REPORT_MS
            ctx.timer_service().register_processing_time_timer(self._report)

    def _emit(self, outputs: Iterable[Output], ctx: Any) -> Iterator[Any]:
        for out in outputs:
            stamp = out.timestamp if out.timestamp is not None else _now_ms()
            low = low_mark(ctx.timer_service().current_watermark(), self._runner.event_times.oldest())
            value = out.value if self._shape is None else self._shape[out.kind].convert(out.value)
            row = written(out.key, value, out.headers, out.topic, low)
            tag = _TAGS.get(out.kind)
            yield (row, stamp) if tag is None else (tag, (row, stamp))


def _now_ms() -> int:
    return int(time.time() * 1000)


def _side(stream: DataStream, tag: OutputTag) -> Any:
    # DataStream.get_side_output would add an identity map in Python behind every side output.
    return stream._j_data_stream.getSideOutput(tag.get_java_output_tag())


def _replace(settings: OperatorSettings, **changes: Any) -> OperatorSettings:
    values = {name: getattr(settings, name) for name in settings.__struct_fields__}
    return OperatorSettings(**{**values, **changes})


def _check_records(name: str, *used: Any) -> None:
    """Raises ConfigError for a record class that would reach the workers without its fields.

    Classes of the job's own file are sent by value, and a Struct's fields are not among what is sent.
    """
    for found in (*used, *codec.registered()):
        if isinstance(found, type) and issubclass(found, Struct) and found.__module__ == "__main__":
            raise ConfigError(
                f"{name}: {found.__qualname__} is a msgspec.Struct of the job's own file, which workers cannot import: "
                f"move it, and its codec.register, to a module of its own (flink run -pyfs), or make it a dataclass"
            )


def _check_uid(env: Any, uid: str) -> None:
    if any(each.getUid() == uid for each in env._j_stream_execution_environment.getTransformations()):
        raise ConfigError(f"{uid}: the job has an operator of this uid already: give each `apply` one of its own")


def _check_environment(env: Any, settings: OperatorSettings) -> None:
    configuration = env._j_stream_execution_environment.getConfiguration()
    mode: str = configuration.getString("execution.runtime-mode", "STREAMING")
    if mode.upper() != RuntimeExecutionMode.STREAMING.name:
        raise ConfigError(
            f"execution.runtime-mode is {mode}: BATCH, which AUTOMATIC takes for bounded input, sorts by key and "
            f"runs no timers: use STREAMING"
        )
    environment.check(env, settings.capacity)
    if env.get_parallelism() > settings.shards:
        raise ConfigError(
            f"the parallelism is {env.get_parallelism()}, more than shards={settings.shards}: the other subtasks would "
            f"have nothing to do; lower it, or set shards to about 4 for each subtask you will ever run"
        )
