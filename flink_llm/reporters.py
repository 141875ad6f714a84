"""Flink's metric reporters, by a job's configuration: for the mini-cluster, and to copy for a cluster.

A cluster loads them from its `plugins/` and reads its own configuration; the mini-cluster looks for them on
its class path, which Java is started with.
"""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from flink_llm.errors import LocalError
from flink_llm.telemetry_settings import TelemetrySettings

PREFIX = "metrics.reporter."
_PACKAGES = {"org.apache.flink.metrics.prometheus.": "prometheus", "org.apache.flink.metrics.otel.": "otel"}


def options(settings: TelemetrySettings) -> dict[str, str]:
    """Flink's options for the reporters that are asked for."""
    found: dict[str, str] = {}
    if settings.flink_prometheus is not None:
        found |= {
            f"{PREFIX}prometheus.factory.class": "org.apache.flink.metrics.prometheus.PrometheusReporterFactory",
            f"{PREFIX}prometheus.port": str(settings.flink_prometheus),
            # Labels as they are: a job's name is then what our own metrics call it.
            f"{PREFIX}prometheus.filterLabelValueCharacters": "false",
        }
    if settings.flink_otlp is not None:
        found |= {
            f"{PREFIX}otel.factory.class": "org.apache.flink.metrics.otel.OpenTelemetryMetricReporterFactory",
            f"{PREFIX}otel.exporter.endpoint": settings.flink_otlp,
        }
    return found


def to_class_path(properties: dict[str, str]) -> None:
    """Has the Java that starts next find the reporters of these options. Raises LocalError: no such jar."""
    names = [value for name, value in properties.items() if name.startswith(PREFIX) and name.endswith("factory.class")]
    jars = [str(jar) for jar in _jars(names)]
    if jars:  # PyFlink takes further jars from Hadoop's variable, and has none of its own
        given = os.environ.get("HADOOP_CLASSPATH", "").split(os.pathsep)
        others = [one for one in given if one and one not in jars]
        os.environ["HADOOP_CLASSPATH"] = os.pathsep.join([*jars, *others])


def _jars(factories: Iterable[str]) -> list[Path]:
    spec = importlib.util.find_spec("pyflink")
    home = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    found = []
    for factory in factories:
        plugin = next((name for package, name in _PACKAGES.items() if factory.startswith(package)), None)
        if plugin is None:  # somebody else's, who has put it where Java finds it
            continue
        jars = sorted((home / "plugins" / f"metrics-{plugin}").glob("*.jar"))
        if not jars:
            raise LocalError(f"telemetry: {factory} needs Flink's plugins/metrics-{plugin}, which is not in {home}")
        found += jars
    return found
