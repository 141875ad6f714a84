"""What a feature table is made of: its keys, and the rows found for them. No Feast, no I/O."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from flink_llm.errors import ConfigError, RecordError

Key = tuple[str | int | bytes, ...]
"""The values of one row's join keys, in the order and of the types that the view declares."""

_DIGITS = re.compile(r"-?[0-9]{1,19}")


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise TypeError
    value.encode()
    return value


def _number(bits: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, str) and _DIGITS.fullmatch(value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError
        if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise ValueError
        return value

    return convert


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError
    return value


_CONVERTERS: dict[str, Callable[[Any], str | int | bytes]] = {
    "string_val": _text,
    "int64_val": _number(64),
    "int32_val": _number(32),
    "bytes_val": _bytes,
}
_ABSENT: dict[str, str | int | bytes] = {
    "string_val": "flink-llm probe",
    "int64_val": -(2**63),
    "int32_val": -(2**31),
    "bytes_val": b"flink-llm probe",
}


def _shown(value: Any) -> str:
    """Type and beginning of what may be anything: `str` itself refuses an int of more than 4,300 digits."""
    try:
        return f"{type(value).__name__} {str(value)[:40]!a}"
    except Exception:
        return type(value).__name__


class KeyField(NamedTuple):
    """A join key: its name in the view, and which field of Feast's value it fills."""

    name: str
    kind: str

    def convert(self, value: Any) -> str | int | bytes:
        """`value` as this key's type; an int is taken for a text and digits for a number.

        Raises RecordError `invalid`.
        """
        try:
            return _CONVERTERS[self.kind](value)
        except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
            wanted = self.kind.removesuffix("_val").upper()
            raise RecordError("invalid", f"the key {self.name} must be {wanted}, got {_shown(value)}") from error


def key_field(name: str, value_type: str) -> KeyField:
    """The field for a Feast value type's name, for example "INT64"."""
    return KeyField(name, f"{value_type.lower()}_val")


def absent_key(fields: Iterable[KeyField]) -> Key:
    """A key that no row has: whether it can be read says how the store is, and nothing of any row."""
    return tuple(_ABSENT[field.kind] for field in fields)


class StoredRow(NamedTuple):
    """A row as it was read: None for an absent one. In epoch seconds, if known: `at` is its event time, after
    `expires` it is too old."""

    values: dict[str, Any] | None
    at: float | None
    expires: float | None = None


class Part(NamedTuple):
    """What a table takes of one view. `keys` pairs the name that callers use with the view's key.

    `max_age_s` is for people: a row says itself when it `expires`.
    """

    label: str
    source: str
    keys: tuple[tuple[str, KeyField], ...]
    features: tuple[str, ...]
    max_age_s: float | None


class TableSpec(NamedTuple):
    """A table's parts, and the names of all its keys in order."""

    name: str
    parts: tuple[Part, ...]
    keys: tuple[str, ...]

    @classmethod
    def of(cls, name: str, parts: Sequence[Part]) -> "TableSpec":
        """Raises ConfigError for two features of one name or one named like a key, or a key of a type that none can
        have."""
        owner: dict[str, str] = {}
        keys: dict[str, None] = {}
        for part in parts:
            for given, field in part.keys:
                keys[given] = None
                if field.kind not in _CONVERTERS:
                    kind = field.kind.removesuffix("_val").upper()
                    raise ConfigError(
                        f"{name}: the key {given} is of type {kind}; it must be STRING, INT32, INT64 or BYTES"
                    )
            for feature in part.features:
                if owner.setdefault(feature, part.label) != part.label:
                    raise ConfigError(
                        f"{name}: the feature {feature} comes from {owner[feature]} and from {part.label}; "
                        "leave one of them out of the service"
                    )
        for feature in owner.keys() & keys.keys():
            raise ConfigError(
                f"{name}: the feature {feature} of {owner[feature]} is named like a key; "
                "rename it or leave it out of the service"
            )
        return cls(name, tuple(parts), tuple(keys))
