"""Ready handlers, one line each in a pipeline: Generate, Embed, Classify, Tag, Rerank, Enrich."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from flink_llm.config import Chat
from flink_llm.errors import RecordError
from flink_llm.handler import AsyncUdf, CallContext, Context
from flink_llm.names import unknown
from flink_llm.records import (
    ChatRequest,
    ChatResponse,
    ClassifyResponse,
    EmbedRequest,
    EmbedResponse,
    EntityRecord,
    Message,
    RerankRequest,
    RerankResponse,
    TagResponse,
    TokenRecord,
)
from flink_llm.udfs.masking import Masker

_OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "logprobs", "json_schema", "regex", "choices",
)  # fmt: skip
"""Fields of a request that are options of its generation under the same name."""


class Generate(AsyncUdf):
    """A chat request to a reply: features, prompt, generation as it streams, masking.

    Partials are `TokenRecord`s whose texts joined are the response's text. `others` are further models
    that a request may name. A reply cut short by the deadline is a result with `finish_reason`
    "deadline".
    """

    def __init__(self, chat: Chat, others: Sequence[str] = ()) -> None:
        self._chat = chat
        self._names = {chat.model, *others}
        self._patterns = {name: re.compile(pattern) for name, pattern in chat.entities.items()}

    async def open(self, ctx: Context) -> None:
        """Asks for the models and the features."""
        self._models = {name: ctx.model(name) for name in sorted(self._names)}
        self._features = ctx.features(self._chat.features) if self._chat.features else None

    async def call(self, request: ChatRequest, ctx: CallContext) -> ChatResponse:
        """Raises RecordError: unknown_model, unknown_adapter, too_large, empty_text, context_overflow, bad_option."""
        began = time.monotonic()
        model = self._models.get(request.model or self._chat.model)
        if model is None:
            raise RecordError("unknown_model", unknown("model", str(request.model), self._models))
        length = sum(len(message.content) for message in request.messages)
        if length > self._chat.max_characters:
            limit = self._chat.max_characters
            raise RecordError("too_large", f"the messages have {length} characters, the job takes {limit}")
        features, age = await self._read(request)
        adapter = self._adapter(request)
        reply = model.chat(self._messages(request), features=features, adapter=adapter, **self._options(request))
        masker = Masker(self._chat.mask)
        said: list[str] = []
        async for token in reply:
            if token.sequence == 0:
                said.clear()
            await self._say(ctx, token, masker.add(token.text), said)
        last = TokenRecord(request_id=request.request_id, generation_id=reply.generation_id, sequence=0, text="")
        await self._say(ctx, last, masker.finish(cut=reply.finish_reason != "stop" or bool(request.stop)), said)
        timings = msgspec.structs.replace(reply.timings, total_ms=(time.monotonic() - began) * 1000)
        return msgspec.structs.replace(
            reply.response,
            session_id=request.session_id,
            text="".join(said),
            timings=timings,
            features=features,
            feature_age_s=age,
            masked=list(masker.found),
            logprobs=[] if masker.found else reply.logprobs,  # they hold the text as it was
        )

    async def _say(self, ctx: CallContext, token: TokenRecord, text: str, said: list[str]) -> None:
        if text:
            await ctx.emit(msgspec.structs.replace(token, sequence=len(said), text=text))
            said.append(text)

    async def _read(self, request: ChatRequest) -> tuple[dict[str, Any], float | None]:
        if self._features is None:
            return {}, None
        keys = self._keys(request)
        row = await self._features.get(**{name: keys.get(name) for name in self._features.join_keys})
        return {name: value for name, value in row.items() if name != "user_id"}, row.age_s

    def _keys(self, request: ChatRequest) -> dict[str, str | int]:
        keys: dict[str, str | int] = dict(request.entities)
        if request.user_id is not None:
            keys.setdefault("user_id", request.user_id)
        for name, pattern in self._patterns.items():
            found = pattern.search(request.messages[-1].content)
            if found is not None:
                keys.setdefault(name, found[1])
        return keys

    def _messages(self, request: ChatRequest) -> list[Message]:
        system = [Message("system", self._chat.system)] if self._chat.system else []
        return [*system, *request.messages]

    def _adapter(self, request: ChatRequest) -> str:
        """The job's default is its default model's: another model may have no such adapter."""
        if request.adapter is not None:
            return request.adapter
        return self._chat.adapter if request.model in (None, self._chat.model) else ""

    def _options(self, request: ChatRequest) -> dict[str, Any]:
        asked = {name: getattr(request, name) for name in _OPTIONS}
        options = {name: value for name, value in asked.items() if value is not None}
        options.setdefault("temperature", self._chat.temperature)
        return {**options, "stop": list(request.stop), "max_tokens": request.max_tokens or self._chat.max_tokens}


class Embed(AsyncUdf):
    """A text to its vector, or to the first `dimensions` of a Matryoshka model's."""

    def __init__(self, model: str, dimensions: int | None = None) -> None:
        self._name = model
        self._dimensions = dimensions

    async def open(self, ctx: Context) -> None:
        """Asks for the model."""
        self._model = ctx.embed(self._name)

    async def call(self, request: EmbedRequest, ctx: CallContext) -> EmbedResponse:
        """Raises RecordError `empty_text`."""
        found = await self._model(request.text, dimensions=self._dimensions)
        return EmbedResponse(
            request_id=request.request_id,
            vector=[float(value) for value in found.vector],
            model=found.model,
            model_hash=found.model_hash,
            usage=found.usage,
        )


class Classify(AsyncUdf):
    """A text to the probability of each label."""

    def __init__(self, model: str) -> None:
        self._name = model

    async def open(self, ctx: Context) -> None:
        """Asks for the model."""
        self._model = ctx.classify(self._name)

    async def call(self, request: EmbedRequest, ctx: CallContext) -> ClassifyResponse:
        """Raises RecordError `empty_text`."""
        found = await self._model(request.text)
        return ClassifyResponse(
            request_id=request.request_id,
            label=found.label,
            scores=found.scores,
            model=found.model,
            model_hash=found.model_hash,
            usage=found.usage,
        )


class Tag(AsyncUdf):
    """A text to the entities it names."""

    def __init__(self, model: str) -> None:
        self._name = model

    async def open(self, ctx: Context) -> None:
        """Asks for the model."""
        self._model = ctx.tag(self._name)

    async def call(self, request: EmbedRequest, ctx: CallContext) -> TagResponse:
        """Raises RecordError: empty_text, context_overflow."""
        found = await self._model(request.text)
        return TagResponse(
            request_id=request.request_id,
            entities=[
                EntityRecord(**msgspec.structs.asdict(each), text=request.text[each.start : each.end])
                for each in found.entities
            ],
            model=found.model,
            model_hash=found.model_hash,
            usage=found.usage,
        )


class Rerank(AsyncUdf):
    """Documents to their order by a query."""

    def __init__(self, model: str) -> None:
        self._name = model

    async def open(self, ctx: Context) -> None:
        """Asks for the model."""
        self._model = ctx.rerank(self._name)

    async def call(self, request: RerankRequest, ctx: CallContext) -> RerankResponse:
        """Raises RecordError: empty_text, too_large."""
        found = await self._model(request.query, request.documents)
        return RerankResponse(
            request_id=request.request_id,
            scores=found.scores,
            order=[ranked.index for ranked in found.best()],
            model=found.model,
            model_hash=found.model_hash,
            usage=found.usage,
        )


class Enrich(AsyncUdf):
    """Any JSON object, with the features of its keys added under `features`.

    `keys` says which field holds which join key: {"user_id": "customer"}; by default a field of the
    same name.
    """

    def __init__(self, features: str, keys: Mapping[str, str] | None = None) -> None:
        self._name = features
        self._fields = dict(keys or {})

    async def open(self, ctx: Context) -> None:
        """Asks for the features."""
        self._table = ctx.features(self._name)

    async def call(self, request: dict[str, Any], ctx: CallContext) -> dict[str, Any]:
        """Raises RecordError `invalid` for a key of the wrong type."""
        fields = {name: self._fields.get(name, name) for name in self._table.join_keys}
        row = await self._table.get(**{name: request.get(field) for name, field in fields.items()})
        return {**request, "features": dict(row), "feature_age_s": row.age_s}
