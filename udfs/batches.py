"""All rows of a batch at once: what stands behind the SQL functions.

A vectorised function is called with a batch of rows and returns when all are answered. Here each row is a
call of the same runner that `apply` uses, so that outages wait, overload is tried again and a record's
fault is that record's, with the batching clients below. What a function says of a row is found again by
the row's arguments alone: after a restart a generation that is still alive is joined, and equal rows of
a batch are one call.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from flink_llm.arrivals import Arrival
from flink_llm.call import Call, Failed, OperatorSettings, Outcome
from flink_llm.errors import ConfigError, Outage, RecordError
from flink_llm.handler import AsyncUdf, CallContext, Context, Services
from flink_llm.runner import Runner
from flink_llm.telemetry import open_telemetry, watched
from flink_llm.telemetry_settings import TelemetrySettings

log = logging.getLogger(__name__)

AT_ONCE = 4096
"""Rows of a batch that run at a time: as many as a host lets wait by default."""
LOAD_RETRY_S = 1.0
LOOK_S = 1.0
"""How often a waiting batch looks whether its runner is still alive."""

Arguments = tuple[Any, ...]
RowFunction = Callable[["Served", Arguments], Awaitable[Any]]
"""One row's arguments to a JSON value. Raises what a handler's `call` may."""


class _NoFeatures(ConfigError):
    """The job has no feature repository."""


class Served:
    """Models and features by name, each made ready when a row first names it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ready: dict[str, Any] = {}
        self._refused: dict[str, RecordError] = {}

    def __getitem__(self, name: str) -> Any:
        """What `prepare` has made ready. Raises RecordError, `unknown_model` or of features `invalid`."""
        if name in self._refused:
            raise self._refused[name]
        return self._ready[name]

    def join_keys(self, name: str, values: Sequence[Any]) -> dict[str, Any]:
        """What features are read by. Raises RecordError `invalid` for more or fewer `values` than they have keys."""
        wanted = self[name].join_keys
        if len(values) != len(wanted):
            listed, given = ", ".join(wanted), len(values)
            raise RecordError("invalid", f"{name} is read by {listed}, in this order; the query gives {given} keys")
        return dict(zip(wanted, values, strict=True))

    async def prepare(self, kind: str, names: set[str], *, fixed: bool) -> None:
        """Makes ready what is new among `names`; `kind` is a method of `Context`. Waits out an outage.

        A model that is not there or is of another kind, or features that are not there, are an error of the query
        if their name is `fixed` in it, else of the rows that name them. Raises ConfigError, ModelFolderError.
        """
        code = "invalid" if kind == "features" else "unknown_model"
        for name in names - self._ready.keys() - self._refused.keys():
            try:
                self._ready[name] = await self._open(kind, name)
            except ConfigError as error:
                no_row = isinstance(error, _NoFeatures) or (kind == "features" and not self._is_refused(name))
                if fixed or no_row:
                    raise
                self._refused[name] = RecordError(code, str(error))

    def _is_refused(self, name: str) -> bool:
        """Whether these features themselves are refused: else the store could not be opened, which no row is to
        blame for."""
        try:
            self._context.features(name)
        except ConfigError:
            return True
        return False

    async def _open(self, kind: str, name: str) -> Any:
        opened = bool(self._ready or self._refused)
        try:
            found = getattr(self._context, kind)(name)
        except ConfigError as error:
            if kind == "features" and not opened:  # nothing is there yet that could refuse a name
                raise _NoFeatures(str(error)) from error
            raise
        if kind == "features" and opened:
            return found  # of a store that is open, and would refuse at `start` again what it has refused before
        # A model is loaded by itself, lest one that is refused stands in the others' way.
        load = self._context._services.start if kind == "features" else found.load
        while True:
            try:
                await load()
                return found
            except Outage as error:
                log.warning("%s cannot be opened yet: %s", name, error)
                await asyncio.sleep(LOAD_RETRY_S)


class _Handler(AsyncUdf):
    """A row as the runner's record."""

    on_deadline = "failure"

    def __init__(self, function: RowFunction) -> None:
        self._function = function

    async def open(self, ctx: Context) -> None:
        self.loop = asyncio.get_running_loop()
        self.served = Served(ctx)

    async def call(self, request: Any, ctx: CallContext) -> Any:
        return await self._function(self.served, request.arguments)


class Row(msgspec.Struct, frozen=True):
    """What a call is asked: the arguments, and what the runner reads of a request."""

    arguments: Arguments
    deadline: float | None = None
    priority: int | None = None


class _Batch:
    """What a call takes for its shard."""

    number = 0

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.events: deque[tuple[Call, bytes | None]] = deque()


class Batches:
    """Runs one function for one subtask. `start`, then `answer` from one thread, `close` at the end.

    `kind` is what the first argument of a row names, a method of `Context`. `name` is the function's, in
    logs and in what its work is found again by. Raises ConfigError for telemetry that cannot be had.
    """

    def __init__(
        self, name: str, kind: str, function: RowFunction, services: Services, job: str,
        telemetry: TelemetrySettings | None = None,
    ) -> None:  # fmt: skip
        self._name = name
        self._kind = kind
        self._handler = type(name, (_Handler,), {})(function)  # logs name a handler by its class
        settings = OperatorSettings(job=job, operator=f"sql.{name}", capacity=AT_ONCE, deadline=None, remember_s=0)
        self._telemetry = open_telemetry(telemetry or TelemetrySettings(), job=job, operator=settings.operator)
        self._runner = Runner(self._handler, services, settings)
        self.metrics = self._runner.metrics

    def start(self) -> None:
        """Raises FlinkLlmError."""
        if self._telemetry is not None:
            self._telemetry.start()
        self._runner.start()

    def close(self) -> None:
        """Ends what runs and lets go of models and features."""
        self._runner.close()
        if self._telemetry is not None:
            self._telemetry.stop()

    def answer(self, rows: Sequence["Row | RecordError | None"], *, fixed: bool) -> list[Outcome | None]:
        """The outcome of each row in its place, when all have one; None stays None, an error is a failure.

        `fixed`: the query itself, not its data, says what each row's first argument is. Raises FlinkLlmError for
        what is no row's fault.
        """
        asked = [row for row in rows if isinstance(row, Row)]
        names = {row.arguments[0] for row in asked}
        served = self._handler.served
        loading = served.prepare(self._kind, names, fixed=fixed)
        asyncio.run_coroutine_threadsafe(loading, self._handler.loop).result()
        if fixed and self._kind == "features" and asked:
            _check_keys(served, asked[0])
        batch = _Batch(self._runner)
        calls: dict[Row, Call] = {}
        for row in asked:
            if row not in calls:
                self._wait(batch, lambda: len(calls) - len(batch.events) < AT_ONCE)
                calls[row] = self._call(batch, len(calls), row)
                self._runner.submit(calls[row], wait=False)
        self._wait(batch, lambda: len(batch.events) == len(calls))
        for call in calls.values():
            call.watch.emitted(call)
        outcomes = [_outcome(row, calls) for row in rows]
        self._count(outcomes)
        return outcomes

    def _call(self, batch: Any, number: int, row: Row) -> Call:
        arrival, watch = watched(self._telemetry, Arrival(key="", element=list(row.arguments)))
        call = Call(batch, number, arrival, row, int(time.time() * 1000))
        call.watch = watch
        return call

    def _wait(self, batch: _Batch, there: Callable[[], bool]) -> None:
        while not there():
            self._runner.check()
            self._runner.places.wait_until(there, LOOK_S)

    def _count(self, outcomes: Sequence[Outcome | None]) -> None:
        failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
        self.metrics.add("results", sum(outcome is not None for outcome in outcomes) - len(failed))
        messages = {outcome.code: outcome.message for outcome in failed}
        for code, count in Counter(outcome.code for outcome in failed).items():
            self.metrics.add(f"failures.{code}", count)
            log.warning("%s: %d of %d rows failed: %s: %s", self._name, count, len(outcomes), code, messages[code])


def _check_keys(served: Served, row: Row) -> None:
    """All rows of a query give as many keys. Raises ConfigError where that is a wrong number."""
    name, *values = row.arguments
    try:
        served.join_keys(name, values)
    except RecordError as error:
        raise ConfigError(error.message) from error


def _outcome(row: Row | RecordError | None, calls: dict[Row, Call]) -> Outcome | None:
    if isinstance(row, RecordError):
        return Failed(row.code, row.message)
    return None if row is None else calls[row].outcome
