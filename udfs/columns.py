"""JSON Schema as columns of SQL: what a handler's result, or what is extracted from a text, is in a typed row.

    string, enum, const            STRING            array     ARRAY
    string in base64               BYTES             object    ROW, of its properties
    integer                        BIGINT                      MAP<STRING, ...>, without properties
    number                         DOUBLE            boolean   BOOLEAN
    whatever else there is         STRING, which holds its JSON

A msgspec Struct has such a schema, so a class says its columns too. Every column may be NULL.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct
from pyflink.common import Row, TypeInformation, Types
from pyflink.table import DataTypes
from pyflink.table.types import DataType

from flink_llm import codec
from flink_llm.errors import ConfigError
from flink_llm.records import Record

Kind = Literal["STRING", "BYTES", "BIGINT", "DOUBLE", "BOOLEAN", "JSON", "ARRAY", "MAP", "ROW"]
_SIMPLE: dict[str, Kind] = {"string": "STRING", "integer": "BIGINT", "number": "DOUBLE", "boolean": "BOOLEAN"}
_DATA = {
    "STRING": DataTypes.STRING, "JSON": DataTypes.STRING, "BYTES": DataTypes.BYTES, "BIGINT": DataTypes.BIGINT,
    "DOUBLE": DataTypes.DOUBLE, "BOOLEAN": DataTypes.BOOLEAN,
}  # fmt: skip
_INFO = {
    "STRING": Types.STRING, "JSON": Types.STRING, "BIGINT": Types.LONG, "DOUBLE": Types.DOUBLE,
    "BOOLEAN": Types.BOOLEAN,
}  # fmt: skip


class Column(Struct, frozen=True):
    """A type. `parts` are the columns of a ROW by name, and what an ARRAY or a MAP holds under ""."""

    kind: Kind
    parts: dict[str, "Column"] = {}

    def data_type(self) -> DataType:
        """As SQL has it."""
        if self.kind == "ARRAY":
            return DataTypes.ARRAY(self.parts[""].data_type())
        if self.kind == "MAP":
            return DataTypes.MAP(DataTypes.STRING(), self.parts[""].data_type())
        if self.kind == "ROW":
            return DataTypes.ROW([DataTypes.FIELD(name, part.data_type()) for name, part in self.parts.items()])
        return _DATA[self.kind]()

    def type_info(self) -> TypeInformation:
        """As a DataStream has it."""
        if self.kind == "BYTES":
            return Types.PRIMITIVE_ARRAY(Types.BYTE())
        if self.kind == "ARRAY":
            return Types.OBJECT_ARRAY(self.parts[""].type_info())
        if self.kind == "MAP":
            return Types.MAP(Types.STRING(), self.parts[""].type_info())
        if self.kind == "ROW":
            return Types.ROW_NAMED(list(self.parts), [part.type_info() for part in self.parts.values()])
        return _INFO[self.kind]()

    def convert(self, value: Any) -> Any:
        """A JSON value as a DataStream takes it; None for what does not fit."""
        if value is None:
            return None
        if self.kind == "ROW":
            row = [part.convert(value.get(name)) for name, part in self.parts.items()] if _is_object(value) else None
            return None if row is None else Row(*row)
        if self.kind == "MAP":
            part = self.parts[""]
            return {name: part.convert(item) for name, item in value.items()} if _is_object(value) else None
        if self.kind == "ARRAY":
            return [self.parts[""].convert(item) for item in value] if isinstance(value, list) else None
        return _convert_simple(self.kind, value)

    def flat(self) -> "Column":
        """The same row as a vectorised function may give it: nested objects are text, which holds their JSON."""
        return Column("ROW", {name: part if part._is_flat() else Column("JSON") for name, part in self.parts.items()})

    def _is_flat(self) -> bool:
        return self.kind not in ("MAP", "ROW", "ARRAY") or (self.kind == "ARRAY" and self.parts[""].kind in _DATA)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _convert_simple(kind: Kind, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "BIGINT":
        whole = int(value) if number and value == value and abs(value) < 2**63 else None
        return whole if whole == value else None
    if kind == "DOUBLE":
        return float(value) if number and abs(value) < 2**1023 else None
    if kind == "BOOLEAN":
        return value if isinstance(value, bool) else None
    if kind == "BYTES":
        try:
            return base64.b64decode(value, validate=True)
        except (TypeError, ValueError, binascii.Error):
            return None
    if kind == "STRING" and isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def schema_of(wanted: type | Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a Struct, or the one that is given. Raises ConfigError: it is no object's."""
    if isinstance(wanted, Mapping):
        schema = dict(wanted)
    else:
        try:
            schema = msgspec.json.schema(wanted)
        except TypeError as error:
            raise ConfigError(f"{wanted} has no JSON Schema: {error}") from error
        codec.forget(wanted)
    if not isinstance(_resolved(schema, schema).get("properties"), dict):
        raise ConfigError("a row needs a schema of an object: {'type': 'object', 'properties': {...}}, or a Struct")
    return schema


def row_of(wanted: type | Mapping[str, Any]) -> Column:
    """The columns of a Struct's fields, or of a schema's properties. Raises ConfigError."""
    schema = schema_of(wanted)
    try:
        row = _column(schema, schema, ())
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"{wanted} is no JSON Schema ({error}): give each property a schema of its own") from error
    if isinstance(wanted, type) and issubclass(wanted, Record):
        parts = {name: part for name, part in row.parts.items() if name != "unknown_fields"}
        return Column("ROW", parts)
    return row


def _resolved(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    found: Any = schema
    for _ in range(8):  # a reference to a reference
        if not isinstance(found, Mapping) or "$ref" not in found:
            break
        target: Any = root
        for name in str(found["$ref"]).removeprefix("#/").split("/"):
            target = target.get(name, {}) if isinstance(target, Mapping) else {}
        found = target
    return dict(found) if isinstance(found, Mapping) else {}


def _column(schema: Any, root: Mapping[str, Any], above: tuple[str, ...]) -> Column:
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if reference in above:  # a type that holds itself has no end
        return Column("JSON")
    above = above if reference is None else (*above, reference)
    schema = _resolved(schema, root)
    options = [each for each in schema.get("anyOf", []) if _resolved(each, root).get("type") != "null"]
    if len(options) == 1:
        return _column(options[0], root, above)
    named = schema.get("type")
    kinds = [each for each in ([named] if isinstance(named, str) else named or []) if each != "null"]
    texts = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not kinds and texts and all(text is None or isinstance(text, str) for text in texts):
        return Column("STRING")
    if len(kinds) != 1:
        return Column("JSON")
    if schema.get("contentEncoding") == "base64":
        return Column("BYTES")
    if kinds == ["array"]:
        return Column("ARRAY", {"": _column(schema.get("items", {}), root, above)})
    if kinds == ["object"]:
        return _object(schema, root, above)
    return Column(_SIMPLE.get(kinds[0], "JSON"))


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], above: tuple[str, ...]) -> Column:
    properties = schema.get("properties")
    if properties:
        return Column("ROW", {name: _column(each, root, above) for name, each in properties.items()})
    values = schema.get("additionalProperties")
    if isinstance(values, Mapping) and values:
        return Column("MAP", {"": _column(values, root, above)})
    return Column("JSON")
