"""The event time of what `apply` emits: each outcome its record's, and watermarks that none overtakes.

Flink stamps what a timer emits with the timer's time, and lets the input's watermarks pass while
records are in flight. So every outcome carries its record's timestamp, and how far time has come in its
subtask: the input's watermark or the oldest record in flight, whichever is earlier. Both are put into
effect in Java: PyFlink has no watermark generator of one's own, a table has one by expression.
"""

from pyflink.common import TypeInformation, Types, WatermarkStrategy
from pyflink.datastream import DataStream
from pyflink.java_gateway import get_gateway
from pyflink.table import DataTypes, StreamTableEnvironment, Table

from flink_llm.kafka import OUTBOUND, record_columns, table_uids
from flink_llm.udfs.columns import Column

BYTES = Column("BYTES")


def _stamped(value: Column) -> TypeInformation:
    """An outcome, and the event time in epoch ms up to which nothing earlier follows; null says nothing."""
    key, _, *more = OUTBOUND.get_field_types()
    return Types.ROW_NAMED([*OUTBOUND.get_field_names(), "low"], [key, value.type_info(), *more, Types.LONG()])


def emitted_type(value: Column = BYTES) -> TypeInformation:
    """What the operator emits: the outcome, and its record's timestamp in epoch milliseconds."""
    return Types.TUPLE([_stamped(value), Types.LONG()])


EARLIEST, _LATEST = -62_135_596_800_000, 253_402_300_799_999
"""The beginning of the year 1 and the end of 9999, beyond which SQL has no time; epoch ms."""


def low_mark(watermark: int | None, oldest: int | None) -> int | None:
    """How far event time has come, epoch ms: the input's watermark, but before the oldest in flight."""
    # At the end of bounded input the watermark is the maximum, and Flink passes that on by itself.
    bounds = [watermark] if watermark is not None and watermark < _LATEST else []
    if oldest is not None:
        bounds.append(oldest - 1)
    return min(bounds) if bounds and EARLIEST <= min(bounds) <= _LATEST else None


def with_event_time(tables: StreamTableEnvironment, j_stream: object, uid: str) -> DataStream:
    """A Java stream of `emitted_type()` to rows of `OUTBOUND`'s fields, `low` and `time`, in that time."""
    table = table_with_event_time(tables, j_stream, uid)
    with table_uids(tables, uid):  # all columns: a projection would be a second Calc of one uid
        return tables.to_data_stream(table)


def table_with_event_time(tables: StreamTableEnvironment, j_stream: object, uid: str, value: Column = BYTES) -> Table:
    """The same as a table, where an outcome's value is of the type that `value` says."""
    events = get_gateway().jvm.org.apache.flink.streaming.api.functions.python.eventtime
    own = WatermarkStrategy.no_watermarks()._j_watermark_strategy
    stamped = j_stream.assignTimestampsAndWatermarks(  # type: ignore[attr-defined]
        own.withTimestampAssigner(events.CustomTimestampAssigner())
    )
    stamped = stamped.uid(f"{uid}-time").name(f"{uid}: event time")
    rows = stamped.map(events.RemoveTimestampMapFunction(), _stamped(value).get_java_type_info())
    schema = (
        record_columns(value.data_type())
        .column("low", DataTypes.BIGINT())
        .column_by_metadata("time", DataTypes.TIMESTAMP_LTZ(3), "rowtime")
        .watermark("time", "TO_TIMESTAMP_LTZ(`low`, 3)")
        .build()
    )
    return tables.from_data_stream(DataStream(rows.uid(uid).name(uid)), schema)
