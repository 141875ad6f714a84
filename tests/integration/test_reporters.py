"""Prometheus reads a running job, and a collector is sent to by it: counters, circuits, latencies, spans."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flink_llm.local import processes
from tests.collector import Collector
from tests.test_observability import flinks_own

PROGRAM = """
import asyncio, json, pathlib, sys
from pyflink.common import Duration, WatermarkStrategy
from pyflink.datastream.connectors.file_system import FileSource, StreamFormat
from flink_llm import environment, reporters
from flink_llm.breakers import BreakerSettings
from flink_llm.call import OperatorSettings
from flink_llm.errors import Outage, RecordError
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf
from flink_llm.services import RealServices, ServiceSettings
from flink_llm.telemetry_settings import TelemetrySettings
from flink_llm.udfs.async_operator import apply

flink, own, metrics, traces, flag = sys.argv[1:]

def services():
    made = RealServices(ServiceSettings(breaker=BreakerSettings(failures=1, reset_s=3600)))
    made.breakers.named("features.gone").enter().ended(Outage("no answer"))
    return made

class Some(AsyncUdf):
    async def call(self, request: dict, ctx) -> dict:
        if request["is"] == "bad":
            raise RecordError("invalid", "no")
        while request["is"] == "slow" and not pathlib.Path(flag).exists():
            await asyncio.sleep(0.1)
        ctx.log.warning("answered")
        ctx.metrics.add("degraded")
        return request

telemetry = TelemetrySettings(
    flink_prometheus=flink, metrics_port=int(own), flink_otlp=metrics, traces=traces, logs="json"
)
options = reporters.options(telemetry) | {"metrics.reporter.otel.interval": "1 SECONDS"}
env = environment.environment(options, kafka=False)
environment.configure(env, FlinkSettings(), capacity=64)
lines = [json.dumps({"session_id": "s", "request_id": name, "is": name}) for name in ("good", "bad", "slow")]
folder = pathlib.Path(flag).parent / "lines"
folder.mkdir()
(folder / "all").write_text("\\n".join(lines))
source = FileSource.for_record_stream_format(StreamFormat.text_line_format(), folder.as_uri())
source = source.monitor_continuously(Duration.of_seconds(1)).build()  # input that ends would hold its last bundle
stream = env.from_source(source, WatermarkStrategy.no_watermarks(), "lines")
settings = OperatorSettings(job="my-job", deadline=None, telemetry=telemetry)
out = apply(stream, Some(), key="session_id", uid="some", settings=settings, services=services)
for stream in (out.results, out.failures):
    stream.print()
env.execute("my-job")
"""
GROUP = "flink_taskmanager_job_task_operator_flink_llm_"
PATIENCE_S = 60
OTEL = "flink.taskmanager.job.task.operator.flink_llm."


def scraped(port):
    """Samples by name, stage and job."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except OSError:
        return {}
    samples = [sample for family in families for sample in family.samples]
    labels = ("stage", "job_name", "job")
    return {(one.name, *filter(None, map(one.labels.get, labels))): one.value for one in samples}


@pytest.fixture
def collector():
    with Collector() as listening:
        yield listening


def test_a_scrape_and_a_collector_have_our_names(tmp_path, collector):
    flink, own = processes.free_port(), processes.free_port()
    program, flag = tmp_path / "some.py", tmp_path / "flag"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(flink), str(own), collector.metrics_at, collector.traces_at, str(flag)]
    with (tmp_path / "log").open("w") as log:
        environ = {**os.environ, "FLINK_LOG_DIR": str(tmp_path)}
        job = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
    try:
        deadline = time.monotonic() + 120
        wanted = {f"{GROUP}{name}": value for name, value in
                  {"results": 1, "failures_invalid": 1, "degraded": 1, "in_flight": 1, "blocked": 0, "failures_shed": 0,
                   "breaker_features_gone": 2}.items()}  # fmt: skip
        latencies = {"total": 2, "queue": 3, "call": 2, "emit": 2}
        found = told = {}
        while time.monotonic() < deadline and job.poll() is None and (found != wanted or told != latencies):
            time.sleep(0.5)
            samples = scraped(flink)
            found = {name: samples.get((name, "my-job")) for name in wanted}
            samples = scraped(own)
            told = {stage: samples.get(("flink_llm_stage_seconds_count", stage, "my-job")) for stage in latencies}
        flinks = {name for name, *_ in scraped(flink)}
        assert (found, told) == (wanted, latencies), (tmp_path / "log").read_text()[-3000:]
        assert flinks_own() - flinks == set()
        sent = {f"{OTEL}{name}": value for name, value in {"results": 1, "failures.invalid": 1, "in_flight": 1,
                                                           "breaker.features.gone": 2}.items()}  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and {name: collector.values.get(name) for name in sent} != sent:
            time.sleep(0.2)
        assert {name: collector.values.get(name) for name in sent} == sent, sorted(collector.values)
        flag.touch()
        said, deadline = [], time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and len(said) < 2:
            time.sleep(0.5)
            lines = "".join(file.read_text(errors="replace") for file in tmp_path.glob("*.log*")).splitlines()
            said = [json.loads(line[line.index("{") :]) for line in lines if '"message": "answered"' in line]
        assert [(one["request_id"], one["operator"]) for one in said] == [("good", "some"), ("slow", "some")]
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and len(collector.records()) < 3:
            time.sleep(0.2)
        assert collector.records() == {"good": None, "bad": "invalid", "slow": None}
        assert {"queue", "call", "emit"} <= collector.stages_of("good")
    finally:
        job.kill()
        job.wait()
