"""A record on its way into the operator: what it was, where it came from, which shard it belongs to.

The user declares one `key` per stream. It decides the shard, whose turn a stateful call waits for,
whose order is kept, and within what a request id is answered once. A shard is a number from 0 to
`shards - 1`, chosen by SHA-256 because every side of a pipeline (Python, Java, SQL) has it.
"""

import hashlib
import heapq
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from flink_llm import codec
from flink_llm.errors import RecordError, StateError, told

KeySpec = str | Callable[[Any], Any]
_HEADER_LIMIT, _HEADER_VALUE_LIMIT = 16, 256
_TRACE_LIMITS = {"traceparent": 512, "tracestate": 512}
"""Characters of what a trace is followed by, which comes first: W3C Trace Context asks for 512 of `tracestate`."""


class Arrival(Struct, frozen=True, kw_only=True):
    """One record as it arrived.

    `key` is None when it could not be read; `key_error` then says why. A Kafka record has `value`
    (bytes, or None for a null), its place, headers, and `timestamp` in epoch milliseconds; an element
    of another stream has `element`, lowered to JSON types and registered records, and no place.
    """

    key: str | None = None
    key_error: str | None = None
    value: bytes | None = None
    element: Any = None
    from_kafka: bool = False
    kafka_key: bytes | None = None
    headers: Mapping[str, bytes | None] = {}
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    timestamp: int | None = None

    def to_bytes(self) -> bytes:
        """The bytes that Flink carries and keeps in state until the outcome is emitted."""
        values = list(msgspec.structs.astuple(self))
        return codec.pack_plain(values) if self.from_kafka else codec.pack(values)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Arrival":
        """Raises StateError for bytes of an unknown version."""
        values = codec.unpack(data)
        if not isinstance(values, list):
            raise StateError("state holds no arrival where one belongs")
        return cls(**dict(zip(cls.__struct_fields__, values, strict=False)))

    def request(self, as_type: Any) -> Any:
        """The record as the handler takes it. Raises RecordError: null, malformed, invalid, bad key."""
        if self.from_kafka:
            if as_type is bytes:
                if self.value is None:
                    codec.decode(None)
                request: Any = self.value
            else:
                request = codec.decode(self.value, as_type)
        elif isinstance(self.element, (bytes, str)) and as_type not in (Any, str, bytes):
            data = self.element.encode() if isinstance(self.element, str) else self.element
            request = codec.decode(data, as_type)
        elif self.element is None and self.key is None:  # what it was could not even be carried here
            raise RecordError("invalid", self.key_error or "the record is empty")
        else:
            request = codec.convert(self.element, as_type)
        if self.key is None:
            raise RecordError("bad_key", self.key_error or "the key of the record cannot be read")
        return request

    def payload(self) -> bytes:
        """The bytes that decide whether two records are the same request."""
        if self.from_kafka:
            return self.value or b""
        return self.element if isinstance(self.element, bytes) else codec.pack(self.element)

    def short_headers(self) -> dict[str, str]:
        """The headers as text for a failure record: 16 of them at most, 256 characters each.

        A trace's are among them, whole to 512 characters.
        """
        items = sorted(self.headers.items(), key=lambda item: item[0] not in _TRACE_LIMITS)[:_HEADER_LIMIT]
        return {codec.printable(name, _HEADER_VALUE_LIMIT): _short(name, value or b"") for name, value in items}

    @property
    def envelope_bytes(self) -> int:
        """What key and headers add to the size of every outcome."""
        headers = sum(len(name.encode("utf-8", "replace")) + len(value or b"") for name, value in self.headers.items())
        return headers + len((self.key or "").encode("utf-8", "replace"))

    @property
    def place(self) -> str:
        """Where the record is from, the same after every restart; what it is keyed by without a key."""
        if self.topic is not None:
            return f"{self.topic}/{self.partition}/{self.offset}"
        return hashlib.sha256(self.payload()).hexdigest()


def shard_of(key: str, shards: int) -> int:
    """The shard of a key: the first four bytes of its SHA-256, modulo `shards`."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:4], "big") % shards


class EventTimes:
    """The timestamps of the records in flight in one subtask. No watermark may overtake the oldest."""

    def __init__(self) -> None:
        self._in_flight: list[int] = []
        self._gone: list[int] = []

    def add(self, timestamp: int | None) -> None:
        """A record has arrived."""
        if timestamp is not None:
            heapq.heappush(self._in_flight, timestamp)

    def remove(self, timestamp: int | None) -> None:
        """Its outcome has been emitted."""
        if timestamp is not None:
            heapq.heappush(self._gone, timestamp)

    def oldest(self) -> int | None:
        """The smallest timestamp in flight, None without any."""
        while self._gone and self._gone[0] == self._in_flight[0]:
            heapq.heappop(self._gone)
            heapq.heappop(self._in_flight)
        return self._in_flight[0] if self._in_flight else None


class Keyer:
    """Reads the key of an element. Built once per worker from what the user declared."""

    def __init__(self, key: KeySpec, as_type: Any) -> None:
        self._key = key
        self._as_type = as_type
        if isinstance(key, str):
            self._probe = _probe(key)

    def arrive(self, arrival: Arrival) -> tuple[str, Arrival]:
        """What to shard by, and the arrival with its key, or with the reason why it has none."""
        if arrival.key_error is not None:
            return arrival.place, arrival
        try:
            key = _canonical(self._read(arrival))
        except (Exception, SystemExit) as error:  # the user's key function may raise anything: it is the record's fault
            reason = codec.printable(f"the key of the record cannot be read: {told(error)}", 500)
            return arrival.place, msgspec.structs.replace(arrival, key_error=reason)
        return key, msgspec.structs.replace(arrival, key=key)

    def _read(self, arrival: Arrival) -> Any:
        if not isinstance(self._key, str):
            return self._key(msgspec.structs.replace(arrival, key="").request(self._as_type))
        value = arrival.value if arrival.from_kafka else arrival.element
        if isinstance(value, (bytes, str)):
            found = self._probe.decode(value)
            key = found.get(self._key) if isinstance(found, dict) else found.key
        else:
            key = value.get(self._key) if isinstance(value, dict) else getattr(value, self._key)
        if key is None:
            raise LookupError(f"it has no field {self._key!r}, or null there")
        return key


def _probe(key: str) -> "msgspec.json.Decoder[Any]":
    """Reads an object for the field of that name: it alone, unless msgspec knows no field of such a name."""
    try:
        return msgspec.json.Decoder(msgspec.defstruct("Probe", [("key", Any, None)], rename={"key": key}))
    except ValueError:  # it has a quote, a backslash or a control character
        return msgspec.json.Decoder(dict[str, Any])


def _canonical(key: Any) -> str:
    if isinstance(key, bool) or not isinstance(key, (str, int, bytes)):
        raise TypeError(f"a key is a string, an integer or bytes, not {type(key).__name__}")
    if isinstance(key, str):
        key = key.encode("utf-8", "surrogatepass")
    return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else str(key)


def _short(name: str, value: bytes) -> str:
    limit = _TRACE_LIMITS.get(name, _HEADER_VALUE_LIMIT)
    return codec.printable(value[: 4 * limit].decode("utf-8", "replace"), limit)
