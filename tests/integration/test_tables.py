"""`apply` on a Table: typed rows come out, and what a Table says of its records arrives."""

import json

import msgspec
import pytest
from pyflink.common import Row, Types
from pyflink.table import Schema

from flink_llm import environment, kafka
from flink_llm.errors import ConfigError
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf
from flink_llm.udfs.async_operator import apply

SEEN_MS = 1_767_225_607_123
TYPES = {
    "order_id": "BIGINT", "total": "DOUBLE", "paid": "BOOLEAN", "tags": "ARRAY<STRING>",
    "lines": "ARRAY<ROW<`name` STRING, `price` DOUBLE>>", "first": "ROW<`name` STRING, `price` DOUBLE>",
    "counts": "MAP<STRING, BIGINT>", "digest": "BYTES", "about": "STRING", "seen_ms": "BIGINT", "headers": "STRING",
    "record_key": "STRING", "record_headers": "MAP<STRING, BYTES>", "record_topic": "STRING",
    "record_time": "TIMESTAMP_LTZ(3) *ROWTIME*",
}  # fmt: skip


class Line(msgspec.Struct):
    name: str
    price: float | None = None


class Bill(msgspec.Struct):
    """Of each kind of column one."""

    order_id: int
    total: float
    paid: bool
    tags: list[str]
    lines: list[Line]
    first: Line
    counts: dict[str, int]
    digest: bytes
    about: dict
    seen_ms: int | None = None
    headers: str | None = None


class Said(msgspec.Struct):
    said: str
    at: int


class Order(msgspec.Struct, kw_only=True):
    order_id: int
    customer: str
    total: float
    tags: list[str]
    counts: dict[str, int]
    digest: bytes


class Billing(AsyncUdf):
    async def call(self, request: Order, ctx) -> Bill:
        if request.customer == "nobody":
            raise ValueError("there is no such customer")
        await ctx.emit({"said": request.customer, "at": ctx.timestamp})
        lines = [Line("a", 1.5), Line("b")]
        return Bill(
            order_id=request.order_id, total=request.total, paid=True, tags=request.tags, lines=lines, first=lines[1],
            counts=request.counts, digest=request.digest, about={"nested": [1]}, seen_ms=ctx.timestamp,
            headers=(ctx.headers.get("trace") or b"").decode(),
        )  # fmt: skip


GIVEN = [("2026-01-01 00:00:07.123", 1, "ann", 2.5), ("2026-01-01 00:01:00.000", 2, "nobody", 1.0),
         ("2026-01-01 00:02:00.000", 3, None, 1.0), ("1969-12-31 23:59:58.250", 4, "nobody", 1.0)]  # fmt: skip
ORDERS = """
SELECT order_id, customer, CAST(total AS DECIMAL(10, 2)) AS total, ARRAY['x', 'y'] AS tags, MAP['one', 1] AS counts,
  MAP[customer, 1] AS by_customer, MAP[CAST(customer AS VARCHAR(9)), 1] AS by_short,
  CAST('bytes' AS BYTES) AS digest,
  MAP[IF(customer IS NULL, CAST(NULL AS STRING), 'trace'), CAST('t1' AS BYTES)] AS headers,
  DATE '2026-01-02' AS `day`,
  CAST('orders' AS STRING) AS topic, 3 AS `partition`, order_id AS `offset`, seen
FROM given
"""
PLAIN = "TO_TIMESTAMP(`time`, 'yyyy-MM-dd HH:mm:ss.SSS')"
ZONED = f"COALESCE(TO_TIMESTAMP_LTZ(EXTRACT(EPOCH FROM {PLAIN}) * 1000 + 123, 3), CURRENT_TIMESTAMP)"


def orders(env, at: str):
    """A table of orders whose event time is `at`."""
    tables = environment.tables(env)
    tables.get_config().set("table.local-time-zone", "Asia/Kolkata")  # to a stream a TIMESTAMP is UTC all the same
    fields = Types.ROW_NAMED(
        ["time", "order_id", "customer", "total"], [Types.STRING(), Types.LONG(), Types.STRING(), Types.DOUBLE()]
    )
    stream = env.from_collection([Row(*row) for row in GIVEN], fields)
    schema = Schema.new_builder().column_by_expression("seen", at).watermark("seen", "seen").build()
    tables.create_temporary_view("given", tables.from_data_stream(stream, schema))
    return tables, tables.sql_query(ORDERS)


def types_of(table):
    columns = table._j_table.getResolvedSchema().getColumns()
    return {each.getName(): each.getDataType().getLogicalType().asSummaryString() for each in columns}


def collect(tables, out, names):
    """All rows of the tables of these names, as the JSON that Flink makes of their columns, in one job."""
    queries = []
    for name in names:
        table = getattr(out, name)
        columns = table.get_resolved_schema().get_column_names()
        pairs = ", ".join(f"KEY '{column}' VALUE `{column}`" for column in columns)
        queries.append(f"SELECT '{name}' AS kind, JSON_OBJECT({pairs}) AS columns FROM {table}")
    found = {name: [] for name in names}
    with tables.execute_sql(" UNION ALL ".join(queries)).collect() as rows:
        for kind, columns in rows:
            found[kind].append(json.loads(columns))
    return found


def test_rows_come_out_typed_and_what_fails_is_told(flink_llm_env):
    tables, table = orders(flink_llm_env, PLAIN)
    out = apply(table, Billing(), key="customer", uid="bills", partial=Said)
    assert types_of(out.results) == TYPES
    found = collect(tables, out, ["results", "partials", "failures"])
    envelope = {"record_key": "ann", "record_headers": {"trace": "dDE="}, "record_topic": None,
                "record_time": "2026-01-01T00:00:07.123Z"}  # fmt: skip
    assert found["results"] == [
        {
            "order_id": 1, "total": 2.5, "paid": True, "tags": ["x", "y"],
            "lines": [{"name": "a", "price": 1.5}, {"name": "b", "price": None}], "first": {"name": "b", "price": None},
            "counts": {"one": 1}, "digest": "Ynl0ZXM=", "about": '{"nested":[1]}', "seen_ms": SEEN_MS,
            "headers": "t1", **envelope,
        }
    ]  # fmt: skip
    assert found["partials"] == [{"said": "ann", "at": SEEN_MS, **envelope}]
    by_order = {failure["offset"]: failure for failure in found["failures"]}
    codes = {order: failure["code"] for order, failure in by_order.items()}
    assert codes == {2: "handler_error", 3: "invalid", 4: "handler_error"}
    assert by_order[2]["message"].endswith("there is no such customer")
    assert {(each["topic"], each["partition"]) for each in by_order.values()} == {("orders", 3)}
    assert by_order[3]["record_time"] == "2026-01-01T00:02:00Z"
    assert by_order[4]["record_time"] == "1969-12-31T23:59:58.25Z"


def test_what_is_not_declared_is_json_and_a_function_may_be_the_key(flink_llm_env):
    tables, table = orders(flink_llm_env, ZONED)
    assert types_of(table)["seen"] == "TIMESTAMP_LTZ(3) NOT NULL *ROWTIME*"

    class Whole(AsyncUdf):
        async def call(self, request: dict, ctx) -> dict:
            return {**request, "key": ctx.key, "at": ctx.timestamp, "traced": len(ctx.headers)}

    out = apply(table, Whole(), key=lambda order: order["order_id"] % 2, uid="whole")
    found = collect(tables, out, ["results", "failures"])
    by_order = {order["order_id"]: order for order in (json.loads(each["value"]) for each in found["results"])}
    assert len(found["results"]) == len(by_order) == 4 and found["failures"] == []
    assert [by_order[3][name] for name in ("by_customer", "by_short", "traced")] == [None, None, 0], "NULL keys"
    first = by_order[1]
    assert first == {"order_id": 1, "customer": "ann", "total": 2.5, "tags": ["x", "y"], "counts": {"one": 1},
                     "by_customer": {"ann": 1}, "by_short": {"ann": 1}, "traced": 1,
                     "digest": "Ynl0ZXM=", "day": "2026-01-02", "key": "1", "at": SEEN_MS}  # fmt: skip


def test_a_table_that_does_not_fit_is_refused(flink_llm_env):
    tables, table = orders(flink_llm_env, PLAIN)

    class Echo(AsyncUdf):
        async def call(self, request: dict, ctx) -> dict:
            return request

    def refused(text, table, key="order_id", **options):
        with pytest.raises(ConfigError, match=text) as raised:
            apply(table, Echo(), key=key, uid="echo", **options)
        assert "\n" not in str(raised.value)

    counted = tables.sql_query("SELECT order_id, COUNT(*) AS n FROM given GROUP BY order_id")
    refused("echo: the table's rows are updated or deleted", counted)
    refused("echo: the table has no column 'order' to key by: it has order_id, customer", table, key="order")
    odd = tables.sql_query("SELECT order_id, MAP[1, 2] AS odd FROM given")
    refused("echo: the table cannot be read as JSON: .*key type must be a character string", odd)
    taken = {"type": "object", "properties": {"record_key": {"type": "string"}}}
    refused("Echo: a result cannot have a field 'record_key'", table, result=taken)
    empty = {"type": "object", "properties": {}}
    refused("Echo: the result has no fields, and a row needs one at least", table, result=empty)
    stream = tables.to_data_stream(tables.sql_query("SELECT order_id FROM given"))
    refused("result and partial are for a Table", stream, result=taken)


def test_the_operators_of_an_input_are_named_alike_in_each_build():
    def names():
        env = environment.environment(kafka=False)
        environment.configure(env, FlinkSettings())
        tables, table = orders(env, PLAIN)
        joined = tables.sql_query(f"SELECT a.* FROM {table} a JOIN {table} b ON a.order_id = b.order_id")
        apply(joined, Billing(), key="customer", uid="bills")
        graph = env._generate_stream_graph(clear_transformations=True)
        return [str(node.getTransformationUID()) for node in graph.getStreamNodes().toArray()]

    first = names()
    assert len(set(first)) == len(first) and "None" not in first
    assert sorted(names()) == sorted(first)


def test_a_table_environment_made_before_keeps_its_uids():
    env = environment.environment(kafka=False)
    before = environment.tables(env)
    own = environment.tables(env)
    own.get_config().set("table.exec.uid.format", "<id>_own")
    options = ("table.exec.uid.generation", "table.exec.uid.format")
    with kafka.table_uids(own, "edge"):
        own.to_data_stream(own.sql_query("SELECT 1 AS n"))
    assert [before.get_config().get(name, "none") for name in options] == ["none", "none"]
    assert [own.get_config().get(name, "none") for name in options] == ["none", "<id>_own"]
