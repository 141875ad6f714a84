"""`apply`: an `AsyncUdf` on a stream, as an operator that never waits for a bundle.

A keyed process function over shards. An arriving record is kept in keyed state, its coroutine is
started on the runner's loop, and a processing-time timer every few milliseconds emits what has ended in
any shard, for as long as anything is in flight. Each shard with something in flight has a slow timer of
its own as well, which a restore finds. Adapter only: what happens to a record is in `flink_llm.runner`
and `flink_llm.shard`.
"""

import gc
import time
from collections.abc import Callable, Iterator
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
from flink_llm.handler import AsyncUdf, signature_of
from flink_llm.kept import Kept
from flink_llm.runner import Runner
from flink_llm.services import ServiceSettings, open_services
from flink_llm.shard import Output, Shard
from flink_llm.transactions import PARAMETER, AliveWatch
from flink_llm.udfs.bundles import KeyedState, lean_bundles
from flink_llm.udfs.event_time import BYTES, emitted_type, low_mark, table_with_event_time, with_event_time
from flink_llm.udfs.keying import Reader, keyed, shard_keys
from flink_llm.udfs.tables import Shape, TableOutputs, Wanted, records_of, shapes

TIMER_MS = 5
SHARD_TIMER_MS = 1000
MOMENT_S = 0.003
"""How long a bundle's arrivals together may hold it for calls that are about to end."""
WAIT_AGAIN_AFTER = 1000
"""Arrivals that are not waited for before one is again, to see whether it pays by now."""
END_OF_TIME = 2**63 - 1

_BYTES = Types.PRIMITIVE_ARRAY(Types.BYTE())
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
        self._of_savepoint = of_savepoint
        self._udf = udf
        self._settings = settings
        self._services = services
        self._keys = keys
        self._read = read
        self._shape = shape

    def open(self, runtime_context: RuntimeContext) -> None:
        lean_bundles()
        self._read.open()
        self._numbers = {key: number for number, key in enumerate(self._keys)}
        self._shards: dict[int, Shard] = {}
        self._timer: int | None = None
        self._shard_timers: dict[int, int] = {}
        self._beats: dict[int, int] = {}
        self._watch = self._watched(runtime_context)
        self._keyed = KeyedState(runtime_context)
        self._kept = Kept(runtime_context.get_map_state(MapStateDescriptor("shard", _BYTES, _BYTES)))
        self._runner = Runner(self._udf, open_services(self._services), self._settings)
        self._runner.start()
        gc.collect()
        gc.freeze()  # modules and models live as long as this worker: a full collection would stop all calls for them
        self._patience = _Patience(self._runner)
        self._counters = _Counters(runtime_context, self)

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

    @property
    def in_flight(self) -> int:
        return sum(shard.in_flight for shard in self._shards.values())

    def process_element(self, value: Any, ctx: KeyedProcessFunction.Context) -> Iterator[Any]:
        number = self._numbers[ctx.get_current_key()]
        data = self._read(value, number, ctx.timestamp())
        if number not in self._shards:
            yield from self._touch(number, ctx)
        yield from self._emit(self._shards[number].receive(data), ctx)
        self._patience.wait(self._shards[number], self._keyed.bundles)
        yield from self._drain(ctx)
        self._schedule(number, ctx)

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[Any]:
        number = self._numbers.get(ctx.get_current_key())
        if number is None:
            raise StateError("state holds a shard that the job does not have: set flink.shards back to what it was")
        self._runner.places.let_go()
        if number not in self._shards:
            yield from self._touch(number, ctx)
        if ctx.time_domain() == TimeDomain.EVENT_TIME:
            yield from self._emit(self._shards[number].drain_all(), ctx)
            return
        if self._timer is not None and timestamp >= self._timer:
            self._timer = None
        if timestamp >= self._shard_timers.get(number, timestamp):
            self._shard_timers.pop(number, None)
        if timestamp >= self._beats.get(number, END_OF_TIME):
            del self._beats[number]
            self._shards[number].beat()
        yield from self._drain(ctx)
        self._schedule(number, ctx)

    def _touch(self, number: int, ctx: Any) -> Iterator[Any]:
        """A shard's first element or timer, in a new job or after a restore."""
        shard = self._shards[number] = Shard(number, self._kept, self._runner)
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
        own = self._keyed.key
        for shard in ready:
            self._keyed.key = Row(self._keys[shard.number])
            yield from self._emit(shard.drain(), ctx)
        self._keyed.key = own

    def _schedule(self, number: int, ctx: Any) -> None:
        now = _now_ms()
        if self._timer is None and self.in_flight:
            self._timer = now + TIMER_MS
            ctx.timer_service().register_processing_time_timer(self._timer)
        if number not in self._shard_timers and self._shards[number].in_flight:
            self._shard_timers[number] = now + SHARD_TIMER_MS
            ctx.timer_service().register_processing_time_timer(now + SHARD_TIMER_MS)
        if self._watch is not None and number not in self._beats:
            self._beats[number] = now + self._watch.beat_ms
            ctx.timer_service().register_processing_time_timer(self._beats[number])
        self._counters.report()

    def _emit(self, outputs: Iterator[Output], ctx: Any) -> Iterator[Any]:
        for out in outputs:
            stamp = out.timestamp if out.timestamp is not None else _now_ms()
            low = low_mark(ctx.timer_service().current_watermark(), self._runner.event_times.oldest())
            value = out.value if self._shape is None else self._shape[out.kind].convert(out.value)
            row = Row(out.key, value, out.headers, out.topic, low)
            tag = _TAGS.get(out.kind)
            yield (row, stamp) if tag is None else (tag, (row, stamp))


class _Patience:
    """Waits a moment for a call that has just begun, where such calls have been ending in a moment.

    What ends before its bundle does leaves with it, and not with the timer's, two bundles later. As a
    spinning lock does, this goes by what was seen: once calls take longer it only tries now and then.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._bundle = -1
        self._left = 0.0
        self._paid = 1.0  # moving share of waits that saw an end
        self._skipped = 0

    def wait(self, shard: Shard, bundle: int) -> None:
        """After an arrival, in the bundle of this number."""
        if not shard.in_flight or shard.events:
            return
        if self._paid < 0.5 and self._skipped < WAIT_AGAIN_AFTER:
            self._skipped += 1
            return
        if bundle != self._bundle:
            self._bundle, self._left = bundle, MOMENT_S
        if self._left <= 0:
            return
        self._skipped = 0
        began = time.perf_counter()
        self._runner.places.wait_until(lambda: bool(shard.events), self._left)
        self._left -= time.perf_counter() - began
        self._paid += (bool(shard.events) - self._paid) / 16


class _Counters:
    """Brings the runner's counts to Flink's metrics, from Flink's thread as PyFlink demands."""

    def __init__(self, runtime_context: RuntimeContext, operator: "_AsyncOperator") -> None:
        group = runtime_context.get_metrics_group()
        self._group = None if group is None else group.add_group("flink_llm")  # python.metric.enabled: false
        self._counts = operator._runner.metrics.counts
        self._flink: dict[str, Any] = {}
        self._reported: dict[str, int] = {}
        self._next = 0.0
        if self._group is not None:
            self._group.gauge("in_flight", lambda: operator.in_flight)

    def report(self) -> None:
        now = time.monotonic()
        if now < self._next or self._group is None:
            return
        self._next = now + 1
        for name, count in list(self._counts.items()):
            if name not in self._flink:
                self._flink[name] = self._group.counter(name)
            self._flink[name].inc(count - self._reported.get(name, 0))
            self._reported[name] = count


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
