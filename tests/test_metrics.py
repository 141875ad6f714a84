"""Metrics: what the table says is what there is, and what a real host counts is what it did."""

import asyncio
import logging
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flink_llm import config, stages
from flink_llm.engine import metrics_endpoint
from flink_llm.engine.client import open_engine
from flink_llm.engine.generation import Model
from flink_llm.engine.launch import _command
from flink_llm.engine.metrics import Metrics
from flink_llm.engine.metrics_endpoint import MetricsEndpoint
from flink_llm.engine.place import socket_path
from flink_llm.engine.readers import Embedder
from flink_llm.engine.settings import HostSettings
from flink_llm.errors import ConfigError, RecordError
from tests import tiny

TABLE = re.compile(r"^\| `(flink_llm_\w+)` \| (\w+) \| ([\w, ]+) \|", re.MULTILINE)
Read = dict[tuple[str, ...], float]


def until(condition: Callable[[], object], patience: float = 30.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def read(port: int) -> Read:
    """Samples by name, then the values of their labels but for the hash, in the order of the labels' names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "model_hash")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sampled(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"flink_llm_{name}", {"model": "m", "model_hash": "a" * 12, **labels})


def test_the_table_in_the_docs_is_what_there_is() -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text().partition("## The operator's")[0]
    told = {(name, kind, tuple(labels.split(", "))) for name, kind, labels in TABLE.findall(page)}
    metrics = Metrics()
    there = {
        (family._name + ("_total" if family._type == "counter" else ""), family._type, tuple(family._labelnames))
        for family in vars(metrics).values()
        if hasattr(family, "_labelnames")
    }
    assert told == there
    names = {name.removesuffix("_total") for name, _, _ in told}
    assert {family.name for family in metrics.registry.collect()} == names
    asked = set(re.findall(r"flink_llm_\w+", page)) - {name for name, _, _ in told}
    assert {re.sub("_(sum|count|bucket)$", "", name) for name in asked} <= names


def test_a_request_waits_runs_and_ends_once() -> None:
    metrics = Metrics()
    model = metrics.model("m", "a" * 64)
    one, other = model.request(0, now=10.0), model.request(99, now=10.0)
    assert (sampled(metrics, "queue_length", lane="0"), sampled(metrics, "queue_length", lane="9")) == (1, 1)
    for _ in range(2):
        one.began(10.5, reused=30)
    assert (sampled(metrics, "queue_length", lane="0"), sampled(metrics, "requests_running", lane="0")) == (0, 1)
    one.read(12)
    for now in (11.0, 11.1, 11.2):
        one.token(now)
    for _ in range(2):
        one.ended("stop", now=11.5)
        other.ended("refused_full")
    assert {name: sampled(metrics, name, lane="0") for name in (
        "queue_length", "requests_running", "queue_seconds_sum", "queue_seconds_count", "prompt_tokens_read_total",
        "prompt_tokens_reused_total", "completion_tokens_total", "time_to_first_token_seconds_sum",
        "time_per_output_token_seconds_sum", "request_seconds_sum",
    )} == pytest.approx({
        "queue_length": 0, "requests_running": 0, "queue_seconds_sum": 0.5, "queue_seconds_count": 1,
        "prompt_tokens_read_total": 12, "prompt_tokens_reused_total": 30, "completion_tokens_total": 3,
        "time_to_first_token_seconds_sum": 1.0, "time_per_output_token_seconds_sum": 0.1, "request_seconds_sum": 1.5,
    })  # fmt: skip
    assert sampled(metrics, "requests_total", lane="0", outcome="stop") == 1
    assert sampled(metrics, "requests_total", lane="9", outcome="refused_full") == 1
    assert (sampled(metrics, "queue_length", lane="9"), sampled(metrics, "queue_seconds_count", lane="9")) == (0, 0)


class Cache:
    """Tokens in a cache, as `Decoding` tells them."""

    def held(self, busy: bool) -> int:
        return 7 if busy else 5


def test_a_model_that_is_gone_leaves_no_series() -> None:
    metrics, cache = Metrics(), Cache()
    for name in ("m", "other"):
        model = metrics.model(name, name[0] * 64)
        model.watch_cache(4, 512, cache.held)
        model.step(3)
        model.request(5).ended("cancelled")
    metrics.forget("m" * 64)
    metrics.forget("unknown")
    left = {sample.labels["model"] for family in metrics.registry.collect() for sample in family.samples}
    assert left == {"other"}


def test_a_port_that_is_taken_is_one_line_and_is_had_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_endpoint, "RETRY_S", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        endpoint = MetricsEndpoint(Metrics().registry, "127.0.0.1", port)
        with caplog.at_level(logging.INFO):
            endpoint.start()
            until(lambda: caplog.records)
            time.sleep(0.1)
            assert [record.getMessage() for record in caplog.records] == [
                f"host.metrics_port: no metrics on 127.0.0.1:{port} (Address already in use); "
                "the models are served, and it is tried again"
            ]
    try:
        until(lambda: endpoint.address)
        assert endpoint.address == ("127.0.0.1", port)
        assert read(port) == {}
    finally:
        endpoint.stop()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_metrics_are_off_and_local_unless_asked_for() -> None:
    plain = _command(HostSettings(), "cpu", Path("x"))
    assert not [word for word in plain if word.startswith("--metrics")]
    asked = _command(HostSettings(metrics_port=0), "cpu", Path("x"))
    assert asked[asked.index("--metrics-port") :][:4] == ["--metrics-port", "0", "--metrics-host", "127.0.0.1"]


def test_an_address_that_cannot_be_is_said_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = MetricsEndpoint(Metrics().registry, "a..b", 0)
    endpoint.start()
    until(lambda: caplog.records)
    endpoint.stop()
    assert caplog.records[0].getMessage().startswith("host.metrics_port: no metrics on a..b:0 (")


def test_without_a_host_nobody_serves_metrics(tmp_path: Path) -> None:
    raw = {"job": "j", "name": "n", "host": {"engine": "embedded", "metrics_port": 9105}}
    with pytest.raises(ConfigError, match=r"^host\.metrics_port: .* host\.engine is embedded"):
        config.parse(raw, tmp_path)
    config.parse(raw | {"host": {"metrics_port": 9105}}, tmp_path)


def test_where_metrics_are_makes_no_other_host(tmp_path: Path) -> None:
    plain, asked = (HostSettings(socket_dir=str(tmp_path), metrics_port=port) for port in (None, 9105))
    assert socket_path(plain) == socket_path(asked)


class Hosted:
    """A host in a process of its own, with its settings and the port of its metrics."""

    def __init__(self, folder: Path) -> None:
        self.settings = HostSettings(
            device="cpu", slots=2, queue=3, threads=1, socket_dir=str(folder), metrics_port=0, linger_s=300.0
        )
        self.path = socket_path(self.settings)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(_command(self.settings, "cpu", self.path), stderr=log)
        until(lambda: re.search(r"metrics are at http://127\.0\.0\.1:(\d+)/metrics", self.log.read_text()), 60)
        until(self.path.exists)
        self.port = int(re.findall(r":(\d+)/metrics", self.log.read_text())[0])


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[Hosted]:
    host = Hosted(tmp_path)
    yield host
    host.process.terminate()
    host.process.wait(30)


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_real_host_tells_what_it_did(hosted: Hosted, tmp_path: Path) -> None:
    generates, embeds = tiny.decoder(tmp_path / "tiny"), tiny.encoder(tmp_path / "embedding", "embedding")

    async def work() -> tuple[list[int], list[int], float]:
        engine = open_engine(hosted.settings)
        model, embedder = Model(engine, "tiny", str(generates)), Embedder(engine, "embedding", str(embeds))
        try:
            await asyncio.gather(model.load(), embedder.load())
            began = time.monotonic()
            long = "the same beginning of everybody's prompt " * 3
            replies = [await model.generate(long + end, max_tokens=8) for end in "ab"]
            lasted = time.monotonic() - began
            left_early = model.generate("hello", max_tokens=500)
            async for _ in left_early:
                left_early.cancel()
            with pytest.raises(RecordError):
                await model.chat(say("x" * 600))
            vectors = [await embedder("hello"), await embedder("hello world")]
            usages = [reply.usage for reply in replies]
            left = ("flink_llm_requests_total", "5", "tiny", "cancelled")
            await asyncio.to_thread(until, lambda: read(hosted.port).get(left))
            assert len(vectors) == 2
            return [u.prompt_tokens for u in usages], [u.completion_tokens for u in usages], lasted
        finally:
            await engine.close()

    prompts, completions, lasted = asyncio.run(work())
    found = read(hosted.port)

    def tiny_s(name: str, *labels: str) -> float:
        return found[f"flink_llm_{name}", *labels]

    assert sum(found.get(("flink_llm_requests_total", "5", "tiny", end), 0) for end in ("stop", "length")) == 2
    assert tiny_s("requests_total", "5", "tiny", "invalid") == 1
    assert tiny_s("requests_total", "5", "tiny", "cancelled") == 1
    assert tiny_s("requests_total", "5", "embedding", "stop") == 2
    assert (tiny_s("queue_length", "5", "tiny"), tiny_s("requests_running", "5", "tiny")) == (0, 0)
    read_, reused = tiny_s("prompt_tokens_read_total", "5", "tiny"), tiny_s("prompt_tokens_reused_total", "5", "tiny")
    cancelled = len("hello")
    assert read_ + reused == sum(prompts) + cancelled
    assert reused >= prompts[0] - 1
    assert tiny_s("completion_tokens_total", "5", "tiny") >= sum(completions) + 1
    assert tiny_s("queue_seconds_count", "5", "tiny") == tiny_s("time_to_first_token_seconds_count", "5", "tiny") == 3
    assert tiny_s("request_seconds_count", "5", "tiny") == 2
    assert 0 < tiny_s("request_seconds_sum", "5", "tiny") <= lasted
    assert 0 < tiny_s("time_per_output_token_seconds_sum", "5", "tiny") < lasted
    steps = tiny_s("batch_size_count", "tiny")
    assert tiny_s("batch_size_sum", "tiny") == steps >= sum(completions) - 2
    assert tiny_s("batch_size_sum", "embedding") == 2
    assert (tiny_s("slots", "tiny"), tiny_s("cache_capacity_tokens", "tiny")) == (2, 1024)
    assert tiny_s("cache_tokens", "tiny", "used") == 0
    assert 0 < tiny_s("cache_tokens", "tiny", "kept") <= 1024
    assert ("flink_llm_slots", "embedding") not in found


def test_the_operators_table_is_what_it_counts() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "metrics.md").read_text().partition("## The operator's")[2]
    page, _, latencies = page.partition("## Latencies by stage")
    told = {name.removesuffix("CODE") for name in re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)}
    files = [*(root / "flink_llm").glob("*.py"), *(root / "udfs").glob("*.py")]
    calls = [re.findall(r'metrics\.add\(f?"([\w.]+)', file.read_text()) for file in files]
    assert told == {name for found in calls for name in found}
    assert tuple(re.findall(r"^\| `(\w+)` \| [^|]+ \|$", latencies, re.MULTILINE)) == stages.STAGES
    assert TABLE.findall(latencies) == [(stages.NAME, "histogram", ", ".join((*stages.LABELS, "stage")))]
