"""Latencies of stages: what is counted, who tells it, and what becomes of it when a worker goes."""

import json
import os
import socket
import time
import urllib.request
from bisect import bisect_left

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from flink_llm.clock import Times
from flink_llm.engine import metrics_endpoint
from flink_llm.engine.metrics import LATENCY_S
from flink_llm.handler import AsyncUdf
from flink_llm.stages import ALIVE_S, NAME, Latencies, Shared, SharedLatencies, StageExporter
from flink_llm.telemetry import Telemetry
from flink_llm.testing import FakeFeatures, Script

LABELS = {"job": "j", "operator": "o", "subtask": "0"}


def read(folder):
    registry = CollectorRegistry()
    registry.register(SharedLatencies(folder))
    return registry.get_sample_value


@settings(deadline=None)  # it writes files
@given(st.lists(st.floats(0, 200)))
def test_buckets_are_prometheus_own(tmp_path_factory, took):
    folder, latencies = tmp_path_factory.mktemp("shared"), Latencies()
    for seconds in took:
        latencies.observe("call", seconds)
    Shared(latencies, folder, LABELS).write()
    value = read(folder)
    labels = {**LABELS, "stage": "call"}
    assert (value(f"{NAME}_count", labels) or 0) == len(took)
    assert (value(f"{NAME}_sum", labels) or 0) == pytest.approx(sum(took))
    for bound in LATENCY_S if took else ():
        under = sum(seconds <= bound for seconds in took)
        assert value(f"{NAME}_bucket", {**labels, "le": str(float(bound))}) == under


def test_stages_of_a_call(harness):
    class Asks(AsyncUdf):
        async def open(self, ctx):
            self.model, self.users = ctx.model("m"), ctx.features("users")

        async def call(self, request: dict, ctx) -> dict:
            await self.users.get(user_id="u")
            reply = await self.model.generate("x")
            return {"text": reply.text}

    script = Script(tokens=["a", "b", "c"], first_ms=2000, gap_ms=500, text="")
    users = FakeFeatures({"u": {"n": 1}}, delay_s=0.2)
    run = harness(Asks(), {"m": script}, {"users": users})
    latencies = watched(run)
    run.send({"session_id": "s", "request_id": "r"})
    run.finish()
    took = {stage: round(seconds, 1) for stage, seconds in latencies.sums.items()}
    assert sum(map(sum, latencies.counts.values())) == len(took)
    assert took == {
        "queue": 0, "features": 0.2, "prefill": 2.0, "decode": 1.0, "model": 3.0, "call": 3.2, "emit": 0, "total": 3.2
    }  # fmt: skip


def watched(run):

    latencies = Latencies()
    run.shard._telemetry = Telemetry(latencies, times=Times(run.loop.time, run.loop.wall))
    return latencies


def test_a_record_that_is_refused_or_repeated_has_a_total_alone(harness):
    class Echo(AsyncUdf):
        async def call(self, request: dict, ctx) -> dict:
            return request

    run = harness(Echo())
    latencies = watched(run)
    for request in ({"session_id": "s", "request_id": "r"}, None, {"session_id": "s", "request_id": "r"}):
        run.send(request)
        run.finish()
    assert [output.kind for output in run.outputs] == ["result", "failure", "result"]
    assert {stage: sum(counts) for stage, counts in latencies.counts.items() if any(counts)} == {
        "queue": 1, "call": 1, "emit": 1, "total": 3
    }  # fmt: skip


def test_workers_come_and_go(tmp_path):
    def worker(subtask, seconds):
        latencies = Latencies()
        latencies.observe("total", seconds)
        shared = Shared(latencies, tmp_path, {**LABELS, "subtask": subtask})
        shared.write()
        return shared

    def told(subtask):
        return read(tmp_path)(f"{NAME}_sum", {**LABELS, "subtask": subtask, "stage": "total"})

    first, killed = worker("0", 1.0), worker("1", 2.0)
    assert (told("0"), told("1")) == (1.0, 2.0)
    gone = tmp_path / "another-process.json"  # of the same subtask, whose place `first` has taken
    gone.write_text(json.dumps({**json.loads(first._file.read_text()), "since": 0.0, "sums": {"total": 9.0}}))
    (tmp_path / "broken.json").write_text("{")
    assert told("0") == 1.0
    os.utime(killed._file, (0, time.time() - ALIVE_S - 1))
    assert told("1") is None
    assert not killed._file.exists()
    first.start()
    first.stop()
    assert told("0") == 9.0


def test_one_worker_tells_for_all_and_another_takes_over(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_endpoint, "RETRY_S", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one, other = (StageExporter("127.0.0.1", port, LABELS, subtask=s, folder=tmp_path) for s in (0, 1))

    def told():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {s.labels["subtask"] for family in families for s in family.samples}

    def until(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    one.start()
    until(lambda: one._endpoint.address)
    other.start()
    for exporter in (one, other):
        exporter.latencies.observe("total", 1.0)
        exporter._shared.write()
    assert told() == {"0", "1"}
    one.stop()
    until(lambda: other._endpoint.address)
    assert told() == {"1"}
    other.stop()
    assert not list(tmp_path.glob("*.json"))


def test_bounds_rise():
    assert [bisect_left(LATENCY_S, bound) for bound in LATENCY_S] == list(range(len(LATENCY_S)))
