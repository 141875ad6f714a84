"""One record while it is in flight: its request, its turn, its clock, its outcome."""

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from flink_llm import codec
from flink_llm.arrivals import Arrival
from flink_llm.errors import RecordError
from flink_llm.telemetry_settings import TelemetrySettings
from flink_llm.watching import NOBODY

if TYPE_CHECKING:
    from flink_llm.shard import Shard

UNSENT_PARTIALS_LIMIT = 1000
"""How many partials of one call may wait for their emission before `ctx.emit` waits."""
FLOW_S = 0.005
"""How often a waiting `ctx.emit` looks again: partials leave with the operator's timer, which is as fast."""

DEADLINE_HEADER = "deadline-ms"
"""An absolute deadline. It is this record's alone: no outcome carries it on."""

DIGEST_BYTES = 16
DEFAULT_PRIORITY = 5
EMPTY_STATE = codec.pack({})


class OperatorSettings(Struct, frozen=True, kw_only=True):
    """How one operator runs its handler.

    `capacity`: calls at a time, per subtask; an eighth more is read ahead. `deadline`: seconds from
    arrival, None for none. `retries`: how often a call is tried again that raised `Retriable`.
    `remember_s`: how long a result answers repeats of its request id, 0 for not at all. `reply_topics`:
    where `reply_to` may point. `max_result_bytes`: the largest record, key and headers included, that
    goes out. `shed`: whether a record is refused at its arrival whose deadline, counted from Kafka's
    timestamp, cannot be met.
    """

    job: str = "flink-llm"
    operator: str = "handler"
    capacity: int = 256
    deadline: float | None = 60.0
    ordered: bool = False
    on_outage: Literal["wait", "deadline"] = "wait"
    retries: int = 4
    shed: bool = False
    remember_s: float = 600.0
    reply_topics: list[str] = []
    max_result_bytes: int = 1_000_000
    keep_payload: bool = False
    shards: int = 16
    max_parallelism: int = 128
    telemetry: TelemetrySettings = TelemetrySettings()


class Result(Struct, frozen=True):
    """What a call came to. `state` is the key's new state, None where it did not change."""

    value: bytes
    topic: str | None
    state: bytes | None = None

    def again(self) -> "Result":
        """The same answer for a repeat, which changes no state."""
        return Result(self.value, self.topic)


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
        "admitted", "arrival", "arrived_ms", "attempt", "clock", "committed_state", "emitted", "ended", "expires_at",
        "identity", "info", "key", "outcome", "priority", "rank", "repeats", "reply_to",
        "request", "request_id", "restored", "retried", "sent", "sequence", "shard", "task", "timestamp", "tried_at",
        "watch",
    )  # fmt: skip

    def __init__(self, shard: "Shard", sequence: int, arrival: Arrival, request: Any, arrived_ms: int) -> None:
        self.shard = shard
        self.arrived_ms = arrived_ms
        self.restored = False
        self.sequence = sequence
        self.arrival = arrival
        self.request = request
        self.key: str = arrival.key or ""
        self.timestamp = arrival.timestamp
        self.request_id = _request_id(request)
        self.reply_to: str | None = _field(request, "reply_to", str)
        priority = _field(request, "priority", int)
        self.priority: int = DEFAULT_PRIORITY if priority is None else max(0, min(priority, 9))
        self.identity: tuple[int, bytes] | None = None
        if self.request_id is not None:
            self.identity = (shard.number, digest_of(self.key, self.request_id))
        self.attempt = 0  # tries that failed, of which `retried` the handler called worth another
        self.retried = 0
        self.tried_at: float | None = None  # the last try
        self.emitted = 0  # counted by the loop thread alone, `sent` by Flink's alone
        self.sent = 0
        self.admitted: tuple[int, float, float] | None = None  # ahead of it then, seconds left, when
        self.rank: float | None = None  # among those in flight
        self.ended = False
        self.expires_at: float | None = None
        self.clock: Callable[[], float] = lambda: 0.0
        self.committed_state: bytes | None = None
        self.outcome: Outcome | None = None
        self.repeats: list[Call] = []
        self.task: asyncio.Task[None] | None = None
        self.info: Any = None
        self.watch = NOBODY

    @property
    def payload_hash(self) -> bytes:
        """Of the bytes that decide whether a repeat is one."""
        return hashlib.sha256(self.arrival.payload()).digest()

    @property
    def generation_id(self) -> str | None:
        """That of its latest generation, None where there was none."""
        return (self.info.last_generation or None) if self.info is not None else None

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
        value = self.encoded(partial, "a partial")
        self.emitted += 1
        self.shard.events.append((self, value))
        if self.emitted - self.sent <= UNSENT_PARTIALS_LIMIT:
            return
        self.shard.runner.places.lend(+1)
        try:
            while self.emitted - self.sent > UNSENT_PARTIALS_LIMIT:  # noqa: ASYNC110 — another thread counts
                await asyncio.sleep(FLOW_S)
        finally:
            self.shard.runner.places.lend(-1)

    def encoded(self, value: Any, what: str) -> bytes:
        """`value` as its topic takes it. Raises RecordError: `bad_result`, `result_too_large`."""
        try:
            data = value if isinstance(value, bytes) else codec.encode(value)
        except TypeError as error:
            raise RecordError("bad_result", f"{what} cannot be encoded: {error}") from error
        self.check_size(len(data), what)
        return data

    def check_size(self, value_bytes: int, what: str) -> None:
        """Raises RecordError `result_too_large`."""
        size, limit = value_bytes + self.arrival.envelope_bytes, self.shard.runner.settings.max_result_bytes
        if size > limit:
            raise RecordError(
                "result_too_large", f"{what} has {size} bytes with its key and headers, its topic takes {limit}"
            )

    def time_left(self, default: float | None, now_ms: float, *, since_ms: float | None) -> float | None:
        """Seconds this record may still take: its own field, else the job's, from `since_ms`, None being now.

        The header `deadline-ms` (epoch milliseconds, decimal digits) holds an absolute deadline, and goes
        before both. Raises RecordError `invalid` for an unreadable one.
        """
        own = _field(self.request, "deadline", (int, float))
        header = self.headers.get(DEADLINE_HEADER)
        try:
            if header is None:
                limit = default if own is None else float(own)
                if limit is not None and since_ms is not None:
                    limit -= max(0.0, (now_ms - since_ms) / 1000)
            else:
                limit = (float(header) - now_ms) / 1000
        except (ValueError, OverflowError) as error:
            raise RecordError("invalid", "the deadline is not a number") from error
        if limit is not None and not math.isfinite(limit):
            raise RecordError("invalid", "the deadline is not a finite number")
        return None if limit is None else max(0.0, limit)


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
