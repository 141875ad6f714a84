"""One record while it is in flight: its request, its turn, its clock, its outcome."""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from flink_llm import codec
from flink_llm.arrivals import Arrival
from flink_llm.errors import RecordError

if TYPE_CHECKING:
    from flink_llm.shard import Shard

UNSENT_PARTIALS_LIMIT = 1000
"""How many partials of one call may wait for their emission before `ctx.emit` waits."""

DIGEST_BYTES = 16


class OperatorSettings(Struct, frozen=True, kw_only=True):
    """How one operator runs its handler.

    `capacity`: places per subtask. `deadline`: seconds from arrival, None for none. `remember_s`: how
    long a result answers repeats of its request id, 0 for not at all. `reply_topics`: where `reply_to`
    may point. `max_result_bytes`: the largest value a result topic takes.
    """

    job: str = "flink-llm"
    operator: str = "handler"
    capacity: int = 256
    deadline: float | None = 60.0
    ordered: bool = False
    on_outage: Literal["wait", "deadline"] = "wait"
    remember_s: float = 600.0
    reply_topics: list[str] = []
    max_result_bytes: int = 1_000_000
    keep_payload: bool = False
    shards: int = 16
    max_parallelism: int = 128


class Result(Struct, frozen=True):
    """What a call came to. `state` is the key's new state, None where it did not change."""

    value: bytes
    topic: str | None
    state: bytes | None = None


class Failed(Struct, frozen=True):
    """Why a call has no result; `code` is one of `errors.CODES`."""

    code: str
    message: str
    generation_id: str | None = None


Outcome = Result | Failed


class Call:
    """The runner's and the shard's view of one record. A `CallPort` for the handler's `ctx`.

    `sequence` orders the arrivals of a shard and names the record in state. `identity` is
    (shard, digest of key and request id), None for a record without a request id. Set by the main
    thread before the call is submitted, changed by the loop thread until `ended`, read by the main
    thread afterwards.
    """

    __slots__ = (
        "arrival", "attempt", "clock", "committed_state", "ended", "expires_at", "flow", "identity",
        "info", "key", "new_state", "outcome", "payload_hash", "repeats", "reply_to", "request",
        "request_id", "sequence", "shard", "started_at", "task", "timestamp", "unsent",
    )  # fmt: skip

    def __init__(self, shard: "Shard", sequence: int, arrival: Arrival, request: Any) -> None:
        self.shard = shard
        self.sequence = sequence
        self.arrival = arrival
        self.request = request
        self.key: str = arrival.key or ""
        self.timestamp = arrival.timestamp
        self.request_id = _request_id(request)
        self.reply_to: str | None = _field(request, "reply_to", str)
        self.payload_hash = hashlib.sha256(arrival.payload()).digest()
        self.identity: tuple[int, bytes] | None = None
        if self.request_id is not None:
            self.identity = (shard.number, digest_of(self.key, self.request_id))
        self.attempt = 0
        self.unsent = 0
        self.ended = False
        self.started_at = 0.0
        self.expires_at: float | None = None
        self.clock: Callable[[], float] = lambda: 0.0
        self.committed_state: bytes | None = None
        self.new_state: bytes | None = None
        self.outcome: Outcome | None = None
        self.repeats: list[Call] = []
        self.task: asyncio.Task[None] | None = None
        self.flow: asyncio.Event | None = None
        self.info: Any = None

    @property
    def headers(self) -> Mapping[str, bytes | None]:
        """The record's Kafka headers."""
        return self.arrival.headers

    def remaining(self) -> float | None:
        """Seconds until the deadline; the clock stands still during outages."""
        return None if self.expires_at is None else max(0.0, self.expires_at - self.clock())

    async def emit(self, partial: Any) -> None:
        """See `CallContext.emit`."""
        if self.ended:
            raise RuntimeError("ctx.emit after the call has ended")
        try:
            value = partial if isinstance(partial, bytes) else codec.encode(partial)
        except (TypeError, msgspec.EncodeError) as error:
            raise RecordError("bad_result", f"a partial cannot be encoded: {error}") from error
        self.unsent += 1
        self.shard.events.append((self, value))
        if self.unsent > UNSENT_PARTIALS_LIMIT:
            self.flow = asyncio.Event()
            self.shard.runner.stalled(+1)
            try:
                await self.flow.wait()
            finally:
                self.shard.runner.stalled(-1)
                self.flow = None

    def wanted_deadline(self, default: float | None, now_ms: float) -> float | None:
        """Seconds this record may take: its own field, else the job's; a header holds an absolute one.

        The header is `deadline-ms`, epoch milliseconds as decimal digits; an unreadable one is
        `invalid`. Raises RecordError.
        """
        own = _field(self.request, "deadline", (int, float))
        header = self.headers.get("deadline-ms")
        if header is None:
            return own if own is not None else default
        try:
            return max(0.0, (float(header) - now_ms) / 1000)
        except ValueError as error:
            raise RecordError("invalid", "the header deadline-ms is not a number of milliseconds") from error


class Lane:
    """The calls of one key, where turns or order matter. Lives on the loop thread."""

    __slots__ = ("order", "running", "state", "waiting")

    def __init__(self, state: bytes | None) -> None:
        self.state = state
        self.running: Call | None = None
        self.waiting: deque[Call] = deque()
        self.order: deque[Call] = deque()


def digest_of(key: str, request_id: str) -> bytes:
    """What a request is remembered by: 16 bytes of the SHA-256 of key and request id."""
    text = f"{len(key)}:{key}{request_id}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).digest()[:DIGEST_BYTES]


def _field(request: Any, name: str, types: Any) -> Any:
    value = request.get(name) if isinstance(request, dict) else getattr(request, name, None)
    return value if isinstance(value, types) and not isinstance(value, bool) else None


def _request_id(request: Any) -> str | None:
    value = _field(request, "request_id", (str, int))
    return None if value is None else str(value)
