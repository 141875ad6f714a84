"""Latencies of the operator's stages as Prometheus histograms: PyFlink has none that reach a reporter.

A worker counts in memory and writes what it has, once a second, to a small file of its own. Whichever worker
of the machine has the port reads all of these files when it is asked, so that there is one address for all
workers, however many there are and however they come and go (docs/adr/0021).
"""

import hashlib
import json
import logging
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from flink_llm.engine.metrics import LATENCY_S
from flink_llm.engine.metrics_endpoint import MetricsEndpoint
from flink_llm.engine.place import socket_folder
from flink_llm.engine.settings import HostSettings

log = logging.getLogger(__name__)
STAGES = ("queue", "features", "prefill", "decode", "model", "call", "emit", "total")
NAME = "flink_llm_stage_seconds"
LABELS = ("job", "operator", "subtask")
WRITE_S, ALIVE_S = 1.0, 30.0
"""How often a worker writes, and how old a file may be before its worker is taken for dead: its series end."""
_LE = (*map(str, map(float, LATENCY_S)), "+Inf")
_TAKEN = "telemetry.metrics_port: %s:%d is no address of ours (%s); whoever has it tells our latencies too, or nobody"


class Latencies:
    """How many took how long, by stage. A stage is observed by one thread; any thread may read."""

    def __init__(self) -> None:
        self.counts = {stage: [0] * len(_LE) for stage in STAGES}
        self.sums = dict.fromkeys(STAGES, 0.0)

    def observe(self, stage: str, seconds: float) -> None:
        """One more."""
        self.counts[stage][bisect_left(LATENCY_S, seconds)] += 1
        self.sums[stage] += seconds


class Shared:
    """Has the latencies of one subtask written to `folder`, by a thread of its own."""

    def __init__(self, latencies: Latencies, folder: Path, labels: dict[str, str]) -> None:
        self._latencies = latencies
        self._labels = labels
        self._file = folder / f"{_digest(labels)}-{os.getpid()}.json"
        self._since = time.time()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flink-llm latencies", daemon=True)

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it, and the series."""
        self._over.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def write(self) -> None:
        """Writes what there is now, whole or not at all."""
        counts = {stage: list(found) for stage, found in self._latencies.counts.items()}
        told = {"labels": self._labels, "since": self._since, "counts": counts, "sums": self._latencies.sums}
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps(told))
        draft.replace(self._file)

    def _run(self) -> None:
        failed = False
        while not self._over.wait(WRITE_S):
            try:
                self.write()
            except OSError as error:  # no room, or somebody has tidied up: the job is not to suffer
                if not failed:
                    log.error("telemetry.metrics_port: latencies cannot be written: %s", error)
                failed = True


class SharedLatencies(Collector):
    """What the workers of this machine have written, as one family."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See Collector. Of two workers of one subtask, the later one speaks."""
        family = HistogramMetricFamily(NAME, "How long a stage of a call takes", labels=[*LABELS, "stage"])
        latest: dict[tuple[str, ...], dict[str, Any]] = {}
        for told in self._alive():
            who = tuple(told["labels"][name] for name in LABELS)
            if who not in latest or told["since"] > latest[who]["since"]:
                latest[who] = told
        for who, told in sorted(latest.items()):
            for stage, counts in told["counts"].items():
                if any(counts):
                    family.add_metric([*who, stage], _cumulated(counts), told["sums"][stage])
        yield family

    def _alive(self) -> Iterator[dict[str, Any]]:
        oldest = time.time() - ALIVE_S
        for file in self._folder.glob("*.json"):
            try:
                if file.stat().st_mtime < oldest:
                    file.unlink()  # its worker was killed
                else:
                    yield json.loads(file.read_bytes())
            except (OSError, ValueError):  # gone meanwhile, or not ours
                continue


def _cumulated(counts: list[int]) -> list[tuple[str, float]]:
    so_far, buckets = 0, []
    for le, count in zip(_LE, counts, strict=True):
        so_far += count
        buckets.append((le, float(so_far)))
    return buckets


class StageExporter:
    """Tells the latencies of one subtask at `host:port`, with those of the machine's other workers.

    `labels` are all but the subtask's, which is the lowest number that is free on this machine where it is None.
    """

    def __init__(
        self, host: str, port: int, labels: dict[str, str], *, subtask: int | None = None, folder: Path | None = None
    ) -> None:
        folder = folder or socket_folder(HostSettings()) / f"latencies-{port}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.latencies = Latencies()
        self._number: FileLock | None = None
        if subtask is None:
            subtask, self._number = _free_number(folder / _digest(labels))
        self._shared = Shared(self.latencies, folder, {**labels, "subtask": str(subtask)})
        registry = CollectorRegistry()
        registry.register(SharedLatencies(folder))
        self._endpoint = MetricsEndpoint(registry, host, port, told=_TAKEN)

    def start(self) -> None:
        """Begins to tell."""
        self._shared.start()
        self._endpoint.start()

    def stop(self) -> None:
        """Ends it; another worker takes the port over."""
        self._shared.stop()
        self._endpoint.stop()
        if self._number is not None:
            self._number.release()


def _free_number(stem: Path) -> tuple[int, FileLock]:
    """A number, and the lock that keeps it until this process ends: a worker after it takes it over."""
    number = 0
    while True:
        lock = FileLock(f"{stem}-{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            number += 1
        else:
            return number, lock


def _digest(labels: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()[:16]
