"""What a job tells of itself beside Flink's metrics, by its configuration."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

PortRange = Annotated[str, Meta(pattern=r"^[0-9]+(-[0-9]+)?$")]


class TelemetrySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it is off by default.

    `logs` "json" makes each line of workers and host one JSON object. Latencies of the operator's stages are
    read at `metrics_host`:`metrics_port`, by one worker of a machine for all of them; None tells none.
    `traces` is a collector's OTLP address over HTTP, None for no spans; `trace_share` is how many of the traces
    that begin here are kept, 0 to 1: one that a header has begun is kept where that says so.
    `flink_prometheus` is a port, or a range of them, at which Flink's own metrics are read, `flink_otlp` an OTLP
    address over gRPC that they are sent to: on the mini-cluster; a cluster has its own configuration.
    """

    logs: Literal["text", "json"] = "text"
    metrics_port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    metrics_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    traces: Annotated[str, Meta(pattern="^https?://")] | None = None
    flink_prometheus: Annotated[int, Meta(ge=1, le=65535)] | PortRange | None = None
    flink_otlp: Annotated[str, Meta(pattern="^https?://")] | None = None
    trace_share: Annotated[float, Meta(ge=0, le=1)] = 1.0
