"""The one protocol between a client and whatever generates for it, in process or over a socket.

A frame is a 4-byte big-endian length and a msgpack map. The first frame of a connection is `Hello`,
its answer `Welcome` or `Fault`; then the client sends `Load`, `Submit`, `Cancel` and `Ping`, the host
`Loaded`, `Tokens`, `Done`, `Fault` and `Pong`. `call` is a number the client chooses, unique on its
connection; every answer names it. The protocol and package versions are part of the socket's name, so
two versions never meet except by mistake, which the handshake refuses.

Frozen: fields may be added with a default, never renamed, removed or given another meaning without
raising `PROTOCOL_VERSION`.
"""

import struct
from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

from flink_llm.errors import ProtocolError
from flink_llm.records import Logprob

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
WorkKind = Literal["generate", "embed", "classify", "tag", "rerank"]


class Options(Struct, frozen=True, kw_only=True):
    """How to generate. `temperature` 0 is greedy; `seed` decides every draw; `stop` are strings.

    At most one of `json_schema` (JSON text), `regex` and `choices` says what the text must be; empty says
    nothing. `logit_bias` are token ids, rising, each with what is added to its logit. `logprobs` tokens of
    each position are reported with their log-probabilities beside the chosen one; None reports none.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = []
    json_schema: str = ""
    regex: str = ""
    choices: list[str] = []
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    logprobs: int | None = None


class Hello(Struct, frozen=True, tag="hello", kw_only=True):
    """First frame of a client."""

    protocol: int
    package: str
    client: str


class Load(Struct, frozen=True, tag="load", kw_only=True):
    """Make the model in `folder` ready; `sha256` (of its manifest) must match when given.

    `folder` may be a deployment file, whose model is known by `deployment.deployment_id` instead.
    """

    call: int
    folder: str
    sha256: str | None = None


class Submit(Struct, frozen=True, tag="submit", kw_only=True):
    """One piece of work for the model whose hash is `model`.

    `work` identifies it for re-attachment: while a generation of that `work` is alive its events are
    sent again from sequence 0, and a finished one is answered from memory. `kind` "generate" takes
    `messages` (with `features`) or `prompt`; "embed", "classify" and "tag" take `text`; "rerank" takes a
    query, `text`, and `documents`. `dimensions`: how many of an embedding's are wanted, None for all.
    `adapter`: the LoRA adapter of the model that generates, "" for none. `told_every`: for how many seconds of a
    reply its text may be told together, where nobody reads it as it comes; 0 for each token at once.
    `priority` 0 is served first, 9 last. `deadline`: in how many seconds the client will cancel, as far as
    it knows now, None for never. It is a hint for who is to run and who had better be refused, and ends
    nothing: the client's clock may stand still, and somebody else may have come to listen.
    """

    call: int
    model: str
    kind: WorkKind
    work: str
    request_id: str
    messages: list[dict[str, str]] | None = None
    features: dict[str, Any] | None = None
    prompt: str | None = None
    text: str | None = None
    options: Options = Options()
    deadline: float | None = None
    priority: int = 5
    documents: list[str] = []
    dimensions: int | None = None
    adapter: str = ""
    told_every: float = 0.0


class Cancel(Struct, frozen=True, tag="cancel", kw_only=True):
    """Stop the work of `call` at the next step; no more events of it follow."""

    call: int


class Ping(Struct, frozen=True, tag="ping", kw_only=True):
    """Is the host alive? Answered at once by `Pong`, whatever the models do."""

    call: int


class Welcome(Struct, frozen=True, tag="welcome", kw_only=True):
    """The host's answer to `Hello`."""

    protocol: int
    package: str
    pid: int
    device: str


class Loaded(Struct, frozen=True, tag="loaded", kw_only=True):
    """The model is ready. `sha256` is that of its manifest, `kind` and `context_length` from it.

    A deployment's `sha256` is its id, its `context_length` the least of its versions'.
    """

    call: int
    name: str
    sha256: str
    kind: str
    context_length: int
    labels: list[str] = []


class Tokens(Struct, frozen=True, tag="tokens", kw_only=True):
    """The next piece of text of a generation; `sequence` counts from 0 without gaps.

    The first of a deployment's names the manifest's hash of the version that speaks in `model`: whoever
    leaves before the end has heard it.
    """

    call: int
    generation: str
    sequence: int
    text: str
    model: str = ""


class Entity(Struct, frozen=True):
    """What a text names: its characters [start, end), its label, and the probability of that, 0 to 1."""

    label: str
    score: float
    start: int
    end: int


class Done(Struct, frozen=True, tag="done", kw_only=True):
    """The end of a piece of work.

    A generation: `text` whole, `finish`, token counts, milliseconds, `logprobs` where asked for. An
    embedding: `vector` as little-endian float32. A classification: `scores` in the order of the model's
    labels. A ranking: `scores` in the order of the documents. A tagging: `entities` in the order of the text.
    `model` is the hash of the manifest of the model that answered, "" where an engine does not say.
    """

    call: int
    generation: str = ""
    text: str = ""
    finish: FinishReason = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_ms: float = 0.0
    first_token_ms: float = 0.0
    per_token_ms: float = 0.0
    vector: bytes = b""
    scores: list[float] = []
    logprobs: list[Logprob] = []
    entities: list[Entity] = []
    model: str = ""


class Fault(Struct, frozen=True, tag="fault", kw_only=True):
    """A piece of work, or a handshake, that failed.

    `kind` says whose fault: "record" (`code` is a failure code), "overloaded" (`retry_after` seconds),
    "outage" (the host's: try again), "model_folder", "protocol".
    """

    call: int
    kind: Literal["record", "overloaded", "outage", "model_folder", "protocol"]
    code: str
    message: str
    retry_after: float = 0.0


class Pong(Struct, frozen=True, tag="pong", kw_only=True):
    """Alive."""

    call: int


ToHost = Hello | Load | Submit | Cancel | Ping
ToClient = Welcome | Loaded | Tokens | Done | Fault | Pong
Event = Tokens | Done | Fault


class EventStream(Protocol):
    """The events of one piece of work: an iterator that can be left, and be ended from outside."""

    def __aiter__(self) -> AsyncIterator[Event]: ...
    def end(self) -> None:
        """Ends the iteration now."""

    def close(self) -> None:
        """Cancels the work, unless somebody else listens to it."""

    async def aclose(self) -> None:
        """As `close`."""


_encoder = msgspec.msgpack.Encoder()
_host_decoder: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost)
_client_decoder: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)


class Engine(Protocol):
    """What generates: the engine in process, a host behind a socket, a remote server.

    All methods are called on one asyncio loop.
    """

    async def load(self, folder: str, sha256: str | None = None) -> Loaded:
        """Makes a model ready. Raises ModelFolderError, Outage."""

    def submit(self, work: Submit) -> EventStream:
        """Events of the work, ending after one `Done` or `Fault`. Closing the iterator cancels it.

        `work.call` is given by the engine. Raises Outage when the engine is lost meanwhile.
        """

    async def close(self) -> None:
        """Lets go of the engine; calls in flight end in Outage.

        An engine in this process stops with it. A host goes on with its work for a while, so that a job
        that is restarted finds it again.
        """


def frame(message: ToHost | ToClient) -> bytes:
    """One message as it goes over the socket. Raises ProtocolError above `MAX_FRAME_BYTES`."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(body)} bytes is above the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages: feed it what arrives, take what is whole."""

    def __init__(self, side: Literal["host", "client"]) -> None:
        self._buffer = bytearray()
        self._decoder: msgspec.msgpack.Decoder[Any] = _host_decoder if side == "host" else _client_decoder

    def feed(self, data: bytes) -> list[Any]:
        """Messages completed by `data`. Raises ProtocolError for garbage; the peer is then to be dropped."""
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes is above the limit of {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            try:
                messages.append(self._decoder.decode(bytes(buffer[start + _LENGTH.size : end])))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ProtocolError(f"not a message of protocol {PROTOCOL_VERSION}: {error}") from error
            start = end
        del buffer[:start]
        return messages
