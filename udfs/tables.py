"""`apply` between tables: rows of a Table as records of the operator, its outcomes as typed rows of Tables.

A row travels as JSON that Flink itself writes, in the shape of a Kafka record: it is keyed in Java, decoded
and kept as any record is, and every type of SQL that JSON can say is one that a handler can take.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from pyflink.datastream import DataStream
from pyflink.table import StreamTableEnvironment, Table

from flink_llm.arrivals import KeySpec
from flink_llm.errors import ConfigError
from flink_llm.records import Failure
from flink_llm.udfs.columns import Column, row_of

Wanted = type | Mapping[str, Any]
"""A Struct, a dataclass or the JSON Schema of an object."""
_PLACE = {"topic": "STRING", "partition": "INT", "offset": "BIGINT"}
_TEXT = Column("STRING")
_NULLABLE_KEYS = re.compile(r"MAP<(STRING|(?:VAR)?CHAR\(\d+\)), ")


class TableOutputs(Struct, frozen=True):
    """The three tables of an operator, in the environment of the one it was given.

    Each has the columns of what it holds, and behind them `record_key` STRING, `record_headers` MAP<STRING, BYTES>,
    `record_topic` STRING (what `reply_to` named, else NULL) and `record_time` TIMESTAMP_LTZ(3): the record's event
    time, with watermarks that no record in flight is overtaken by.
    """

    results: Table
    partials: Table
    failures: Table


class Shape(Struct, frozen=True):
    """The columns of one of them; None is for what nobody has declared: one column `value`, its JSON."""

    row: Column | None
    unknown: tuple[str, ...] = ()
    """Columns that are NULL, whatever the outcome says."""

    def column(self) -> Column:
        """What an outcome's value is as one column."""
        return self.row or _TEXT

    def convert(self, value: bytes) -> Any:
        """An encoded outcome as the operator emits it; what does not fit its column is NULL."""
        if self.row is None:
            return value.decode("utf-8", "replace")
        try:
            found = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return self.row.convert({**found, **dict.fromkeys(self.unknown)} if self.unknown else found)

    def select(self, rows: str) -> str:
        """SQL for a table of the columns, of one that has all of them in `value`."""
        own = (
            ["`value`"] if self.row is None else [f"`value`.{_quoted(name)} AS {_quoted(name)}" for name in self.names]
        )
        return (
            f"SELECT {', '.join(own)}, CAST(`key` AS STRING) AS `record_key`, `headers` AS `record_headers`, "
            f"`topic` AS `record_topic`, `time` AS `record_time` FROM {rows}"
        )

    @property
    def names(self) -> list[str]:
        """Of its own columns."""
        return ["value"] if self.row is None else list(self.row.parts)


def shapes(name: str, returns: type | None, result: Wanted | None, partial: Wanted | None) -> dict[str, Shape]:
    """The shape of each kind of output. `result` is declared, or else what `call` returns. Raises ConfigError."""
    if result is None and returns is not None and (hasattr(returns, "__struct_fields__") or _is_dataclass(returns)):
        result = returns
    found = {
        "result": Shape(None if result is None else row_of(result)),
        "partial": Shape(None if partial is None else row_of(partial)),
        # A hash of what Flink made of the row, not of what stands in Kafka: a replay would look for it there in vain.
        "failure": Shape(row_of(Failure), unknown=("payload_sha256",)),
    }
    for kind, shape in found.items():
        if not shape.names:
            raise ConfigError(f"{name}: the {kind} has no fields, and a row needs one at least: name its properties")
        taken = sorted({"record_key", "record_headers", "record_topic", "record_time"}.intersection(shape.names))
        if taken:
            raise ConfigError(f"{name}: a {kind} cannot have a field {taken[0]!r}: `apply` adds a column of that name")
    return found


def records_of(table: Table, key: KeySpec, uid: str) -> DataStream:
    """The rows of a table as `flink_llm.kafka.INBOUND`. Raises ConfigError for a table that cannot be read so."""
    tables = table._t_env
    if not isinstance(tables, StreamTableEnvironment):
        raise ConfigError(f"{uid}: the table's environment has no streams: use StreamTableEnvironment.create(env)")
    types = {str(each.getName()): _type(each) for each in table._j_table.getResolvedSchema().getColumns()}
    times = [name for name, found in types.items() if found.endswith(("*ROWTIME*", "*PROCTIME*"))]
    placed = all(types.get(name) == wanted for name, wanted in _PLACE.items())
    envelope = [*times, *(_PLACE if placed else ()), *(["headers"] if _are_headers(types.get("headers")) else ())]
    fields = [name for name in types if name not in envelope]
    if isinstance(key, str) and key not in fields:
        raise ConfigError(f"{uid}: the table has no column {key!r} to key by: it has {', '.join(fields)}")
    pairs = ", ".join(f"KEY {_literal(name)} VALUE {_json(name, types[name])}" for name in fields)
    headers = _json("headers", types["headers"]) if "headers" in envelope else "CAST(NULL AS MAP<STRING, BYTES>)"
    place = ", ".join(f"`{name}`" if placed else f"CAST(NULL AS {kind}) AS `{name}`" for name, kind in _PLACE.items())
    query = (
        f"SELECT CAST(NULL AS BYTES) AS `key`, CAST(JSON_OBJECT({pairs}) AS BYTES) AS `value`, "
        f"{headers} AS `headers`, {place}, {_time(times, types)} AS `time` FROM {table}"
    )
    try:
        stream = tables.to_data_stream(tables.sql_query(query))
    except Exception as error:  # what PyFlink raises has no class of its own for it
        raise ConfigError(f"{uid}: {_reason(str(error))}") from error
    _name_operators(stream, uid)
    return stream


def _reason(error: str) -> str:
    if "doesn't support consuming" in error:
        return "the table's rows are updated or deleted (GROUP BY, a join): `apply` takes one that is only appended to"
    causes = re.findall(r"org\.apache\.\S+(?:Exception|Error): ([^\n]+)", error)
    return f"the table cannot be read as JSON: {(causes or error.splitlines())[-1]}"


def _time(times: list[str], types: Mapping[str, str]) -> str:
    """SQL for the event time, whose watermarks follow of themselves. One without a zone counts as UTC, as in Flink."""
    for name in times:
        if not types[name].endswith("*ROWTIME*"):
            continue
        if types[name].startswith("TIMESTAMP_LTZ("):
            return f"CAST({_quoted(name)} AS TIMESTAMP_LTZ(3))"
        plain = f"CAST({_quoted(name)} AS TIMESTAMP(3))"
        return f"TO_TIMESTAMP_LTZ(EXTRACT(EPOCH FROM {plain}) * 1000 + EXTRACT(MILLISECOND FROM {plain}), 3)"
    return "CAST(NULL AS TIMESTAMP_LTZ(3))"


def _name_operators(stream: DataStream, uid: str) -> None:
    """Gives what the table is made of uids, where it has none.

    The planner's own hold a counter of the whole process, here they are counted within this one query.
    """
    numbers: Counter[str] = Counter()
    for each in stream._j_data_stream.getTransformation().getTransitivePredecessors():
        name = re.sub(r"[\[\]\d]+", "", each.getName())
        if each.getUid() is None:
            numbers[name] += 1
            each.setUid(f"{uid}-input {name} {numbers[name]}")


def _type(column: Any) -> str:
    return str(column.getDataType().getLogicalType().asSummaryString()).removesuffix(" NOT NULL")


def _json(name: str, found: str) -> str:
    """SQL for a column in a JSON object, for which Flink knows no dates, and fails of a map with a NULL key."""
    column = _quoted(name)
    keys = _NULLABLE_KEYS.match(found)
    if keys:
        has_null = f"ARRAY_CONTAINS(MAP_KEYS({column}), CAST(NULL AS {keys[1]}))"
        return f"CASE WHEN {has_null} THEN NULL ELSE {column} END"
    return f"CAST({column} AS STRING)" if found.startswith(("DATE", "TIME(", "INTERVAL")) else column


def _are_headers(found: str | None) -> bool:
    return (found or "").replace(" NOT NULL", "") == "MAP<STRING, BYTES>"


def _is_dataclass(found: type) -> bool:
    return hasattr(found, "__dataclass_fields__")


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
