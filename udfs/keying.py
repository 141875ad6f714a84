"""How a stream comes to its shards: a record's key is read, and the record sent where its shard lives.

Two ways to one result. A Kafka stream keyed by a field is keyed in Java, by SQL: the record then passes
Python once, and waits for the end of one bundle and not of two. A key function, or a stream of another
kind, takes a stage in Python before the operator.
"""

import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import msgspec
from msgspec import Struct
from pyflink.common import Row, Types
from pyflink.datastream import DataStream, ProcessFunction
from pyflink.datastream.data_stream import KeyedStream
from pyflink.datastream.functions import RuntimeContext
from pyflink.java_gateway import get_gateway
from pyflink.table import DataTypes, StreamTableEnvironment

from flink_llm import codec, environment
from flink_llm.arrivals import Arrival, Keyer, KeySpec, shard_of
from flink_llm.errors import ConfigError
from flink_llm.kafka import INBOUND, record_columns, table_uids
from flink_llm.udfs.bundles import lean_bundles
from flink_llm.udfs.event_time import EARLIEST

_BYTES = Types.PRIMITIVE_ARRAY(Types.BYTE())
_ARRIVAL = Types.TUPLE([Types.INT(), _BYTES])
_RECORD = Types.ROW(INBOUND.get_field_types()[:-1])  # its time is the stream record's
_KEYED = Types.ROW([Types.INT(), _RECORD, Types.INSTANT()])
_PLAIN_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NO_TIME = EARLIEST
"""How a record without a time passes through a table, which asks for one."""
_NO_TIMES = (-(2**63), _NO_TIME, -1)
"""What stands for none: Flink's own, a table's here, Kafka's."""
_MOST_IN_SQL = 1024
"""Shards whose keys SQL is given as a literal."""


def shard_keys(shards: int, max_parallelism: int) -> list[int]:
    """The INT key of each shard, spread so that subtasks differ by one shard at every parallelism.

    Shard i takes key group i * max_parallelism / shards; its key is the smallest number that Flink's
    own hash puts there. Raises ConfigError unless `max_parallelism` is a multiple of `shards`.
    """
    if not 0 < shards <= max_parallelism or max_parallelism % shards:
        raise ConfigError(
            f"max_parallelism={max_parallelism} must be a multiple of shards={shards}: "
            f"set shards to a divisor of it, about 4 for each subtask you will ever run"
        )
    jvm = get_gateway().jvm
    assign = jvm.org.apache.flink.runtime.state.KeyGroupRangeAssignment.assignToKeyGroup
    row = jvm.org.apache.flink.types.Row(1)  # PyFlink's keys are rows of one field
    wanted = {shard * max_parallelism // shards: shard for shard in range(shards)}
    keys: dict[int, int] = {}
    candidate = 0
    while len(keys) < shards:
        row.setField(0, candidate)
        shard = wanted.get(assign(row, max_parallelism))
        if shard is not None:
            keys.setdefault(shard, candidate)
        candidate += 1
    return [keys[shard] for shard in range(shards)]


def keyed(stream: DataStream, key: KeySpec, takes: Any, keys: list[int], uid: str) -> tuple[KeyedStream, "Reader"]:
    """`stream` by the keys of its shards, and what the operator reads its elements with. Raises ConfigError."""
    if isinstance(stream, KeyedStream):
        raise ConfigError(f"{uid}: `apply` keys the stream by its own `key`: give it the stream before key_by")
    inbound = _is_inbound(stream)
    if inbound and isinstance(key, str) and _PLAIN_FIELD.fullmatch(key) and len(keys) <= _MOST_IN_SQL:
        return _keyed_in_java(stream, key, keys, uid), Reader(key, takes, len(keys))
    arrivals = stream.process(_Arrive(key, takes, len(keys), inbound), _ARRIVAL)
    arrivals = arrivals.name(f"{uid}: key").uid(f"{uid}-key")
    by_shard = arrivals.key_by(_ShardKey(keys), Types.INT())
    by_shard._j_data_stream.getTransformation().getInputs()[0].setUid(f"{uid}-shard")
    return by_shard, Reader(None, takes, len(keys))


class Reader:
    """Reads what arrives at the operator, as `keyed` has sent it."""

    def __init__(self, key: str | None, takes: Any, shards: int) -> None:
        self._key, self._takes, self._shards = key, takes, shards

    def open(self) -> None:
        """In the worker, before the first element."""
        self._keyer = None if self._key is None else Keyer(self._key, self._takes)

    def __call__(self, value: Any, shard: int, timestamp: int | None) -> tuple[bytes, Arrival]:
        """The arrival's bytes and itself, of an element of that shard."""
        if self._keyer is None:
            data: bytes = value[1]
            return data, Arrival.from_bytes(data)
        by, arrival = self._keyer.arrive(_inbound(value, timestamp))
        if arrival.key is not None and shard_of(by, self._shards) != shard:
            # Java's JSON reader gave it up: run here it would not meet its key's other records.
            reason = (
                "the key of the record cannot be read by Flink, whose JSON reader takes no nesting beyond 1,000, no "
                "number beyond 1,000 digits and no field name beyond 50,000 characters"
            )
            arrival = msgspec.structs.replace(arrival, key=None, key_error=reason)
        return arrival.to_bytes(), arrival


def _is_inbound(stream: DataStream) -> bool:
    """Whether its elements are Kafka records as `flink_llm.kafka.source` reads them."""
    found = stream.get_type()
    found = getattr(found, "_type_info", found)  # a stream that came from a table wraps its type
    return bool(getattr(found, "_field_names", None) == INBOUND._field_names)


def _keyed_in_java(stream: DataStream, key: str, keys: list[int], uid: str) -> KeyedStream:
    tables: StreamTableEnvironment = environment.tables(stream.get_execution_environment())
    schema = (
        record_columns()
        .column("partition", DataTypes.INT())
        .column("offset", DataTypes.BIGINT())
        .column("time", DataTypes.TIMESTAMP_LTZ(3))
        .column_by_expression("rowtime", f"COALESCE(`time`, TO_TIMESTAMP_LTZ({_NO_TIME}, 3))")
        .watermark("rowtime", "SOURCE_WATERMARK()")
        .build()
    )
    rows = tables.from_data_stream(stream, schema)
    columns = ", ".join(f"`{name}`" for name in INBOUND.get_field_names()[:-1])
    literal = ", ".join(map(str, keys))
    query = (
        f"SELECT ARRAY[{literal}][CAST(MOD({_number_of(key, len(keys))}, {len(keys)}) AS INT) + 1] AS `shard`, "
        f"ROW({columns}) AS `record`, `rowtime` FROM {rows}"
    )
    with table_uids(tables, f"{uid}-key"):
        by = tables.to_data_stream(tables.sql_query(query))
    # As plain rows: PyFlink's keyed operator takes no other type.
    by._j_data_stream.getTransformation().setOutputType(_KEYED.get_java_type_info())
    selector, key_type = get_gateway().jvm.KeyByKeySelector(), Types.ROW([Types.INT()]).get_java_type_info()
    return KeyedStream(by._j_data_stream.keyBy(selector, key_type), _KEYED, by)


def _number_of(field: str, shards: int) -> str:
    """SQL for what `shard_of` takes the remainder of: the first 32 bits of a SHA-256.

    It is that of a JSON field, or of `Arrival.place` where there is none: broken records are spread. Those of no
    place are not. Flink works the digest out anew for each hexadecimal digit it is asked for, the record's JSON
    included: digits that the remainder does not depend on are left out, of 16 shards all but one.
    """
    place = "CONCAT(`topic`, '/', CAST(`partition` AS STRING), '/', CAST(`offset` AS STRING))"
    digest = f"SHA256(COALESCE(JSON_VALUE(CAST(`value` AS STRING), '$.{field}'), {place}, ''))"
    weights = {i: 16 ** (7 - i) % shards for i in range(8)}
    digits = {i: f"POSITION(SUBSTRING({digest}, {i + 1}, 1) IN '123456789abcdef')" for i in range(8)}
    return " + ".join(f"CAST({digits[i]} AS BIGINT) * {weight}" for i, weight in weights.items() if weight) or "0"


class _Arrive(ProcessFunction):  # type: ignore[misc]
    """An element to (shard, arrival bytes)."""

    def __init__(self, key: KeySpec, takes: Any, shards: int, inbound: bool) -> None:
        self._key, self._takes, self._shards, self._inbound = key, takes, shards, inbound

    def open(self, runtime_context: RuntimeContext) -> None:
        lean_bundles()
        self._keyer = Keyer(self._key, self._takes)

    def process_element(self, value: Any, ctx: ProcessFunction.Context) -> Iterator[tuple[int, bytes]]:
        arrival = _inbound(value, _time(value, ctx)) if self._inbound else _element(value, ctx.timestamp())
        by, arrival = self._keyer.arrive(arrival)
        yield shard_of(by, self._shards), arrival.to_bytes()


class _ShardKey:
    """A shard's INT key. A class, so that it travels by reference to this module."""

    def __init__(self, keys: list[int]) -> None:
        self._keys = keys

    def __call__(self, arrival: tuple[int, bytes]) -> int:
        return self._keys[arrival[0]]


def _time(row: Any, ctx: ProcessFunction.Context) -> int | None:
    """The stream record's, or that of an `INBOUND` row: a table's time need not be the stream's."""
    stamp = _stamp(ctx.timestamp())
    return row[6].to_epoch_milli() if stamp is None and row[6] is not None else stamp


def _stamp(timestamp: int | None) -> int | None:
    """Without the marks of a record that has none."""
    return None if timestamp in _NO_TIMES else timestamp


def _inbound(row: Any, timestamp: int | None) -> Arrival:
    """A row of `INBOUND`'s fields, in their order."""
    kafka_key, value, headers, topic, partition, offset, *_ = row  # each by its index would be a call in Python
    return Arrival(
        kafka_key=kafka_key,
        value=value,
        headers=headers or {},
        topic=topic,
        partition=partition,
        offset=offset,
        from_kafka=True,
        timestamp=_stamp(timestamp),
    )


def _element(value: Any, timestamp: int | None) -> Arrival:
    """An element of any stream; one that state cannot hold arrives as nothing, with the reason why."""
    stamp = _stamp(timestamp)
    try:
        arrival = Arrival(element=_lower(value), timestamp=stamp)
        arrival.to_bytes()
    except (TypeError, RecursionError) as error:
        return Arrival(key_error=f"the record cannot be kept: {error}"[:500], timestamp=stamp)
    return arrival


def _lower(value: Any) -> Any:
    """An element of any stream as JSON types: all but records that state can hold lose their class.

    An object is its fields: those of a Struct by their names in JSON, else its attributes.
    """
    if isinstance(value, Row):
        return {name: _lower(item) for name, item in value.as_dict(True).items()}
    if isinstance(value, dict):
        return {str(name): _lower(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lower(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str, bytes)) or codec.is_registered(value):
        return value
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, (Struct, Enum)) or hasattr(value, "__dataclass_fields__"):
        return msgspec.to_builtins(value, builtin_types=(bytes,), str_keys=True, enc_hook=_lower)
    return _lower(vars(value)) if hasattr(value, "__dict__") else str(value)
