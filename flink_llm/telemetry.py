"""What a subtask tells of its records beside Flink's metrics: latencies by stage, and spans."""

from typing import TYPE_CHECKING, Any

from flink_llm.arrivals import Arrival
from flink_llm.clock import REAL, Times
from flink_llm.telemetry_settings import TelemetrySettings
from flink_llm.tracing import RecordSpan, Tracing, otlp
from flink_llm.watching import NOBODY, Watch

if TYPE_CHECKING:
    from flink_llm.stages import Latencies, StageExporter


class Telemetry:
    """Watches the records of one subtask. `start` it before the first, `stop` it after the last."""

    def __init__(
        self,
        latencies: "Latencies | None" = None,
        tracing: Tracing | None = None,
        *,
        operator: str = "handler",
        times: Times = REAL,
        exporter: "StageExporter | None" = None,
    ) -> None:
        self.latencies = latencies
        self.clock = times.clock
        self._tracing = tracing
        self._operator = operator
        self._exporter = exporter

    def start(self) -> None:
        """Begins to tell."""
        if self._exporter is not None:
            self._exporter.start()

    def stop(self) -> None:
        """Tells what is left, and ends it."""
        if self._exporter is not None:
            self._exporter.stop()
        if self._tracing is not None:
            self._tracing.stop()

    def arrived(self, arrival: Arrival) -> tuple[Arrival, Watch]:
        """A record has come: as it goes on from here, and who watches it."""
        at = self.clock()
        if self._tracing is None:
            return arrival, CallWatch(self, at)
        arrival, span = self._tracing.begin(arrival, at, self._operator)
        return arrival, CallWatch(self, at, span)


def watched(telemetry: Telemetry | None, arrival: Arrival) -> tuple[Arrival, Watch]:
    """`Telemetry.arrived`, where there is one."""
    return (arrival, NOBODY) if telemetry is None else telemetry.arrived(arrival)


def open_telemetry(
    settings: TelemetrySettings, *, job: str, operator: str, subtask: int | None = None
) -> Telemetry | None:
    """What the settings ask for, None where that is nothing. Raises ConfigError.

    A subtask that does not know its number gets one of those that are free on this machine.
    """
    if settings.metrics_port is None and settings.traces is None:
        return None
    exporter = tracing = None
    if settings.traces is not None:
        tracing = Tracing(otlp(settings.traces), share=settings.trace_share, service=job)
    if settings.metrics_port is not None:
        from flink_llm.stages import StageExporter  # and Prometheus' client, only where it is to tell

        labels = {"job": job, "operator": operator}
        exporter = StageExporter(settings.metrics_host, settings.metrics_port, labels, subtask=subtask)
    latencies = None if exporter is None else exporter.latencies
    return Telemetry(latencies, tracing, operator=operator, exporter=exporter)


class CallWatch(Watch):
    """One record. It is queued until its call runs, which `call` lasts; then its outcome is to be emitted."""

    __slots__ = ("_arrived", "_began", "_ended", "_span", "_telemetry")

    def __init__(self, telemetry: Telemetry, arrived: float, span: RecordSpan | None = None) -> None:
        self._telemetry = telemetry
        self._arrived = arrived
        self._span = span
        self._began: float | None = None
        self._ended: float | None = None

    def now(self) -> float:
        """See Watch."""
        return self._telemetry.clock()

    def began(self) -> None:
        """See Watch."""
        self._began = self._telemetry.clock()
        self.passed("queue", self._arrived, self._began)

    def ended(self) -> None:
        """See Watch."""
        self._ended = self._telemetry.clock()
        if self._began is not None:
            self.passed("call", self._began, self._ended)

    def emitted(self, call: Any) -> None:
        """See Watch."""
        now = self._telemetry.clock()
        if self._ended is not None:
            self.passed("emit", self._ended, now)
        if self._telemetry.latencies is not None:
            self._telemetry.latencies.observe("total", now - self._arrived)
        if self._span is not None:
            self._span.end(now, call)

    def passed(self, stage: str, since: float, until: float, **facts: Any) -> None:
        """See Watch."""
        if self._telemetry.latencies is not None:
            self._telemetry.latencies.observe(stage, until - since)
        if self._span is not None:
            self._span.stage(stage, since, until, facts)
