"""Kafka at the edges of a job: sources and sinks of whole records.

Built on Kafka's SQL connector in raw format, bridged to DataStream: key, value, headers and place all
arrive as they are, a null or broken value is data like any other, and headers are written. PyFlink's
own DataStream classes give the value only, and a null value restarts the job for ever. ADR 4.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from py4j.protocol import Py4JJavaError
from pyflink.common import Types, WatermarkStrategy
from pyflink.datastream import DataStream
from pyflink.java_gateway import get_gateway
from pyflink.table import DataTypes, Schema, StreamTableEnvironment
from pyflink.table.types import DataType

from flink_llm import environment
from flink_llm.errors import ConfigError
from flink_llm.kafka_settings import DEFAULT_GROUP, KafkaSettings, check_properties, check_transaction_timeout
from flink_llm.secrets import masked

Delivery = Literal["at_least_once", "exactly_once"]
Start = Literal["earliest", "latest", "committed"]

_BYTES = Types.PRIMITIVE_ARRAY(Types.BYTE())
_HEADERS = Types.MAP(Types.STRING(), _BYTES)
INBOUND = Types.ROW_NAMED(
    ["key", "value", "headers", "topic", "partition", "offset", "time"],
    [_BYTES, _BYTES, _HEADERS, Types.STRING(), Types.INT(), Types.LONG(), Types.INSTANT()],
)
"""A record as it was read; `time` is Kafka's timestamp, and the stream record's."""

OUTBOUND = Types.ROW_NAMED(["key", "value", "headers", "topic"], [_BYTES, _BYTES, _HEADERS, Types.STRING()])
"""A record to write. `topic` null means the sink's first topic."""

_names = itertools.count()
_NAMES_A_CLASS = re.compile(r"class(es)?$|reporters$|strategy$")
"""Properties whose values may be known to the tasks only, as those with references are."""
IDLE_S = 10
DISCOVERY_S = 30
"""How soon a partition that was added to a topic is read, seconds."""

# A broker refuses times more than an hour ahead and a producer those before 1970: one such record
# would restart the job for ever. What lies outside is written with the time of writing.
_TIME = """CASE WHEN `$time` BETWEEN TO_TIMESTAMP_LTZ(0, 3)
                    AND CURRENT_ROW_TIMESTAMP() + INTERVAL '1' MINUTE THEN `$time` END"""


def source(
    tables: StreamTableEnvironment,
    settings: KafkaSettings,
    topics: Sequence[str],
    *,
    uid: str,
    start: Start = "committed",
    bounded: bool = False,
) -> DataStream:
    """Records of `topics` as `INBOUND` rows whose event time is Kafka's timestamp.

    What a transaction has not committed is not read, unless `isolation.level` of the settings' properties
    says so. `start` is where to begin without a savepoint: "committed" takes the group's offsets, and the
    earliest where there are none. `bounded` ends at what is there now, once open transactions have ended.
    Raises ConfigError without topics, or where Flink has no Kafka connector.
    """
    if not topics:
        raise ConfigError(f"{uid}: a source needs at least one topic")
    options = {
        "connector": "kafka",
        "topic": ";".join(topics),
        "key.format": "raw",
        "key.fields": "key",
        "value.format": "raw",
        "value.fields-include": "EXCEPT_KEY",
        "properties.group.id": settings.group or DEFAULT_GROUP,
        "scan.startup.mode": {"earliest": "earliest-offset", "latest": "latest-offset"}.get(start, "group-offsets"),
        "properties.auto.offset.reset": "latest" if start == "latest" else "earliest",
        "scan.watermark.idle-timeout": f"{IDLE_S} s",
        "scan.topic-partition-discovery.interval": f"{DISCOVERY_S} s",
        "properties.isolation.level": "read_committed",  # what another job has written exactly once is read so
        **_connection(settings),
    }
    if bounded:
        options["scan.bounded.mode"] = "latest-offset"
    _check_client("consumer.ConsumerConfig", "Deserializer", options)
    name = _create(
        tables,
        uid,
        """`key` BYTES, `value` BYTES,
           `headers` MAP<STRING NOT NULL, BYTES> METADATA VIRTUAL,
           `topic` STRING NOT NULL METADATA VIRTUAL,
           `partition` INT NOT NULL METADATA VIRTUAL,
           `offset` BIGINT NOT NULL METADATA VIRTUAL,
           `time` TIMESTAMP_LTZ(3) METADATA FROM 'timestamp' VIRTUAL,
           WATERMARK FOR `time` AS `time` - INTERVAL '0.001' SECOND""",
        options,
    )
    with table_uids(tables, uid), _connector_at_hand(uid):
        stream = tables.to_data_stream(tables.from_path(f"`{name}`"))
    return stream


def sink(
    tables: StreamTableEnvironment,
    stream: DataStream,
    settings: KafkaSettings,
    topics: Sequence[str],
    *,
    uid: str,
    delivery: Delivery = "at_least_once",
    transactions: str | None = None,
) -> None:
    """Writes `OUTBOUND` rows, each to its own `topic` (one of `topics`) or else to the first of them.

    A row's `topic` outside `topics` fails the job; with a single topic it is not looked at. A record's
    time is the stream record's, or the time of writing where that is absent or one no broker takes.
    Header values that are null are not written.

    Exactly once is transactional, in the pooled naming: `transactions`, by default the consumer group, and
    `uid` name the transactions, so one of them must differ between any two jobs on one broker. Raises
    ConfigError without checkpoints, when the broker's maximum forbids the transaction timeout, when checkpoints
    may last longer than it, when `stream` lacks a field of `OUTBOUND`, for properties that Kafka's client would
    not take, or where Flink has no Kafka connector.
    """
    if not topics:
        raise ConfigError(f"{uid}: a sink needs at least one topic")
    _check_rows(stream, uid)
    options = {
        "connector": "kafka",
        "topic": ";".join(topics),
        "key.format": "raw",
        "key.fields": "key",
        "value.format": "raw",
        "value.fields-include": "EXCEPT_KEY",
        "sink.delivery-guarantee": delivery.replace("_", "-"),
        "properties.acks": "all",
        "properties.linger.ms": "0",
        **_connection(settings),
    }
    if delivery == "exactly_once":
        check_transaction_timeout(settings)
        environment.bound_transactions(
            stream.get_execution_environment(),
            None if settings.resume_after_timeout else settings.transaction_timeout_ms,
        )
        options |= {
            "sink.transaction-naming-strategy": "pooling",
            "sink.transactional-id-prefix": transactions_of(transactions or settings.group or DEFAULT_GROUP, uid),
            "properties.transaction.timeout.ms": str(settings.transaction_timeout_ms),
        }
    _check_client("producer.ProducerConfig", "Serializer", options)
    columns = """`key` BYTES, `value` BYTES, `headers` MAP<STRING NOT NULL, BYTES> METADATA,
                 `time` TIMESTAMP_LTZ(3) METADATA FROM 'timestamp'"""
    selected = f"`key`, `value`, `headers`, {_TIME}"
    if len(topics) > 1:  # the connector has no topic to choose where there is only one
        columns += ", `topic` STRING NOT NULL METADATA"
        default = topics[0].replace("'", "''")
        selected += f", COALESCE(`topic`, '{default}')"
    name = _create(tables, uid, columns, options)
    schema = record_columns().column_by_metadata("$time", DataTypes.TIMESTAMP_LTZ(3), "rowtime").build()
    # The table edge refuses a record without a time: this marks such with one out of range.
    stamped = stream.assign_timestamps_and_watermarks(WatermarkStrategy.no_watermarks()).uid(f"{uid}_time")
    view = f"`{name}_rows`"
    tables.create_temporary_view(view, tables.from_data_stream(stamped, schema))
    statements = tables.create_statement_set()
    with table_uids(tables, uid), _connector_at_hand(uid):
        statements.add_insert_sql(f"INSERT INTO `{name}` SELECT {selected} FROM {view}")
        statements.attach_as_datastream()


def transactions_of(name: str, uid: str) -> str:
    """With what the ids of a sink's transactions begin, and those of no other sink.

    The connector aborts, at its start, whatever begins so: `results` must not be the beginning of `results-eu`.
    """
    return "".join(part.replace("%", "%25").replace(":", "%3A") + ":" for part in (name, uid))


def record_columns(value: DataType | None = None) -> Schema.Builder:
    """A table's columns for the fields of `OUTBOUND`, with which `INBOUND` begins too; more may follow.

    `value` is another type of the value than bytes.
    """
    headers = DataTypes.MAP(DataTypes.STRING(), DataTypes.BYTES())
    types = [DataTypes.BYTES(), value or DataTypes.BYTES(), headers, DataTypes.STRING()]
    return Schema.new_builder().from_fields(OUTBOUND.get_field_names(), types)


@contextlib.contextmanager
def _connector_at_hand(uid: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what PyFlink raises has no class of its own for it
        if "for identifier 'kafka'" not in str(error):
            raise
        raise ConfigError(
            f"{uid}: this environment has no Kafka connector: on a cluster give `flink run -j` its jar, or put that "
            f"into Flink's lib folder; else make it by flink_llm.environment.environment(), or env.add_jars() the jar"
        ) from None


def _check_rows(stream: DataStream, uid: str) -> None:
    found = stream.get_type()
    found = getattr(found, "_type_info", found)  # a stream that came from a table wraps its type
    if not set(OUTBOUND._field_names) <= set(getattr(found, "_field_names", None) or ()):
        raise ConfigError(
            f"{uid}: a sink takes rows of key, value, headers and topic; "
            f"give the step before it output_type=flink_llm.kafka.OUTBOUND"
        )


def _check_client(config: str, coder: str, options: Mapping[str, str]) -> None:
    """Has Flink's own client look at its properties, where it is at hand. Raises ConfigError.

    A client that is made by a task only would start the job again and again.
    """
    java = get_gateway().jvm.java.util.HashMap()
    for name, value in options.items():
        if name.startswith("properties.") and not _NAMES_A_CLASS.search(name) and "${" not in value:
            java[name.removeprefix("properties.")] = value
    if "sink.transactional-id-prefix" in options:
        java["transactional.id"] = options["sink.transactional-id-prefix"]
        java.putIfAbsent("enable.idempotence", "true")  # it is, and said so names what else does not fit
    for root in ("org.apache.flink.kafka.shaded.org.apache.kafka", "org.apache.kafka"):
        for part in ("key", "value"):
            java[f"{part}.{coder.lower()}"] = f"{root}.common.serialization.ByteArray{coder}"
        try:
            functools.reduce(getattr, f"{root}.clients.{config}".split("."), get_gateway().jvm)(java)
            return
        except TypeError:  # there is no such class here
            continue
        except Py4JJavaError as error:
            raise ConfigError(f"kafka.properties: {masked(error.java_exception.getMessage())}") from None


def _connection(settings: KafkaSettings) -> dict[str, str]:
    check_properties(settings)
    passed = {f"properties.{name}": value for name, value in settings.properties.items()}
    return {**passed, "properties.bootstrap.servers": settings.bootstrap_servers}


def _create(tables: StreamTableEnvironment, uid: str, columns: str, options: dict[str, str]) -> str:
    # A name of its own for each table: one client may build several jobs in one catalogue.
    name = f"{uid}_{next(_names)}".replace("`", "")
    listed = ", ".join(f"'{key}' = '{value.replace(chr(39), chr(39) * 2)}'" for key, value in options.items())
    tables.execute_sql(f"CREATE TEMPORARY TABLE `{name}` ({columns}) WITH ({listed})")
    return name


@contextlib.contextmanager
def table_uids(tables: StreamTableEnvironment, uid: str) -> Iterator[None]:
    """Names the operators that a table edge is translated to after `uid`.

    The planner's own names hold a counter of the whole process, so that a second job, or a table more,
    would change them and lose a savepoint's state.
    """
    config = tables.get_config()
    # What is translated brings its table environment's settings to the stream environment, whose they then are for
    # every other table environment over it.
    places = [config._j_table_config.getConfiguration(), config._j_table_config.getRootConfiguration()]
    wanted = {"table.exec.uid.generation": "ALWAYS", "table.exec.uid.format": f"{uid}_<type>_<transformation>"}
    before = [(place, name, place.getString(name, None)) for place in places for name in wanted]
    for name, value in wanted.items():
        config.set(name, value)
    try:
        yield
    finally:
        for place, name, earlier in before:
            place.removeKey(name) if earlier is None else place.setString(name, earlier)
