"""What one shard keeps in Flink's state, as bytes: one map, so that a bundle's changes are one write.

PyFlink sends each changed state of each key as a message of its own and a bundle ends when all are
answered; with a map for each kind, these messages were what a record waited for longest. The first
byte of an entry's name says what it is:

    m                                            shards, maximum parallelism, epoch ms when last alive (if watched)
    f  sequence (8 bytes)                        a record in flight: epoch ms of its arrival, arrival
    a  digest (16)  payload hash (32)  expiry (8)  an answer that repeats are given: value, topic
    s  key (UTF-8)                               the key's `ctx.state`

Numbers are big-endian. Names alone tell which answers there are, what payload they belong to and when
they can go, so that a restore reads names only, and not the answers. Values are bytes of
`flink_llm.codec`.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from msgspec import Struct

from flink_llm import codec
from flink_llm.errors import StateError

META, IN_FLIGHT = b"m", b"f"
_DIGEST, _HASH = 16, 32


class ByteMap(Protocol):
    """A map in Flink state, or a dictionary of a test: `get` gives None for what is absent."""

    def get(self, key: bytes) -> bytes | None: ...
    def put(self, key: bytes, value: bytes) -> None: ...
    def remove(self, key: bytes) -> None: ...
    def keys(self) -> Iterable[bytes]: ...


class Remembered(Struct, frozen=True):
    """A request whose result answers repeats until `expiry`, in epoch ms."""

    digest: bytes
    payload_hash: bytes
    expiry: int

    @property
    def name(self) -> bytes:
        """Of its entry."""
        return b"a" + self.digest + self.payload_hash + self.expiry.to_bytes(8, "big")


class Kept:
    """The state of whichever shard Flink has set as its key."""

    def __init__(self, entries: ByteMap) -> None:
        self.entries = entries

    def names(self) -> tuple[list[int], list[Remembered], list[str], bool]:
        """Sequences in flight, remembered requests by expiry, keys with a state, whether there is a `meta`.

        Raises StateError for an entry of a kind that this version does not know.
        """
        flying, remembered, keys, meta = [], [], [], False
        for name in self.entries.keys():  # noqa: SIM118 — no dictionary
            kind = name[:1]
            if kind == b"f":
                flying.append(int.from_bytes(name[1:], "big"))
            elif kind == b"a":
                digest, rest = name[1 : 1 + _DIGEST], name[1 + _DIGEST :]
                remembered.append(Remembered(digest, rest[:_HASH], int.from_bytes(rest[_HASH:], "big")))
            elif kind == b"s":
                keys.append(name[1:].decode("utf-8", "surrogatepass"))
            elif name == META:
                meta = True
            else:
                raise StateError(f"state holds an entry {name[:32]!r} that this version of flink-llm does not know")
        return sorted(flying), sorted(remembered, key=lambda found: found.expiry), keys, meta

    def meta(self) -> list[Any]:
        """Shards and maximum parallelism as they were when the shard was first touched; when it was alive."""
        return list(self._unpacked(META))

    def set_meta(self, *numbers: int) -> None:
        """Written once, and again by a shard that says when it was alive."""
        self.entries.put(META, codec.pack(list(numbers)))

    def record(self, sequence: int) -> tuple[int, bytes]:
        """Epoch ms of its arrival, and the arrival."""
        arrived_ms, data = self._unpacked(_flying(sequence))[:2]
        return arrived_ms, data

    def add_record(self, sequence: int, arrived_ms: int, arrival: bytes) -> None:
        """A record is in flight."""
        self.entries.put(_flying(sequence), codec.pack_plain([arrived_ms, arrival]))

    def remove_record(self, sequence: int) -> None:
        """It is in flight no longer."""
        self.entries.remove(_flying(sequence))

    def answer(self, remembered: Remembered) -> tuple[bytes, str | None] | None:
        """Value and topic."""
        packed = self.entries.get(remembered.name)
        if packed is None:
            return None
        value, topic = codec.unpack(packed)[:2]
        return value, topic

    def add_answer(self, remembered: Remembered, value: bytes, topic: str | None) -> None:
        """What repeats are given."""
        self.entries.put(remembered.name, codec.pack_plain([value, topic]))

    def remove_answer(self, remembered: Remembered) -> None:
        """Repeats run again."""
        self.entries.remove(remembered.name)

    def state(self, key: str) -> bytes | None:
        """Of a key."""
        return self.entries.get(_state(key))

    def set_state(self, key: str, state: bytes) -> None:
        """Of a key."""
        self.entries.put(_state(key), state)

    def remove_state(self, key: str) -> None:
        """Of a key that has one no longer."""
        self.entries.remove(_state(key))

    def _unpacked(self, name: bytes) -> Any:
        packed = self.entries.get(name)
        if packed is None:
            raise StateError(f"state names an entry {name!r} and does not hold it")
        return codec.unpack(packed)


def _flying(sequence: int) -> bytes:
    return b"f" + sequence.to_bytes(8, "big")


def _state(key: str) -> bytes:
    return b"s" + key.encode("utf-8", "surrogatepass")
