"""Flink's reporters by a configuration."""

import os

import pytest

from flink_llm import config, reporters
from flink_llm.errors import ConfigError, LocalError


def test_keys_become_flinks_options(tmp_path):
    telemetry = {"flink_prometheus": "9250-9260", "flink_otlp": "http://c:4317"}
    settings = config.parse({"job": "j", "name": "n", "telemetry": telemetry}, tmp_path).telemetry
    assert reporters.options(settings) == {
        "metrics.reporter.prometheus.factory.class": "org.apache.flink.metrics.prometheus.PrometheusReporterFactory",
        "metrics.reporter.prometheus.port": "9250-9260",
        "metrics.reporter.prometheus.filterLabelValueCharacters": "false",
        "metrics.reporter.otel.factory.class": "org.apache.flink.metrics.otel.OpenTelemetryMetricReporterFactory",
        "metrics.reporter.otel.exporter.endpoint": "http://c:4317",
    }
    assert reporters.options(config.parse({"job": "j", "name": "n"}, tmp_path).telemetry) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("flink_prometheus", "many"), ("flink_otlp", "c:4317"), ("traces", "c"), ("trace_share", 2), ("logs", "xml"),
     ("metrics_port", 0)],
)  # fmt: skip
def test_a_value_that_cannot_be_names_its_key(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"^telemetry\.{key}"):
        config.parse({"job": "j", "name": "n", "telemetry": {key: value}}, tmp_path)


def test_the_mini_cluster_finds_its_jars_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HADOOP_CLASSPATH", "/mine.jar")
    properties = {"metrics.reporter.a.factory.class": "org.apache.flink.metrics.otel.X", "metrics.reporter.b.x": "y"}
    for _ in range(2):
        reporters.to_class_path({**properties, "metrics.reporter.c.factory.class": "example.Own"})
    jar, mine = os.environ["HADOOP_CLASSPATH"].split(os.pathsep)
    assert os.path.basename(jar).startswith("flink-metrics-otel-") and mine == "/mine.jar"
    monkeypatch.setitem(reporters._PACKAGES, "example.", "absent")
    with pytest.raises(LocalError, match=r"example\.Own needs Flink's plugins/metrics-absent"):
        reporters.to_class_path({"metrics.reporter.c.factory.class": "example.Own"})
