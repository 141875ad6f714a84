"""A job in a process of its own, Kafka to Kafka over the scripted host, and what watches it.

`python -m benchmarks.pipeline SETTINGS.json` is the job; `Pipeline` starts it and can kill its worker.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from flink_llm.call import OperatorSettings
from flink_llm.engine.settings import HostSettings
from flink_llm.feature_settings import FeatureSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.kafka_settings import KafkaSettings
from flink_llm.local import processes
from flink_llm.local.broker import Broker, create_topics
from flink_llm.local.cluster import last_words
from flink_llm.orphans import WORKER
from flink_llm.services import ServiceSettings
from flink_llm.testing import Script

START_S = 120.0
METRICS_S = 30.0


class Settings(Struct, frozen=True, kw_only=True):
    """One run. `handler` is a class of benchmarks.handlers; `more` are models beside "scripted", by name."""

    bootstrap_servers: str
    folder: str
    topics: dict[str, str]
    handler: str = "Echo"
    script: Script = Script()
    more: dict[str, Script] = {}
    flink: FlinkSettings = FlinkSettings()
    operator: OperatorSettings = OperatorSettings()
    features: FeatureSettings | None = None

    @property
    def gauge(self) -> str:
        """Of the files in which the workers' handlers say how many calls are in flight."""
        return f"{self.folder}/in-flight"

    @property
    def staged(self) -> bool:
        """Whether its handler stamps what it does, see benchmarks.stages."""
        return self.handler.startswith("Staged")

    def in_flight(self) -> int:
        """Calls in flight, as the handlers of the workers that are alive last said."""
        found = 0
        for file in Path(self.folder).glob("in-flight.*"):
            with contextlib.suppress(OSError, ValueError):
                found += int(file.read_text()) if psutil.pid_exists(int(file.suffix[1:])) else 0
        return found


def job(settings: Settings) -> None:
    """Builds the job and runs it until it is stopped."""
    from benchmarks import handlers
    from flink_llm import environment, kafka
    from flink_llm.udfs.async_operator import apply

    chosen = getattr(handlers, settings.handler)
    if settings.handler == "Counted":
        udf = chosen(settings.gauge, features=settings.features is not None)
    else:
        udf = chosen(settings.folder) if settings.staged else chosen()
    scripts = {"scripted": settings.script, **settings.more}
    host = scripted_host(Path(settings.folder), scripts)
    env = environment.environment(settings.flink.properties)
    environment.configure(env, settings.flink, capacity=settings.operator.capacity)
    tables = environment.tables(env)
    servers = KafkaSettings(bootstrap_servers=settings.bootstrap_servers, group=Path(settings.folder).name)
    requests = kafka.source(tables, servers, [settings.topics["requests"]], uid="requests")
    services = ServiceSettings(models={name: name for name in scripts}, host=host, features=settings.features)
    out = apply(requests, udf, key="session_id", uid="bench", settings=settings.operator, services=services)
    delivery = settings.flink.delivery
    kafka.sink(tables, out.results, servers, [settings.topics["responses"]], uid="responses", delivery=delivery)
    kafka.sink(tables, out.partials, servers, [settings.topics["tokens"]], uid="tokens")
    kafka.sink(tables, out.failures, servers, [settings.topics["failures"]], uid="failures", delivery=delivery)
    env.execute("benchmark")


def scripted_host(folder: Path, scripts: dict[str, Script]) -> HostSettings:
    """A real host whose models say what `scripts` tell them to; one folder, one host."""
    file = folder / "scripts.json"
    file.write_bytes(msgspec.json.encode(scripts))
    return HostSettings(launcher="flink_llm.testing", launcher_args=[str(file)], linger_s=5.0, device="cpu")


@contextlib.contextmanager
def local_kafka(properties: Mapping[str, str] | None = None) -> Iterator[tuple[str, Path]]:
    """A broker of its own, empty: its bootstrap servers, and a folder. Gone at the end, whatever the end is."""
    with tempfile.TemporaryDirectory(prefix="flink-llm-") as name:
        broker = Broker(Path(name), properties=properties)
        with processes.cleaned_up(broker.wipe):
            broker.up([])
            yield broker.bootstrap_servers, Path(name)


class Pipeline:
    """The job as a process. A context manager; leaves nothing running."""

    def __init__(self, bootstrap_servers: str, folder: Path, **chosen: Any) -> None:
        mark = uuid.uuid4().hex[:8]
        self.folder = folder / f"bench-{mark}"
        self.topics = {name: f"{name}.{mark}" for name in ("requests", "responses", "tokens", "failures")}
        self.settings = Settings(
            bootstrap_servers=bootstrap_servers, folder=str(self.folder), topics=self.topics, **chosen
        )
        self.log = self.folder / "job.log"
        self._started: processes.Started | None = None

    def __enter__(self) -> "Pipeline":
        self.folder.mkdir(parents=True)
        create_topics(self.settings.bootstrap_servers, self.topics.values())
        file = self.folder / "settings.json"
        file.write_bytes(msgspec.json.encode(self.settings))
        command = [sys.executable, "-m", "benchmarks.pipeline", str(file)]
        root = str(Path(__file__).parents[1])
        environ = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1", "FLINK_LOG_DIR": str(self.folder)}
        if self.settings.staged:
            environ |= {"JAVA_TOOL_OPTIONS": f"-Xlog:safepoint:file={self.folder}/pauses.%p:tm"}
        self._started = processes.start(command, self.log, environ)
        return self

    def __exit__(self, *error: object) -> None:
        if self._started is not None:
            processes.stop(self._started, 5)

    def job(self) -> psutil.Process:
        """The job's own process, below which its Java and its workers are. Raises RuntimeError when it has ended."""
        main = self._started.process() if self._started else None
        if main is None:
            words = last_words(self.log.read_text(errors="replace"))
            raise RuntimeError(f"the job has ended: {words} (log: {self.log})")
        return main

    def workers(self) -> list[psutil.Process]:
        """The Python workers of the job."""
        found = []
        for process in self.job().children(recursive=True):
            try:
                if WORKER in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_worker(self, at_least: int = 1) -> int:
        """kill -9 of every Python worker, once `at_least` calls are in flight; how many were, 0 for no blow."""
        workers = self.workers()  # looked up before the count is read: a burst may end meanwhile
        in_flight = self.settings.in_flight()
        if not workers or in_flight < at_least:
            return 0
        for process in workers:
            os.kill(process.pid, signal.SIGKILL)
        return in_flight


def rest(port: int, path: str) -> Any:
    """What Flink's REST interface says of the one job there is."""
    address = f"http://127.0.0.1:{port}/jobs"
    identifier = json.load(urllib.request.urlopen(address))["jobs"][0]["id"]
    return json.load(urllib.request.urlopen(f"{address}/{identifier}{path}"))


def restarts(port: int) -> int:
    """How often Flink has restarted the one job there is. Its metrics are fetched at first asking: some seconds."""
    deadline = time.monotonic() + METRICS_S
    while time.monotonic() < deadline:
        found = rest(port, "/metrics?get=numRestarts")
        if found:
            return int(float(found[0]["value"]))
        time.sleep(0.5)
    raise RuntimeError(f"Flink gave no numRestarts within {METRICS_S:.0f} s")


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def requests(first: int, count: int, keys: int) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of requests `r<first>` and on, over `keys` sessions."""
    for i in range(first, first + count):
        session = f"s{i % keys}"
        messages = [{"role": "user", "content": f"hello {i}"}]
        value = {"request_id": f"r{i}", "session_id": session, "messages": messages}
        yield session.encode(), json.dumps(value).encode()


def warm_up(pipeline: Pipeline, producer: Any, consumer: Any) -> None:
    """Sends one request and waits for its answer. Raises RuntimeError when none comes."""
    value = {"request_id": "warm-up", "session_id": "warm-up", "messages": [{"role": "user", "content": "x"}]}
    producer.send(pipeline.topics["requests"], key=b"w", value=json.dumps(value).encode())
    producer.flush()
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        pipeline.workers()
        if consumer.poll(timeout_ms=200):
            return
    raise RuntimeError(f"no answer within {START_S:.0f} s, see {pipeline.log}")


if __name__ == "__main__":
    job(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Settings))
