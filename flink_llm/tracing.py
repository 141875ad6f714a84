"""Spans of records by OpenTelemetry, for whoever has asked for them: the extra `otel`.

A record's span hangs below the trace context (W3C) of its Kafka headers, or begins a trace. What goes on from
the record, its outcomes and the handler's `ctx.headers`, carries the context of that span.
"""

import importlib
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from flink_llm.arrivals import Arrival
from flink_llm.call import Call, Failed
from flink_llm.clock import REAL, Times
from flink_llm.errors import ConfigError
from flink_llm.telemetry_settings import TelemetrySettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

HEADERS = ("traceparent", "tracestate")
EXPORT_S, STOP_S = 5.0, 2.0
"""How long an export may take, and the last one. What the collector does not take is dropped."""
_FACTS = {
    "model": "gen_ai.request.model",
    "generation": "gen_ai.response.id",
    "kind": "gen_ai.operation.name",
    "view": "flink_llm.feature_view",
    "queue_ms": "flink_llm.host_queue_ms",
}


class Tracing:
    """Makes spans and hands those that have ended to `processor`. `share` of the traces that begin here are kept.

    Raises ConfigError where OpenTelemetry is not installed.
    """

    def __init__(self, processor: "SpanProcessor", *, share: float, service: str, times: Times = REAL) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider, sampling
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise _missing() from error
        self._trace = trace
        self._provider = TracerProvider(
            sampler=sampling.ParentBasedTraceIdRatio(share),
            resource=Resource.create({"service.name": service}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("flink_llm")
        self._propagator = TraceContextTextMapPropagator()
        self._epoch_s = times.wall() - times.clock()

    def stop(self) -> None:
        """Sends what is left, for a moment."""
        sending = threading.Thread(target=self._provider.shutdown, name="flink-llm spans", daemon=True)
        sending.start()
        sending.join(STOP_S)

    def begin(self, arrival: Arrival, at: float, operator: str) -> "tuple[Arrival, RecordSpan]":
        """The span of a record that arrives, and the record as it goes on from here."""
        given = {name: arrival.headers[name] for name in HEADERS if arrival.headers.get(name) is not None}
        carrier = {name: (value or b"").decode("ascii", "replace") for name, value in given.items()}
        parent = self._propagator.extract(carrier)
        place = {
            "messaging.system": "kafka",
            "messaging.destination.name": arrival.topic,
            "messaging.destination.partition.id": None if arrival.partition is None else str(arrival.partition),
            "messaging.kafka.offset": arrival.offset,
        }
        known = {name: value for name, value in place.items() if value is not None and arrival.topic is not None}
        kind = self._trace.SpanKind.CONSUMER
        span = self._tracer.start_span(
            f"{operator} process", parent, kind=kind, attributes=known, start_time=self._nanoseconds(at)
        )
        context = self._trace.set_span_in_context(span, parent)
        out: dict[str, str] = {}
        self._propagator.inject(out, context)
        others = {name: value for name, value in arrival.headers.items() if name not in HEADERS}
        headers = {**others, **{name: value.encode() for name, value in out.items()}}
        return msgspec.structs.replace(arrival, headers=headers), RecordSpan(self, span, context)

    def stage(self, context: Any, name: str, since: float, until: float, facts: dict[str, Any]) -> None:
        """A stage that is over, below the record's span."""
        attributes = {_FACTS.get(fact, fact): value for fact, value in facts.items() if value not in (None, "")}
        began = self._nanoseconds(since)
        self._tracer.start_span(name, context, attributes=attributes, start_time=began).end(self._nanoseconds(until))

    def end(self, span: "Span", at: float, call: Call) -> None:
        """A record's outcome is in Flink's hands."""
        if call.request_id is not None:
            span.set_attribute("flink_llm.request_id", call.request_id)
        if isinstance(call.outcome, Failed):
            span.set_status(self._trace.StatusCode.ERROR, call.outcome.code)
            span.set_attribute("error.type", call.outcome.code)
        span.end(self._nanoseconds(at))

    def _nanoseconds(self, at: float) -> int:
        return int((at + self._epoch_s) * 1e9)


class RecordSpan:
    """The span of one record."""

    __slots__ = ("_context", "_kept", "_of", "_span")

    def __init__(self, of: Tracing, span: "Span", context: Any) -> None:
        self._of = of
        self._span = span
        self._context = context
        self._kept = span.is_recording()

    def stage(self, name: str, since: float, until: float, facts: dict[str, Any]) -> None:
        """A stage is over."""
        if self._kept:
            self._of.stage(self._context, name, since, until, facts)

    def end(self, at: float, call: Call) -> None:
        """The record's outcome is in Flink's hands."""
        self._of.end(self._span, at, call)


def otlp(endpoint: str) -> "SpanProcessor":
    """Spans in batches to a collector's OTLP address over HTTP, on a thread of their own. Raises ConfigError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise _missing() from error
    return BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_S))


def check(settings: TelemetrySettings) -> None:
    """Raises ConfigError where these settings ask for spans, and this Python has no OpenTelemetry."""
    if settings.traces is None:
        return
    try:
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise _missing() from error


def _missing() -> ConfigError:
    return ConfigError("telemetry.traces needs OpenTelemetry: pip install 'flink-llm[otel]'")
