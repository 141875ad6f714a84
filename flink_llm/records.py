"""The records of each topic: frozen values with an explicit schema.

A field that a record's type does not name is kept in `unknown_fields` and written back out, so a
newer producer loses nothing by an older job. Adding a field with a default is compatible, removing
or renaming one is not; docs/records.md is the public reference.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "deadline", "cancelled"]
Id = Annotated[str, Meta(min_length=1, max_length=256)]

TokenId = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
"""A token's number as the name of a JSON field."""


class Record(Struct, frozen=True, kw_only=True):
    """Base of all records. `unknown_fields` holds what the sender wrote beyond the schema."""

    unknown_fields: dict[str, Any] = {}


class Message(Struct, frozen=True):
    """One turn of a conversation. `content` is plain text: special tokens in it are text."""

    role: Role
    content: str


class Request(Record, frozen=True, kw_only=True):
    """What all requests have.

    `deadline` is in seconds from the record's arrival at the operator. `priority` 0 is served first, 9
    last. `entities` are join keys for features (for example `{"order_id": "1042"}`). `reply_to` names the
    topic of the response, out of the job's configured list.
    """

    request_id: Id
    user_id: Id | None = None
    entities: dict[str, str | int] = {}
    model: Id | None = None
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    deadline: Annotated[float, Meta(gt=0, le=3600)] | None = None
    reply_to: Id | None = None


class ChatRequest(Request, frozen=True, kw_only=True):
    """What a client asks on `chat.requests`.

    `session_id` is the record's key: one conversation, in turn. `seed` defaults to a hash of the request
    id. At most one of `json_schema`, `regex` and `choices` says what the reply must be. `adapter` names one
    of the model's LoRA adapters, "" none, whatever the job's default is. The other options are those of
    `flink_llm.engine.options.Choices`.
    """

    session_id: Id
    messages: Annotated[list[Message], Meta(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Meta(ge=1, le=32_768)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**53)] | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=8)] = []
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    json_schema: dict[str, Any] | None = None
    regex: Annotated[str, Meta(min_length=1)] | None = None
    choices: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)] | None = None
    adapter: Annotated[str, Meta(max_length=256)] | None = None


class TokenRecord(Record, frozen=True, kw_only=True):
    """A piece of a reply on `chat.tokens`, at least once.

    A reader keeps the pieces whose `generation_id` is the one its response names, orders them by
    `sequence` (from 0, without gaps) and drops repeats: their texts joined are the response's
    generated text.
    """

    request_id: str
    generation_id: str
    sequence: int
    text: str


def reply_text(pieces: Iterable[TokenRecord], generation_id: str) -> str:
    """The text that a generation's pieces make, whatever else was read, in whatever order, however often.

    Raises ValueError where one is not there yet: a reader that has the response then reads on.
    """
    texts = {piece.sequence: piece.text for piece in pieces if piece.generation_id == generation_id}
    missing = sorted(set(range(max(texts, default=-1) + 1)) - texts.keys())
    if missing:
        raise ValueError(f"generation {generation_id}: piece {missing[0]} was not read yet")
    return "".join(texts[sequence] for sequence in sorted(texts))


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Timings(Struct, frozen=True, kw_only=True):
    """Milliseconds: waiting in the host, to the first token, per further token, in the operator."""

    queue_ms: float = 0.0
    first_token_ms: float = 0.0
    per_token_ms: float = 0.0
    total_ms: float = 0.0


class Logprob(Struct, frozen=True, kw_only=True):
    """A token, its text, and the natural logarithm of the probability that the model gave it.

    `top` are the likeliest tokens in its place, falling; theirs is empty.
    """

    id: int
    text: str
    logprob: float
    top: list["Logprob"] = []


class ChatResponse(Record, frozen=True, kw_only=True):
    """The answer on `chat.responses`.

    `text` is what a user is shown; `masked` names what a filter has replaced in it ("email",
    "card"), and is empty when `text` is the generated text, without space at its ends. `features` are the values the
    prompt was grounded in, `feature_age_s` the age in seconds of the oldest of them. `logprobs` has a
    `Logprob` for each generated token where the request asked for them and nothing was masked.
    """

    request_id: str
    session_id: str
    text: str
    finish_reason: FinishReason
    model: str
    model_hash: str
    generation_id: str
    usage: Usage = Usage()
    timings: Timings = Timings()
    features: dict[str, Any] = {}
    feature_age_s: float | None = None
    masked: list[str] = []
    logprobs: list[Logprob] = []


class EmbedRequest(Request, frozen=True, kw_only=True):
    """A text to embed, classify or tag."""

    text: str


class EmbedResponse(Record, frozen=True, kw_only=True):
    """`vector` has the model's dimension, float32."""

    request_id: str
    vector: list[float]
    model: str
    model_hash: str
    usage: Usage = Usage()


class ClassifyResponse(Record, frozen=True, kw_only=True):
    """The best label and the probability of every label (they sum to 1)."""

    request_id: str
    label: str
    scores: dict[str, float]
    model: str
    model_hash: str
    usage: Usage = Usage()


class EntityRecord(Struct, frozen=True, kw_only=True):
    """What a text names: `text`, which are its characters [start, end) there; `score` is a probability."""

    label: str
    score: float
    start: int
    end: int
    text: str


class TagResponse(Record, frozen=True, kw_only=True):
    """The entities of a text, in its order."""

    request_id: str
    entities: list[EntityRecord]
    model: str
    model_hash: str
    usage: Usage = Usage()


class RerankRequest(Request, frozen=True, kw_only=True):
    """A query, and documents to order by how well they answer it."""

    query: str
    documents: list[str]


class RerankResponse(Record, frozen=True, kw_only=True):
    """`scores` in the order of the documents, 0 to 1; `order` their places, the best first."""

    request_id: str
    scores: list[float]
    order: list[int]
    model: str
    model_hash: str
    usage: Usage = Usage()


class Failure(Record, frozen=True, kw_only=True):
    """Why a record has no result, and where its original is: enough to read and send it again.

    The payload itself is left out unless the job is told to keep it; `payload_sha256` is its hash,
    None where the record was a table's row.
    `code` is one of `flink_llm.errors.CODES`; `failed_at` is in epoch milliseconds.
    """

    code: str
    message: str
    key: str | None
    request_id: str | None
    topic: str | None
    partition: int | None
    offset: int | None
    handler: str
    failed_at: int
    headers: dict[str, str] = {}
    generation_id: str | None = None
    payload_sha256: str | None = None
    payload: str | None = None


def fields_of(record_type: type) -> frozenset[str]:
    """Names of the schema's own fields, as they stand on the wire."""
    return frozenset(f.encode_name for f in msgspec.structs.fields(record_type)) - {"unknown_fields"}
