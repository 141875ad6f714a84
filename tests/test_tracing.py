"""Spans: what hangs below what, what they say, and what goes on to whoever reads the outcome."""

import builtins
import importlib

import pytest

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flink_llm.clock import Times
from flink_llm.errors import ConfigError, RecordError
from flink_llm.handler import AsyncUdf
from flink_llm.telemetry import Telemetry, open_telemetry
from flink_llm.telemetry_settings import TelemetrySettings
from flink_llm.testing import FakeFeatures, Script
from flink_llm.tracing import Tracing, check

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{CALLER}-01".encode(), "tracestate": b"vendor=1", "mine": b"\xff"}
REQUEST = {"session_id": "s", "request_id": "r1"}


class Asks(AsyncUdf):
    async def open(self, ctx):
        self.model, self.users = ctx.model("m"), ctx.features("users")

    async def call(self, request: dict, ctx) -> dict:
        if request.get("bad"):
            raise RecordError("invalid", "no")
        await self.users.get(user_id="u")
        reply = self.model.generate("x")
        async for token in reply:
            await ctx.emit(token)
        return {"traceparent": ctx.headers["traceparent"].decode()}


@pytest.fixture
def traced(harness):
    """A harness whose records are traced, and the spans that have ended."""

    def make(share=1.0, **options):
        script = Script(tokens=["a", "b", "c"], first_ms=2000, gap_ms=500)
        users = FakeFeatures({"u": {"n": 1}}, delay_s=0.2)
        run = harness(Asks(), {"m": script}, {"users": users}, **options)
        times, exporter = Times(run.loop.time, run.loop.wall), InMemorySpanExporter()
        tracing = Tracing(SimpleSpanProcessor(exporter), share=share, service="j", times=times)
        run.shard._telemetry = Telemetry(tracing=tracing, operator="generate", times=times)
        return run, exporter.get_finished_spans

    return make


def test_a_record_and_its_stages_hang_below_the_context_of_its_headers(traced):
    run, spans = traced()
    began = run.loop.wall()
    run.send(REQUEST, headers=HEADERS)
    run.finish()
    *stages, record = spans()
    assert (record.name, f"{record.context.trace_id:032x}") == ("generate process", TRACE)
    assert (f"{record.parent.span_id:016x}", record.resource.attributes["service.name"]) == (CALLER, "j")
    assert record.attributes["flink_llm.request_id"] == "r1"
    assert (record.attributes["messaging.destination.name"], record.attributes["messaging.kafka.offset"]) == ("test", 0)
    assert {span.parent.span_id for span in stages} == {record.context.span_id}
    lasted = {span.name: round((span.end_time - span.start_time) / 1e9, 1) for span in (*stages, record)}
    assert lasted == {
        "queue": 0, "features": 0.2, "prefill": 2.0, "decode": 1.0, "model": 3.0, "call": 3.2, "emit": 0,
        "generate process": 3.2,
    }  # fmt: skip
    assert record.start_time / 1e9 == pytest.approx(began, abs=0.01)
    decode = next(span for span in stages if span.name == "decode")
    assert dict(decode.attributes) == {"gen_ai.request.model": "m", "tokens": 3}


def test_outcomes_and_the_handler_carry_the_records_own_span(traced):
    run, spans = traced()
    run.send(REQUEST, headers=HEADERS)
    run.send({**REQUEST, "request_id": "r2", "bad": 1}, headers=HEADERS)
    run.finish()
    records = {span.attributes["flink_llm.request_id"]: span for span in spans() if span.name == "generate process"}
    own = {name: f"00-{TRACE}-{span.context.span_id:016x}-01".encode() for name, span in records.items()}
    for output in run.outputs:
        whose = own["r2" if output.kind == "failure" else "r1"]
        assert (output.headers["traceparent"], output.headers["tracestate"]) == (whose, b"vendor=1")
    assert {output.kind for output in run.outputs} == {"result", "partial", "failure"}
    assert run.results() == [{"traceparent": own["r1"].decode()}]
    assert run.outputs[-1].headers["mine"] == b"\xff"
    assert (records["r2"].status.is_ok, records["r2"].attributes["error.type"]) == (False, "invalid")
    assert records["r1"].status.is_ok


@pytest.mark.parametrize(
    ("share", "header", "kept"),
    [(1.0, None, True), (0.0, None, False), (0.0, b"-01", True), (1.0, b"-00", False), (1.0, b"\xff", True)],
)
def test_which_traces_are_kept(traced, share, header, kept):
    run, spans = traced(share)
    given = {"traceparent": f"00-{TRACE}-{CALLER}".encode() + header} if header else {}
    run.send(REQUEST, headers=given)
    run.finish()
    assert bool(spans()) is kept
    assert int(run.outputs[-1].headers["traceparent"][-2:], 16) & 1 == kept


def test_without_spans_a_context_goes_on_as_it_is(harness):
    run = harness(Asks(), {"m": Script()}, {"users": FakeFeatures({})})
    run.send(REQUEST, headers=HEADERS)
    run.finish()
    assert {name: value for name, value in run.outputs[-1].headers.items() if name in HEADERS} == HEADERS


def test_what_state_holds_is_the_record_as_it_came(traced):
    run, _ = traced()
    run.send(REQUEST, headers=HEADERS)
    held = run.checkpoint()
    sequence = held.names()[0][0]
    assert HEADERS["traceparent"] in held.record(sequence)[1]


def test_without_opentelemetry_the_job_says_what_to_install(monkeypatch):
    plain = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr(importlib, "import_module", absent)
    check(TelemetrySettings())
    with pytest.raises(ConfigError, match=r"pip install 'flink-llm\[otel\]'"):
        check(TelemetrySettings(traces="http://127.0.0.1:9/v1/traces"))
    with pytest.raises(ConfigError, match=r"pip install 'flink-llm\[otel\]'"):
        open_telemetry(TelemetrySettings(traces="http://127.0.0.1:9/v1/traces"), job="j", operator="o", subtask=0)


def test_a_collector_that_is_down_harms_nobody(harness):
    telemetry = open_telemetry(
        TelemetrySettings(traces="http://127.0.0.1:9/v1/traces"), job="j", operator="o", subtask=0
    )

    class Echo(AsyncUdf):
        async def call(self, request: dict, ctx) -> dict:
            return request

    run = harness(Echo(), real_time=True)
    run.shard._telemetry = telemetry
    telemetry.start()
    run.send(REQUEST)
    run.finish()
    telemetry.stop()
    assert run.results() == [REQUEST]
