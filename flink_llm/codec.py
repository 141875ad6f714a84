"""Bytes to values and back: JSON on the wire, and the versioned bytes of Flink state.

On the wire a broken value is a `RecordError` that names the path and what was expected. In state
every value is one version byte and a msgpack body holding JSON types, bytes and registered records
only, so that a savepoint outlives the classes of the release that wrote it.
"""

import copyreg
import dataclasses
import typing
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from flink_llm.errors import RecordError, StateError
from flink_llm.records import Message, Record, fields_of

T = TypeVar("T")
Upgrade = Callable[[dict[str, Any], int], dict[str, Any]]

STATE_VERSION = 1
_VERSION = bytes([STATE_VERSION])
_RECORD_EXT = 1
# Else the fields of a dataclass that goes to the workers by value are none there: what marks them is another object.
copyreg.pickle(type(dataclasses._FIELD), lambda mark: (getattr, (dataclasses, mark.name)))  # type: ignore[attr-defined]
_to_json = msgspec.json.Encoder(decimal_format="string")


def decode(data: bytes | None, as_type: Any = Any) -> Any:
    """One JSON value as `as_type`: with all unknown fields of a Record, all digits of a Decimal elsewhere.

    Raises RecordError: `null_value`, `malformed` (no JSON, no UTF-8) or `invalid` (path and
    expected type in the message).
    """
    if data is None:
        raise RecordError("null_value", "the record has no value")
    if as_type is Any or (isinstance(as_type, type) and issubclass(as_type, Record)):
        return convert(_parsed(data), as_type)
    try:
        if not data.isascii():
            data.decode()  # what a type skips, msgspec does not look at
        return _decoder(as_type).decode(data)
    except Exception as error:  # a type's own __post_init__ may raise anything: it is the record's fault
        _parsed(data)  # what is no JSON at all is not `invalid`
        raise _misfit(error) from error


def _parsed(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError("malformed", f"the value is not valid JSON: {error}") from error


def _misfit(error: Exception) -> RecordError:
    said = str(error) if isinstance(error, msgspec.ValidationError) else f"{type(error).__name__}: {error}"
    return RecordError("invalid", said)


def convert(value: Any, as_type: Any) -> Any:
    """A JSON-like value as `as_type`; unknown fields of a record are kept. Raises RecordError `invalid`."""
    if as_type is Any or (isinstance(as_type, type) and isinstance(value, as_type)):
        return value
    try:
        if isinstance(as_type, type) and issubclass(as_type, Record) and isinstance(value, dict):
            known = _known_fields(as_type)
            unknown = {name: value[name] for name in value if name not in known}
            if unknown:
                value = {name: value[name] for name in value if name in known}
                value["unknown_fields"] = unknown
        return msgspec.convert(value, as_type)
    except Exception as error:
        raise _misfit(error) from error


def encode(value: Any) -> bytes:
    """`value` as JSON. Raises TypeError for what JSON cannot hold."""
    try:
        if isinstance(value, Record):
            fields = msgspec.structs.asdict(value)
            unknown = fields.pop("unknown_fields")
            return _to_json.encode({**unknown, **fields})
        return _to_json.encode(value)
    except (ValueError, OverflowError, RecursionError, msgspec.EncodeError) as error:  # half a character, 2**64, ...
        raise TypeError(str(error)) from error


def printable(text: object, limit: int) -> str:
    """`text` cut to `limit` characters, half characters escaped: fit for JSON whatever it was."""
    return str(text)[:limit].encode("utf-8", "backslashreplace").decode()


@lru_cache(maxsize=256)
def _decoder(as_type: Any) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(as_type)


@lru_cache(maxsize=256)
def _known_fields(as_type: type) -> frozenset[str]:
    return fields_of(as_type)


class _Registered(Struct, frozen=True):
    record_type: Any
    version: int = 1
    upgrade: Upgrade | None = None


_registered: dict[str, _Registered] = {}
_names: dict[type, str] = {}


def register(name: str, record_type: type[T], *, version: int = 1, upgrade: Upgrade | None = None) -> type[T]:
    """Lets `record_type` (a msgspec.Struct) stand in state under `name`.

    Call it beside the class, in a module that workers import. The name, not that module, is what a
    savepoint holds: keep it when the class moves. A field
    added with a default restores from older bytes with that default, one that was removed is dropped;
    fields are kept by their Python names. For what defaults cannot do (a field renamed, of another type,
    or required) raise `version`, which is written with each record: `upgrade(fields, version)` is then
    given the fields of an older record by name, nested records among them as they are now, and returns
    those of today. A record of a later version is refused.

    Raises ValueError if the name is another type's, for a version below 1, or if the type is `array_like`:
    its fields have no names that could come and go.
    """
    if record_type.__struct_config__.array_like:  # type: ignore[attr-defined]
        raise ValueError(f"{record_type.__qualname__} is array_like, which state cannot hold")
    if version < 1:
        raise ValueError(f"the version of {name!r} is {version}: versions begin at 1")
    known = _registered.setdefault(name, _Registered(record_type, version, upgrade))
    if known.record_type is not record_type:
        raise ValueError(f"the state name {name!r} belongs to {known.record_type.__qualname__}")
    if known.version != version:
        raise ValueError(f"{name!r} is registered as version {known.version}, and as {version} now")
    _names[record_type] = name
    return record_type


def registered() -> list[type]:
    """The types of all records that are registered here."""
    return list(_names)


def is_registered(value: Any) -> bool:
    """Whether `value` is a record that state can hold."""
    return type(value) in _names


def _pack_other(value: Any) -> msgspec.msgpack.Ext:
    raise TypeError(f"a {type(value).__name__} cannot be kept in state; use JSON types or codec.register")


def _lower(value: Any) -> Any:
    """Structs to extensions, containers walked; every other value must be a JSON type or bytes."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a mapping in state has {type(key).__name__} keys; use strings")
        return {key: _lower(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lower(item) for item in value]
    name = _names.get(type(value))
    if name is None:
        return _pack_other(value)
    fields = {key: _lower(item) for key, item in msgspec.structs.asdict(value).items()}
    version = _registered[name].version
    stamp = [version] if version > 1 else []  # a first version is written as it was before there were others
    return msgspec.msgpack.Ext(_RECORD_EXT, msgspec.msgpack.encode([name, fields, *stamp]))


def _unpack_ext(code: int, data: memoryview) -> Any:
    if code != _RECORD_EXT:
        raise StateError(f"state holds an extension of kind {code}, this version knows {_RECORD_EXT}")
    name, fields, *stamp = msgspec.msgpack.decode(data, ext_hook=_unpack_ext)
    return _restored(name, fields, stamp[0] if stamp else 1)


def _restored(name: str, fields: dict[str, Any], version: int) -> Any:
    """A record of today of one that was written in `version`."""
    known = _registered.get(name)
    if known is None:
        raise StateError(
            f"state holds a record {name!r} that is not registered: codec.register it in a module that the handler "
            "imports before its first call"
        )
    if version > known.version:
        raise StateError(
            f"state holds a {name!r} of version {version}, this job knows it up to version {known.version}: "
            "start it with the release that wrote it"
        )
    names = {field.name: field.encode_name for field in msgspec.structs.fields(known.record_type)}
    try:
        if version < known.version and known.upgrade is not None:
            fields = known.upgrade(dict(fields), version)
        return msgspec.convert({names[k]: v for k, v in fields.items() if k in names}, known.record_type)
    except Exception as error:  # validation, or whatever `upgrade` and the type's own __post_init__ raise
        raise StateError(
            f"state holds a {name!r} that no longer fits its type: written in version {version}, "
            f"{known.record_type.__qualname__} is version {known.version}: {type(error).__name__}: {error}"
        ) from error


def pack(value: Any) -> bytes:
    """State bytes of `value`. Raises TypeError for anything but JSON types, bytes, registered records."""
    try:
        return bytes([STATE_VERSION]) + msgspec.msgpack.encode(_lower(value))
    except (ValueError, OverflowError, RecursionError, msgspec.EncodeError) as error:
        raise TypeError(f"this cannot be kept in state: {error}") from error


def pack_plain(values: list[Any]) -> bytes:
    """The bytes that `pack` makes of JSON types and bytes, without a look at each: for what is known to be such.

    Raises TypeError for text that is no UTF-8 and numbers beyond 64 bits.
    """
    try:
        return _VERSION + msgspec.msgpack.encode(values)
    except (ValueError, OverflowError, msgspec.EncodeError) as error:
        raise TypeError(f"this cannot be kept in state: {error}") from error


def unpack(data: bytes) -> Any:
    """The value of state bytes. Raises StateError for a version this one does not know."""
    if not data or data[0] != STATE_VERSION:
        found = data[0] if data else "none"
        raise StateError(
            f"state was written in version {found}, this release reads version {STATE_VERSION}; "
            "start it with the release that wrote it"
        )
    try:
        return msgspec.msgpack.decode(memoryview(data)[1:], ext_hook=_unpack_ext)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise StateError(f"state is damaged: {error}") from error


register("chat.message", Message)


def forget(*used: Any) -> None:
    """Drops what msgspec keeps at the dataclasses among these types, and at those they hold.

    It cannot be pickled, and so neither could a class that goes to the workers by value.
    """
    waiting = list(used)
    while waiting:
        found = waiting.pop()
        waiting += typing.get_args(found)
        if isinstance(found, type) and "__msgspec_cache__" in vars(found):
            del found.__msgspec_cache__  # type: ignore[attr-defined]
            waiting += typing.get_type_hints(found).values()
