"""What a user writes: an `AsyncUdf`, and the `ctx` it is given.

One instance serves one operator subtask. Its `call` runs for many records at the same time on one
asyncio loop, so it awaits whatever takes time and never blocks.
"""

import inspect
import logging
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from flink_llm import codec
from flink_llm.errors import ConfigError, RecordError

if typing.TYPE_CHECKING:
    from flink_llm.breakers import Breaker
    from flink_llm.engine.generation import Model
    from flink_llm.engine.readers import Classifier, Embedder, Reranker, Tagger
    from flink_llm.features import FeatureTable


class Services(Protocol):
    """Where `ctx` finds models and features; `flink_llm.services` has the real ones, testing fakes."""

    def model(self, name: str) -> "Model": ...
    def embedder(self, name: str) -> "Embedder": ...
    def classifier(self, name: str) -> "Classifier": ...
    def tagger(self, name: str) -> "Tagger": ...
    def reranker(self, name: str) -> "Reranker": ...
    def features(self, name: str) -> "FeatureTable": ...

    @property
    def breakers(self) -> "Mapping[str, Breaker]":
        """Those of models and features by name, as far as they were used."""

    @property
    def outage_since(self) -> float | None:
        """Monotonic seconds since when some part is down, None while all are up."""

    async def start(self) -> None:
        """Loads what was asked for. Raises ConfigError, ModelFolderError, Outage."""

    async def close(self) -> None: ...


class Metrics:
    """Counters of a handler. Any thread may add; the operator reports them to Flink."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Adds `amount` to the counter `name`, which is made at its first use."""
        self.counts[name] = self.counts.get(name, 0) + amount


class Context:
    """What `open` is given: models and features by the names of the configuration, metrics, a logger."""

    def __init__(self, services: Services, metrics: Metrics, log: logging.Logger) -> None:
        self._services = services
        self.metrics = metrics
        self.log = log

    def model(self, name: str) -> "Model":
        """A language model: `.chat(messages, ...)` and `.generate(prompt, ...)`. Raises ConfigError."""
        return self._services.model(name)

    def embed(self, name: str) -> "Embedder":
        """An embedding model: `await it(text, dimensions=...)`. Raises ConfigError."""
        return self._services.embedder(name)

    def classify(self, name: str) -> "Classifier":
        """A classifier: `await it(text)`. Raises ConfigError."""
        return self._services.classifier(name)

    def tag(self, name: str) -> "Tagger":
        """A token classifier, for the entities of a text: `await it(text)`. Raises ConfigError."""
        return self._services.tagger(name)

    def rerank(self, name: str) -> "Reranker":
        """A cross-encoder: `await it(query, documents)`. Raises ConfigError."""
        return self._services.reranker(name)

    def features(self, name: str) -> "FeatureTable":
        """A Feast feature view or service: `await it.get(user_id=...)`. Raises ConfigError."""
        return self._services.features(name)


class CallContext(Context):
    """What `call` is given, besides all that `open` had.

    `key` and `request_id` are the record's (`request_id` is None where it has none), `headers` its
    Kafka headers, `timestamp` its epoch milliseconds or None, `attempt` 0 at first and one more each
    time it is tried again.
    """

    def __init__(self, parent: Context, call: "CallPort", *, state: dict[str, Any] | None) -> None:
        super().__init__(parent._services, parent.metrics, parent.log)
        self._call = call
        self._state = state
        self.key: str = call.key
        self.request_id: str | None = call.request_id
        self.headers = call.headers
        self.timestamp: int | None = call.timestamp
        self.attempt: int = call.attempt

    @property
    def state(self) -> dict[str, Any]:
        """This key's state: a copy to read and change, stored together with the result.

        Values are JSON types, bytes, and records registered with `codec.register`. A call that fails
        changes nothing; an empty state is none, and takes no room. Raises ConfigError unless the handler
        says `stateful = True`.
        """
        if self._state is None:
            raise ConfigError("ctx.state needs `stateful = True` on the handler")
        return self._state

    @property
    def deadline(self) -> float | None:
        """Seconds left, 0 when it has passed, None when there is none."""
        return self._call.remaining()

    async def emit(self, partial: Any) -> None:
        """Sends a partial output at once, at least once. Waits while too many are unsent.

        Raises RuntimeError after the call has ended, RecordError for what cannot be encoded.
        """
        await self._call.emit(partial)


class CallPort(Protocol):
    """The runner's side of a `CallContext`."""

    key: str
    request_id: str | None
    timestamp: int | None
    attempt: int

    @property
    def headers(self) -> typing.Mapping[str, bytes | None]: ...
    def remaining(self) -> float | None: ...
    async def emit(self, partial: Any) -> None: ...


class AsyncUdf:
    """Base of handlers.

    `stateful`: calls of one key run one after another and `ctx.state` is theirs; without it they run
    side by side. `on_deadline`: "partial" lets a call whose generation the deadline cuts short, once it
    has said something, finish with what there is (`finish_reason` "deadline"); "failure" cancels it. The type
    of the first argument of `call` is what records are decoded to; the return annotation, when it is a
    class, is checked.
    """

    stateful: ClassVar[bool] = False
    on_deadline: ClassVar[Literal["partial", "failure"]] = "partial"

    async def open(self, ctx: Context) -> None:
        """Called once per subtask before any call. An exception fails the job with one line."""

    async def call(self, request: Any, ctx: CallContext) -> Any:
        """One record to its result. What it raises ends this record as a failure, never the job;
        `Outage`, `Overloaded` and `Retriable` are tried again. May run again for the same record after a restore."""
        raise NotImplementedError(f"{type(self).__name__} has no call()")

    async def close(self) -> None:
        """Called once, when the subtask ends in order; not after a crash."""


def signature_of(udf: AsyncUdf) -> tuple[Any, type | None]:
    """What `call` takes, and the class it returns (None where that is not one class).

    Raises ConfigError when `call` is not `async def call(self, request, ctx)`.
    """
    name = type(udf).__name__
    call: Callable[..., Any] = type(udf).call
    if not inspect.iscoroutinefunction(call):
        raise ConfigError(f"{name}.call must be `async def call(self, request, ctx)`")
    parameters = list(inspect.signature(call).parameters.values())
    if len(parameters) != 3:
        raise ConfigError(f"{name}.call takes {len(parameters) - 1} arguments; it must take (request, ctx)")
    try:
        hints = typing.get_type_hints(call)
    except NameError as error:
        raise ConfigError(f"the annotations of {name}.call cannot be read: {error}") from error
    takes, returns = hints.get(parameters[1].name, Any), hints.get("return")
    try:
        msgspec.json.Decoder(takes)
    except TypeError as error:
        raise ConfigError(f"{name}.call takes {takes}, which no record can be decoded to: {error}") from error
    codec.forget(takes)
    return takes, returns if isinstance(returns, type) and returns is not Any else None  # Any is a class since 3.11


def check_result(result: Any, returns: type | None, handler: str) -> None:
    """Raises RecordError `bad_result` for None, or for another class than the handler declares."""
    if result is None:
        raise RecordError("bad_result", f"{handler}.call returned None")
    if returns is not None and not isinstance(result, returns):
        raise RecordError(
            "bad_result", f"{handler}.call returned {type(result).__name__}, it declares {returns.__name__}"
        )
