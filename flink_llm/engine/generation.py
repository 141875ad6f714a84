"""What a handler holds of a language model: the model to chat with, and a reply on its way."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Self, Unpack

import msgspec
from msgspec import NODEFAULT, Struct

from flink_llm.engine.faults import fault_error
from flink_llm.engine.ids import new_id
from flink_llm.engine.options import Choices, chosen
from flink_llm.engine.protocol import (
    Done,
    Engine,
    Event,
    EventStream,
    Fault,
    FinishReason,
    Loaded,
    Submit,
    Tokens,
    WorkKind,
)
from flink_llm.errors import ConfigError, Outage, RecordError
from flink_llm.records import ChatResponse, Logprob, Message, Timings, TokenRecord, Usage
from flink_llm.watching import current_watch, during


@lru_cache
def _defaults(struct: type[Struct]) -> list[tuple[str, Any]]:
    """Of each field its name and default, which is only ever compared with."""
    return [
        (field.name, field.default if field.default_factory is NODEFAULT else field.default_factory())
        for field in msgspec.structs.fields(struct)
    ]


AWAITED_TOLD_S = 0.1
"""How often the text of a reply that is awaited as a whole comes: for whoever it has to end early."""
_stable = msgspec.msgpack.Encoder(order="deterministic")
_NOT_CONTENT = frozenset({"call", "work", "request_id", "deadline", "priority", "told_every"})
"""Fields of a `Submit` that do not make it other work: how it is asked for, not what."""


class CallInfo:
    """The record that is being worked on, for whoever is called on its behalf.

    `open_generations` are those running now; `last_generation` is the id of the latest; `tasks` what it started
    and what still runs.
    """

    __slots__ = (
        "counts", "job", "key", "last_generation", "open_generations", "operator", "priority", "remaining",
        "request_id", "session_id", "tasks",
    )  # fmt: skip

    def __init__(
        self,
        *,
        job: str,
        operator: str,
        key: str,
        request_id: str,
        session_id: str,
        remaining: Callable[[], float | None] = lambda: None,
        priority: int = 5,
    ) -> None:
        self.job = job
        self.operator = operator
        self.key = key
        self.request_id = request_id
        self.session_id = session_id
        self.remaining = remaining
        self.priority = priority
        self.counts: dict[str, int] = {}
        self.open_generations: set[Generation] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.last_generation = ""


current_call: ContextVar[CallInfo] = ContextVar("current_call")


def _call_info() -> CallInfo:
    """The record that is being worked on; outside of one, work that is never found again."""
    info = current_call.get(None)
    if info is not None:
        return info
    return CallInfo(job="", operator="", key=new_id(), request_id="outside", session_id="")


def work_id(info: CallInfo, what: Submit) -> str:
    """What a piece of work is found again by after a restore.

    A hash of job, operator, key, request id, of the model, input and options by their names as far as they
    are not the defaults, and of how many identical calls came before it in this record, which this call
    becomes one of. Frozen, and with it the defaults: another formula would repeat generations instead of
    re-attaching. A field that is added with a default changes no hash.
    """
    content = {name: value for name, value in _stated(what).items() if name not in _NOT_CONTENT}
    parts = [info.job, info.operator, info.key, info.request_id, content]
    digest = hashlib.sha256(_stable.encode(parts)).hexdigest()
    before = info.counts.get(digest, 0)
    info.counts[digest] = before + 1
    return hashlib.sha256(f"{digest}/{before}".encode()).hexdigest()


def _stated(struct: Struct) -> dict[str, Any]:
    """The fields that are not as by default, by name."""
    found = {}
    for name, default in _defaults(type(struct)):
        value = getattr(struct, name)
        if value != default:
            found[name] = _stated(value) if isinstance(value, Struct) else value
    return found


class Served:
    """A model by its folder, loaded by `load` before the first call."""

    def __init__(self, engine: Engine, name: str, folder: str, kind: str) -> None:
        self._engine = engine
        self._folder = folder
        self._kind = kind
        self._loaded: Loaded | None = None
        self.name = name

    async def load(self) -> None:
        """Loads the model. Raises ConfigError when it is of another kind, ModelFolderError, Outage."""
        loaded = await self._engine.load(self._folder)
        if loaded.kind != self._kind:
            raise ConfigError(f"models.{self.name} is of kind {loaded.kind!r}, it is used as {self._kind!r}")
        self._loaded = loaded

    @property
    def loaded(self) -> Loaded:
        """What the engine said of the model. Raises ConfigError before `load`."""
        if self._loaded is None:
            raise ConfigError(f"models.{self.name} is not loaded: ask for it in open()")
        return self._loaded

    def _work(self, info: CallInfo, kind: WorkKind, **fields: Any) -> Submit:
        """Raises RecordError for what no engine could read: one record's must not break a connection."""
        plain = {
            "call": 0, "model": self.loaded.sha256, "kind": kind, "work": "", "request_id": info.request_id,
            "deadline": info.remaining(), "priority": info.priority, **fields,
        }  # fmt: skip
        try:
            work = msgspec.convert(plain, Submit)
            return msgspec.structs.replace(work, work=work_id(info, work))
        except (msgspec.ValidationError, TypeError, UnicodeEncodeError, OverflowError, RecursionError) as error:
            raise RecordError("invalid", f"this cannot be sent to {self.name}: {error}") from error

    async def _finish(self, kind: WorkKind, **fields: Any) -> Done:
        events = self._engine.submit(self._work(_call_info(), kind, **fields))
        with during("model", model=self.name, kind=kind):
            try:
                async for event in events:
                    if isinstance(event, Done):
                        return event
                    if isinstance(event, Fault):
                        raise fault_error(event)
            finally:
                events.close()
        raise Outage(f"the engine ended the work of {self.name} without an answer")


class Model(Served):
    """A language model."""

    def __init__(self, engine: Engine, name: str, folder: str) -> None:
        super().__init__(engine, name, folder, "decoder")

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        *,
        features: Mapping[str, Any] | None = None,
        adapter: str = "",
        **choices: Unpack[Choices],
    ) -> "Generation":
        """A reply to a conversation, grounded in `features`, through the model's chat template.

        `adapter` is one of those the model was exported with, "" for none; another is the record's failure
        `unknown_adapter`. See `Choices` for the options. Nothing runs before the reply is iterated or awaited, which
        raises RecordError, Overloaded or Outage. Raises RecordError for options out of their range.
        """
        plain = [
            {"role": turn.role, "content": turn.content} if isinstance(turn, Message) else dict(turn)
            for turn in messages
        ]
        given = {name: features[name] for name in features} if features else None
        generation = self._generation(choices, messages=plain, features=given, adapter=adapter)
        generation.feature_age_s = getattr(features, "age_s", None)
        return generation

    def generate(self, prompt: str, *, adapter: str = "", **choices: Unpack[Choices]) -> "Generation":
        """The continuation of a bare prompt; otherwise as `chat`."""
        return self._generation(choices, prompt=prompt, adapter=adapter)

    def _generation(self, choices: Choices, **fields: Any) -> "Generation":
        info = _call_info()
        work = self._work(info, "generate", options=chosen(choices, info.request_id), **fields)
        return Generation(self._engine, work, info, self)


class Generation(AsyncIterator[TokenRecord]):
    """A reply: iterate it for its `TokenRecord`s, or await it for the whole; it runs once.

    One that is awaited comes in pieces of a tenth of a second: ended early, it may lack what was said since the last.

    It starts at the first of these, goes on where a reader left it, and once ended yields nothing more.
    After its end: `text`, `finish_reason`, `usage`, `timings`, `logprobs`, `generation_id`, `message` (the
    assistant's turn) and `response` (a `ChatResponse`); before it they hold what there is, with
    `finish_reason` "cancelled".
    """

    def __init__(self, engine: Engine, work: Submit, info: CallInfo, model: Model) -> None:
        self._engine = engine
        self._work = work
        self._info = info
        self._model = model
        self._pieces: list[str] = []
        self._stream: EventStream | None = None
        self._events: AsyncIterator[Event] | None = None
        self._over = False
        self._began = 0.0
        self._spoke_at: float | None = None
        self._watch = current_watch.get()
        self._spoke = ""
        self.generation_id = ""
        self.finish_reason: FinishReason = "cancelled"
        self.usage = Usage()
        self.timings = Timings()
        self.logprobs: list[Logprob] = []
        self.feature_age_s: float | None = None

    @property
    def text(self) -> str:
        """What has been said so far."""
        return "".join(self._pieces)

    @property
    def message(self) -> Message:
        """The reply as a turn of the conversation."""
        return Message("assistant", self.text)

    @property
    def response(self) -> ChatResponse:
        """The reply as the record of `chat.responses`."""
        return ChatResponse(
            request_id=self._info.request_id,
            session_id=self._info.session_id,
            text=self.text,
            finish_reason=self.finish_reason,
            model=self._model.name,
            model_hash=self._spoke or self._model.loaded.sha256,
            generation_id=self.generation_id,
            usage=self.usage,
            timings=self.timings,
            features=self._work.features or {},
            feature_age_s=self.feature_age_s,
            logprobs=self.logprobs,
        )

    def expire(self) -> None:
        """Ends the reply with what there is, `finish_reason` "deadline", and stops the model."""
        self._end("deadline")

    def cancel(self) -> None:
        """Ends the reply with what there is, `finish_reason` "cancelled", and stops the model."""
        self._end("cancelled")

    def close(self) -> None:
        """As `cancel`; for whoever left the reply before its end."""
        self.cancel()

    def _end(self, reason: FinishReason) -> None:
        if self._over:
            return
        self.finish_reason = reason
        stream = self._stream
        self._leave()
        if stream is not None:
            stream.end()

    def _leave(self) -> None:
        """Nothing more is read; work that has not ended is cancelled."""
        self._over = True
        stream, self._stream = self._stream, None
        self._info.open_generations.discard(self)
        if stream is not None:
            now = asyncio.get_running_loop().time()
            self.timings = msgspec.structs.replace(self.timings, total_ms=round((now - self._began) * 1000, 3))
            stream.close()
            self._tell(now)

    def _tell(self, now: float) -> None:
        name, tokens = self._model.name, self.usage
        self._watch.passed("model", self._began, now, model=name, generation=self.generation_id)
        if self._spoke_at is not None:
            queued = self.timings.queue_ms
            self._watch.passed(
                "prefill", self._began, self._spoke_at, model=name, tokens=tokens.prompt_tokens, queue_ms=queued
            )
            self._watch.passed("decode", self._spoke_at, now, model=name, tokens=tokens.completion_tokens)

    def _start(self) -> AsyncIterator[Event]:
        self._began = asyncio.get_running_loop().time()
        self._info.open_generations.add(self)
        self._stream = self._engine.submit(self._work)
        self._events = aiter(self._stream)
        return self._events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenRecord:
        if self._over:
            raise StopAsyncIteration
        try:
            event = await anext(self._events or self._start())
        except StopAsyncIteration:
            if self._over:
                raise
            self._leave()
            raise Outage(f"the engine ended a generation of {self._model.name} without an answer") from None
        except BaseException:  # an outage, or the reader's own cancellation
            self._leave()
            raise
        if self._over:
            raise StopAsyncIteration
        if isinstance(event, Tokens):
            return self._said(event)
        if isinstance(event, Done):
            self._done(event)
            raise StopAsyncIteration
        self._leave()
        raise fault_error(event)

    def _said(self, event: Tokens) -> TokenRecord:
        if self._spoke_at is None:
            self._spoke_at = asyncio.get_running_loop().time()
        self.generation_id = self._info.last_generation = event.generation
        self._spoke = event.model or self._spoke
        self._pieces.append(event.text)
        return TokenRecord(
            request_id=self._info.request_id,
            generation_id=event.generation,
            sequence=event.sequence,
            text=event.text,
        )

    def _done(self, event: Done) -> None:
        self.generation_id = self._info.last_generation = event.generation
        self.finish_reason = event.finish
        self._spoke = event.model or self._spoke
        self._pieces = [event.text]
        self.usage = Usage(prompt_tokens=event.prompt_tokens, completion_tokens=event.completion_tokens)
        self.timings = Timings(
            queue_ms=event.queue_ms, first_token_ms=event.first_token_ms, per_token_ms=event.per_token_ms
        )
        self.logprobs = event.logprobs
        self._leave()

    async def _whole(self) -> Self:
        if self._events is None:  # nobody reads its tokens: each by itself would cost everybody on its way
            self._work = msgspec.structs.replace(self._work, told_every=AWAITED_TOLD_S)
        async for _ in self:
            pass
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self._whole().__await__()
