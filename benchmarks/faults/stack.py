"""What the blows are struck at: a broker, Redis, a cluster of two task managers with ZooKeeper, and one job.

The job reaches broker and store through proxies, so that a network can be cut; whoever counts does not.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks import pipeline
from flink_llm.call import OperatorSettings
from flink_llm.errors import LocalError
from flink_llm.feature_settings import FeatureSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.local import demo_job, processes
from flink_llm.local.broker import Broker, create_topics
from flink_llm.local.cluster import Cluster
from flink_llm.orphans import WORKER
from flink_llm.testing import Script

ROOT = Path(__file__).parents[2]
TASK_MANAGERS, SLOTS, PARALLELISM, PARTITIONS = 2, 2, 2, 4
CHECKPOINT_MS = 200
CHECKPOINT_DISK = "96m"
START_S = 180.0
RESTART_S = 1.0
"""An orchestrator's reaction to a process that died."""
SCRIPT = Script(text="{last}", tokens=4, first_ms=1500, gap_ms=500)
"""A generation lasts 3 s: at 80 requests a second some 240 are in flight, half of them amid their tokens."""
ADAPTIVE = {
    "jobmanager.scheduler": "adaptive",
    "jobmanager.adaptive-scheduler.executing.cooldown-after-rescaling": "1 s",
    "jobmanager.adaptive-scheduler.executing.resource-stabilization-timeout": "1 s",
    "jobmanager.adaptive-scheduler.submission.resource-stabilization-timeout": "2 s",
}
RESTARTS = {
    "restart-strategy.exponential-delay.initial-backoff": "500 ms",
    "restart-strategy.exponential-delay.max-backoff": "2 s",
}


class Stack:
    """All of it, below `folder`, its job in `parallelism` subtasks. A context manager; leaves nothing running."""

    def __init__(self, folder: Path, parallelism: int = PARALLELISM, checkpoint_ms: int = CHECKPOINT_MS) -> None:
        self.folder = folder
        self._parallelism = parallelism
        self._checkpoint_ms = checkpoint_ms
        self._job_folder = folder / "job"
        self.checkpoints = folder / "checkpoints"
        self.job_id = ""
        self.cold_start_s = 0.0
        self.revived = 0
        broker_port, kafka_proxy, self._redis_proxy, self._redis_port, zookeeper = (
            processes.free_port() for _ in range(5)
        )
        inner = processes.free_port()
        listeners = f"PLAINTEXT://127.0.0.1:{{port}},CUT://127.0.0.1:{inner}"
        self.broker = Broker(
            folder,
            broker_port,
            {
                "listeners": f"{listeners},CONTROLLER://127.0.0.1:{{controller}}",
                "advertised.listeners": f"PLAINTEXT://127.0.0.1:{{port}},CUT://127.0.0.1:{kafka_proxy}",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CUT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            },
        )
        self._proxies = {"broker": (kafka_proxy, inner), "redis": (self._redis_proxy, self._redis_port)}
        self.redis = shutil.which("redis-server") is not None
        self.cluster = Cluster(
            folder / "cluster", task_managers=TASK_MANAGERS, slots=SLOTS, properties={**ADAPTIVE, **RESTARTS},
            zookeeper=zookeeper,
        )  # fmt: skip
        self.topics = {name: f"chaos.{name}" for name in ("requests", "responses", "tokens", "failures")}
        self._kafka_proxy = kafka_proxy
        self._own: dict[str, subprocess.Popen[bytes]] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> "Stack":
        with contextlib.ExitStack() as closing:
            self._up(closing)
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def _up(self, closing: contextlib.ExitStack) -> None:
        for folder in (self._job_folder, self.checkpoints):
            folder.mkdir(parents=True)
        closing.enter_context(_small_disk(self.checkpoints))
        closing.callback(self._end_own)
        closing.callback(self.broker.wipe)
        self.broker.up([])
        create_topics(self.broker.bootstrap_servers, [f"{name}:{PARTITIONS}" for name in self.topics.values()])
        for name in self._proxies if self.redis else ("broker",):
            ports = [str(port) for port in self._proxies[name]]
            self.start_own(f"{name}-proxy", [sys.executable, "-m", "benchmarks.faults.proxy", *ports])
        if self.redis:
            self.start("redis")
        self.settings = self._settings()
        closing.enter_context(_importable())
        closing.callback(self._end_host)
        closing.callback(self.cluster.down)
        self.cluster.up()

    def _settings(self) -> pipeline.Settings:
        features = demo_job.prepare(self.folder)
        if self.redis:
            from flink_llm.feature_admin import apply_repo, fill_demo  # Feast is slow to import

            store = {"type": "redis", "connection_string": f"127.0.0.1:{self._redis_proxy}"}
            features = FeatureSettings(repo=features.repo, state=str(self.folder / "redis-state"), online_store=store)
            apply_repo(features)
            fill_demo(features)
        return pipeline.Settings(
            bootstrap_servers=f"127.0.0.1:{self._kafka_proxy}", folder=str(self._job_folder), topics=self.topics,
            handler="Counted", script=SCRIPT, features=features,
            flink=FlinkSettings(
                parallelism=self._parallelism, delivery="exactly_once", checkpoint_interval_ms=self._checkpoint_ms,
                checkpoint_dir=str(self.checkpoints), expected_rate=200, properties=RESTARTS,
            ),
            operator=OperatorSettings(capacity=512, deadline=600, remember_s=30),
        )  # fmt: skip

    def submit(self) -> None:
        """Starts the job and waits until it runs."""
        file = self._job_folder / "settings.json"
        file.write_bytes(msgspec.json.encode(self.settings))
        self.job_id = self.cluster.submit(ROOT / "benchmarks" / "pipeline.py", str(file))

    def started_at(self) -> float:
        """When Flink took the job, epoch seconds."""
        return float(self.cluster.rest(f"/jobs/{self.job_id}")["start-time"]) / 1000

    def in_flight(self) -> int:
        """Calls in flight, as the handlers say."""
        return self.settings.in_flight()

    # Parts and blows.

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of a part: `worker`, `host`, `broker`, `redis`, a proxy, or one of the cluster's."""
        if part == "worker":
            return self.cluster.python_workers()
        if part == "host":
            return _with_argument(str(self._job_folder / "scripts.json"))
        if part == "broker":
            started = self.broker.process
            found = started.process() if started else None
        elif part in self._own:
            own = self._own[part]
            found = psutil.Process(own.pid) if own.poll() is None else None
        else:
            found = self.cluster.process(part)
        return [found] if found else []

    def orphans(self) -> list[psutil.Process]:
        """Python workers that have outlived their task manager."""
        below = {worker.pid for worker in self.cluster.python_workers()}
        conf = str(self.folder / "cluster" / "conf")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = WORKER in process.cmdline() and process.environ().get("FLINK_CONF_DIR") == conf
                if ours and process.pid not in below:
                    found.append(process)
        return found

    def signal(self, part: str, signum: int) -> None:
        """Sends a signal to all processes of a part. Raises RuntimeError where there is none."""
        found = self.processes(part)
        if not found:
            raise RuntimeError(f"there is no {part} to strike")
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def start(self, part: str) -> None:
        """Starts a part that an orchestrator would start anew; worker and host start by themselves."""
        if part == "broker":
            self.broker.up([])
        elif part == "redis":
            folder = self.folder / "redis"
            folder.mkdir(exist_ok=True)
            options = {"port": self._redis_port, "bind": "127.0.0.1", "save": "", "appendonly": "yes", "dir": folder}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            self.start_own("redis", ["redis-server", *words])
            _wait(lambda: processes.answers(self._redis_port), "redis-server")
        elif part in self.cluster.parts:
            self.cluster.start(part)

    def revive(self) -> None:
        """Starts what has ended by itself of the cluster, as an orchestrator would; `revived` counts."""
        for name in self.cluster.parts:
            if self.cluster.process(name) is None:
                self.revived += 1
                time.sleep(RESTART_S)
                self.cluster.start(name)

    def start_own(self, name: str, command: list[str]) -> None:
        """Starts a process that ends with the stack."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._own[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def rescale(self, parallelism: int) -> None:
        """Tells the adaptive scheduler how wide the job shall be."""
        vertices = self.cluster.rest(f"/jobs/{self.job_id}")["vertices"]
        bounds = {"lowerBound": 1, "upperBound": parallelism}
        wanted = {vertex["id"]: {"parallelism": bounds} for vertex in vertices}
        self.cluster.rest(f"/jobs/{self.job_id}/resource-requirements", "PUT", wanted)

    def parallelism(self) -> int:
        """How wide the job runs now, 0 while it does not."""
        with contextlib.suppress(LocalError, urllib.error.URLError):
            vertices = self.cluster.rest(f"/jobs/{self.job_id}")["vertices"]
            if all(vertex["status"] == "RUNNING" for vertex in vertices):
                return max(vertex["parallelism"] for vertex in vertices)
        return 0

    @contextlib.contextmanager
    def disk_full(self) -> Iterator[None]:
        """No byte more can be written to the checkpoints' file system.

        Where none could be mounted, Flink's processes may write no file any further instead.
        """
        if not os.path.ismount(self.checkpoints):
            with _no_more_bytes([process for name in self.cluster.parts for process in self.processes(name)]):
                yield
            return
        ballast = self.checkpoints / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file:
                for size in (1 << 20, 1 << 12):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)) == size:
                            pass
            yield
        finally:
            ballast.unlink()

    def logs(self) -> list[Path]:
        """Flink's log files."""
        return sorted(self.cluster.logs.glob("*"))

    def _end_own(self) -> None:
        for process in self._own.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def _end_host(self) -> None:
        """The model host, and whatever else names this folder."""
        for process in [*self.processes("host"), *_with_argument(str(self.folder)), *self.orphans()]:
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """The client and the workers find the benchmarks, which are not installed."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _with_argument(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any(word.startswith(text) for word in words) and process.pid != os.getpid():
                found.append(process)
    return found


def _wait(done: Callable[[], Any], what: str, patience: float = 30.0) -> None:
    deadline = time.monotonic() + patience
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not answer within {patience:.0f} s")
        time.sleep(0.05)


@contextlib.contextmanager
def _no_more_bytes(processes: list[psutil.Process]) -> Iterator[None]:
    before = [(process, process.rlimit(psutil.RLIMIT_FSIZE)) for process in processes]
    try:
        for process, (_, hard) in before:
            process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
        yield
    finally:
        for process, limits in before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A small file system of its own there, where this process may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={CHECKPOINT_DISK}", "chaos", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)
