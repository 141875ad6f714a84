"""What a handler holds: a model to chat with, an embedder, a classifier, and a reply on its way."""

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Self

import msgspec
import numpy as np
from msgspec import Struct

from flink_llm.engine.protocol import Done, Engine, Fault, FinishReason, Loaded, Options, Submit, Tokens
from flink_llm.errors import ConfigError, Outage, Overloaded, RecordError
from flink_llm.records import ChatResponse, Message, Timings, TokenRecord, Usage

_DRAWS = 2**53
_stable = msgspec.msgpack.Encoder(order="deterministic")


class CallInfo:
    """The record that is being worked on, for whoever is called on its behalf.

    `open_generations` are those running now; `last_generation` is the id of the latest.
    """

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
        self.counts: Counter[str] = Counter()
        self.open_generations: set[Generation] = set()
        self.last_generation = ""


current_call: ContextVar[CallInfo] = ContextVar("current_call")
_OUTSIDE = CallInfo(job="", operator="", key="", request_id="outside", session_id="")


def default_seed(request_id: str) -> int:
    """The seed of a request that names none: so a repeat says the same."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") % _DRAWS


def work_id(info: CallInfo, what: Submit) -> str:
    """What a piece of work is found again by after a restore.

    A hash of job, operator, key, request id, model, input, options, and how many identical calls came
    before it in this record. Frozen: another formula would repeat generations instead of re-attaching.
    """
    parts = [
        info.job, info.operator, info.key, info.request_id, what.model, what.kind, what.messages,
        what.features, what.prompt, what.text, msgspec.to_builtins(what.options),
    ]  # fmt: skip
    digest = hashlib.sha256(_stable.encode(parts)).hexdigest()
    info.counts[digest] += 1
    return hashlib.sha256(f"{digest}/{info.counts[digest] - 1}".encode()).hexdigest()


class _Served:
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

    def _work(self, kind: Any, **fields: Any) -> tuple[Submit, CallInfo]:
        info = current_call.get(_OUTSIDE)
        work = Submit(
            call=0, model=self.loaded.sha256, kind=kind, work="", request_id=info.request_id,
            deadline=info.remaining(), priority=info.priority, **fields,
        )  # fmt: skip
        return msgspec.structs.replace(work, work=work_id(info, work)), info

    async def _finish(self, text: str, kind: str) -> Done:
        work, _ = self._work(kind, text=text)
        async for event in self._engine.submit(work):
            if isinstance(event, Done):
                return event
            if isinstance(event, Fault):
                raise fault_error(event)
        raise Outage(f"the engine ended the work of {self.name} without an answer")


class Model(_Served):
    """A language model. Options: `temperature` 0 is greedy; `stop` are strings; `seed` defaults to a
    hash of the request id."""

    def __init__(self, engine: Engine, name: str, folder: str) -> None:
        super().__init__(engine, name, folder, "decoder")

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        *,
        features: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "Generation":
        """A reply to a conversation, grounded in `features`, through the model's chat template.

        Options are those of `protocol.Options`. Nothing runs before the reply is iterated or awaited,
        which raises RecordError, Overloaded or Outage.
        """
        plain = [{"role": m.role, "content": m.content} if isinstance(m, Message) else dict(m) for m in messages]
        given = {name: features[name] for name in features} if features else None
        return self._generation(options, messages=plain, features=given)

    def generate(self, prompt: str, **options: Any) -> "Generation":
        """The continuation of a bare prompt; otherwise as `chat`."""
        return self._generation(options, prompt=prompt)

    def _generation(self, options: dict[str, Any], **fields: Any) -> "Generation":
        info = current_call.get(_OUTSIDE)
        if options.get("seed") is None:
            options["seed"] = default_seed(info.request_id)
        try:
            chosen = msgspec.convert(options, Options)
        except msgspec.ValidationError as error:
            raise RecordError("bad_option", str(error)) from error
        unknown = set(options) - {field.name for field in msgspec.structs.fields(Options)}
        if unknown:
            raise RecordError("bad_option", f"unknown generation option {sorted(unknown)[0]!r}")
        work, info = self._work("generate", options=chosen, **fields)
        return Generation(self._engine, work, info, self)


class Generation:
    """A reply: iterate it for its `TokenRecord`s, or await it for the whole.

    After its end: `text`, `finish_reason`, `usage`, `timings`, `generation_id`, `message` (the
    assistant's turn) and `response` (a `ChatResponse`).
    """

    def __init__(self, engine: Engine, work: Submit, info: CallInfo, model: Model) -> None:
        self._engine = engine
        self._work = work
        self._info = info
        self._model = model
        self._pieces: list[str] = []
        self._events: Any = None
        self._over = False
        self.generation_id = ""
        self.finish_reason: FinishReason = "stop"
        self.usage = Usage()
        self.timings = Timings()

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
            model_hash=self._model.loaded.sha256,
            generation_id=self.generation_id,
            usage=self.usage,
            timings=self.timings,
            features=self._work.features or {},
        )

    def expire(self) -> None:
        """Ends the reply with what there is, `finish_reason` "deadline", and stops the model."""
        self._over = True
        self.finish_reason = "deadline"
        if self._events is not None:
            self._events.end()

    def close(self) -> None:
        """Stops the model; for whoever left the reply before its end."""
        if self._events is not None:
            self._events.close()
            self._info.open_generations.discard(self)

    async def _iterate(self) -> AsyncIterator[TokenRecord]:
        self._info.open_generations.add(self)
        events = self._events = self._engine.submit(self._work)
        try:
            async for event in events:
                if isinstance(event, Tokens):
                    self.generation_id = self._info.last_generation = event.generation
                    self._pieces.append(event.text)
                    yield TokenRecord(
                        request_id=self._info.request_id,
                        generation_id=event.generation,
                        sequence=event.sequence,
                        text=event.text,
                    )
                elif isinstance(event, Done):
                    self._done(event)
                    return
                else:
                    raise fault_error(event)
            if not self._over:
                raise Outage(f"the engine ended a generation of {self._model.name} without an answer")
        finally:
            self._info.open_generations.discard(self)
            await events.aclose()

    def _done(self, event: Done) -> None:
        self.generation_id = self._info.last_generation = event.generation
        self.finish_reason = event.finish
        self._pieces = [event.text]
        self.usage = Usage(prompt_tokens=event.prompt_tokens, completion_tokens=event.completion_tokens)
        self.timings = Timings(
            queue_ms=event.queue_ms, first_token_ms=event.first_token_ms, per_token_ms=event.per_token_ms
        )

    def __aiter__(self) -> AsyncIterator[TokenRecord]:
        return self._iterate()

    async def _whole(self) -> Self:
        async for _ in self._iterate():
            pass
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self._whole().__await__()


class Embedding(Struct, frozen=True):
    """`vector` has shape [dimension], float32."""

    vector: Any
    model: str
    model_hash: str
    usage: Usage


class Embedder(_Served):
    """An embedding model: `await embedder(text)`."""

    def __init__(self, engine: Engine, name: str, folder: str) -> None:
        super().__init__(engine, name, folder, "embedding")

    async def __call__(self, text: str) -> Embedding:
        """The embedding of a text. Raises RecordError, Overloaded, Outage."""
        done = await self._finish(text, "embed")
        vector = np.frombuffer(done.vector, dtype="<f4")
        return Embedding(vector, self.name, self.loaded.sha256, Usage(prompt_tokens=done.prompt_tokens))


class Classification(Struct, frozen=True):
    """The best label, and the probability of each."""

    label: str
    scores: dict[str, float]
    model: str
    model_hash: str
    usage: Usage


class Classifier(_Served):
    """A classifier: `await classifier(text)`."""

    def __init__(self, engine: Engine, name: str, folder: str) -> None:
        super().__init__(engine, name, folder, "classifier")

    async def __call__(self, text: str) -> Classification:
        """The class of a text. Raises RecordError, Overloaded, Outage."""
        done = await self._finish(text, "classify")
        scores = dict(zip(self.loaded.labels, done.scores, strict=True))
        best = max(scores, key=scores.__getitem__)
        usage = Usage(prompt_tokens=done.prompt_tokens)
        return Classification(best, scores, self.name, self.loaded.sha256, usage)


def fault_error(fault: Fault) -> Exception:
    """The error of a fault that an engine reports."""
    if fault.kind == "record":
        return RecordError(fault.code, fault.message)
    if fault.kind == "overloaded":
        return Overloaded(fault.message, fault.retry_after)
    return Outage(fault.message)
