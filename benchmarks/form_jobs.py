"""One question through each form of the library, as a job of its own, Kafka to Kafka, at least once.

A record is a JSON object of `request_id`, `session_id` and `text`; an answer of `request_id` and `text`, which
the scripted model repeats. Each form has the bundles that suit it: they hold for a whole job.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from pyflink.common import Row, Time
from pyflink.datastream import AsyncDataStream, StreamExecutionEnvironment
from pyflink.datastream.functions import AsyncFunction

from flink_llm import environment, kafka
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf, CallContext, Context, Metrics
from flink_llm.kafka_settings import KafkaSettings
from flink_llm.services import ServiceSettings, open_services
from flink_llm.udfs.async_operator import apply
from flink_llm.udfs.sql import register_functions

MODEL = "scripted"
IN_FLIGHT = 256
WAITING_BUNDLE = {
    "python.fn-execution.bundle.size": str(IN_FLIGHT),
    "python.fn-execution.bundle.time": "10",
    "python.fn-execution.arrow.batch.size": str(IN_FLIGHT),
}
"""Of forms that wait for their bundle: large enough to have as many rows in flight as the others."""
TIMEOUT_MS = 60_000


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job reads and writes, and who answers."""

    name: str
    servers: str
    asked: str
    answered: str
    services: ServiceSettings


class Answer(msgspec.Struct):
    """What comes back."""

    request_id: str
    text: str


class Ask(AsyncUdf):
    """One message there, one back."""

    async def open(self, ctx: Context) -> None:
        self._model = ctx.model(MODEL)

    async def call(self, request: dict[str, Any], ctx: CallContext) -> Answer:
        reply = await self._model.generate(request["text"])
        return Answer(request["request_id"], reply.text)


class Stock(AsyncFunction):  # type: ignore[misc]
    """The same by PyFlink's own asynchronous function: no state, no failures, no deadline that cancels."""

    def __init__(self, services: ServiceSettings) -> None:
        self._settings = services

    def open(self, runtime_context: Any) -> None:
        self._services = open_services(self._settings)
        self._model = Context(self._services, Metrics(), logging.getLogger(__name__)).model(MODEL)
        self._started: asyncio.Task[None] | None = None

    async def async_invoke(self, value: Any) -> list[Row]:
        if self._started is None:
            self._started = asyncio.ensure_future(self._services.start())
        await asyncio.shield(self._started)
        request = json.loads(bytes(value[1]))
        reply = await self._model.generate(request["text"])
        answer = json.dumps({"request_id": request["request_id"], "text": reply.text})
        return [Row(None, answer.encode(), {}, None)]


def stream(env: StreamExecutionEnvironment, form: Form) -> None:
    """`apply` on a DataStream."""
    tables, servers = environment.tables(env), _servers(form)
    asked = kafka.source(tables, servers, [form.asked], uid="asked")
    settings = OperatorSettings(capacity=IN_FLIGHT)
    out = apply(asked, Ask(), key="session_id", uid="ask", settings=settings, services=form.services)
    kafka.sink(tables, out.results, servers, [form.answered], uid="answered")


def table(env: StreamExecutionEnvironment, form: Form) -> None:
    """`apply` on a Table."""
    tables = _json_tables(env, form)
    settings = OperatorSettings(capacity=IN_FLIGHT)
    asked = tables.from_path("asked")
    out = apply(asked, Ask(), key="session_id", uid="ask", settings=settings, services=form.services)
    tables.create_temporary_view("results", out.results)
    _insert(tables, "SELECT request_id, `text` FROM results")


def sql(env: StreamExecutionEnvironment, form: Form) -> None:
    """A vectorised SQL function."""
    tables = _json_tables(env, form)
    register_functions(tables, form.services)
    _insert(tables, f"SELECT request_id, llm_generate('{MODEL}', `text`, '{{\"raw\": true}}') FROM asked")


def stock(env: StreamExecutionEnvironment, form: Form) -> None:
    """PyFlink's `AsyncFunction`."""
    tables, servers = environment.tables(env), _servers(form)
    asked = kafka.source(tables, servers, [form.asked], uid="asked")
    timeout = Time.milliseconds(TIMEOUT_MS)
    answers = AsyncDataStream.unordered_wait(asked, Stock(form.services), timeout, IN_FLIGHT, kafka.OUTBOUND)
    kafka.sink(tables, answers, servers, [form.answered], uid="answered")


FORMS: dict[str, Callable[[StreamExecutionEnvironment, Form], None]] = {
    "stream": stream, "table": table, "sql": sql, "stock": stock,
}  # fmt: skip


def start(form: Form) -> Any:
    """Starts a form's job on a mini-cluster of its own; Flink's client of it."""
    env = environment.environment()
    more = WAITING_BUNDLE if form.name in ("sql", "stock") else {}
    environment.configure(env, FlinkSettings(parallelism=1, properties=more), capacity=IN_FLIGHT)
    FORMS[form.name](env, form)
    return env.execute_async(form.name)


def _servers(form: Form) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=form.servers, group=form.asked)


def _json_tables(env: StreamExecutionEnvironment, form: Form) -> Any:
    tables = environment.tables(env)
    common = f"'connector' = 'kafka', 'format' = 'json', 'properties.bootstrap.servers' = '{form.servers}'"
    tables.execute_sql(
        f"""CREATE TEMPORARY TABLE asked (request_id STRING, session_id STRING, `text` STRING)
            WITH ({common}, 'topic' = '{form.asked}', 'scan.startup.mode' = 'earliest-offset')"""
    )
    tables.execute_sql(
        f"""CREATE TEMPORARY TABLE answered (request_id STRING, `text` STRING)
            WITH ({common}, 'topic' = '{form.answered}', 'properties.acks' = 'all', 'properties.linger.ms' = '0')"""
    )
    return tables


def _insert(tables: Any, query: str) -> None:
    statements = tables.create_statement_set()
    statements.add_insert_sql(f"INSERT INTO answered {query}")
    statements.attach_as_datastream()
