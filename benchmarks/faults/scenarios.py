"""The blows, each struck while at least `IN_FLIGHT` calls are in flight, and what comes out afterwards."""

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from benchmarks.faults.checker import Checker, Sender, Tally
from benchmarks.faults.stack import PARALLELISM, RESTART_S, Stack

IN_FLIGHT = 100
STOPPED_S = 10.0
PATIENCE_S = 180.0
SETTLE_S = 2.0
"""A duplicate may come late."""
_FENCED = re.compile(rb"ProducerFenced|already fenced|InvalidTxnState")
_NOT_COMMITTED = re.compile(rb"Unable to commit transaction|data has been potentially lost")

Blow = Callable[[Stack], None]


class Row(Struct, kw_only=True):
    """A scenario's line of the table.

    `recovery_s` is the longest time from a blow to the first new outcome, `orphans` are Python workers that have
    outlived their task manager, `revived` parts of the cluster that were not there although no blow had just
    ended them.
    """

    scenario: str
    blows: int
    in_flight: int
    recovery_s: float
    tally: Tally
    fenced: int
    not_committed: int
    orphans: int
    revived: int


def kill(part: str) -> Blow:
    """kill -9, and a start anew where a part does not start by itself."""

    def strike(stack: Stack) -> None:
        struck = _resolved(stack, part)
        stack.signal(struck, signal.SIGKILL)
        time.sleep(RESTART_S)
        stack.start(struck)

    return strike


def stop(*parts: str) -> Blow:
    """SIGSTOP for ten seconds. A proxy that is stopped is a network that is cut."""

    def strike(stack: Stack) -> None:
        stopped = [process for part in parts for process in stack.processes(_resolved(stack, part))]
        for process in stopped:
            process.suspend()
        try:
            time.sleep(STOPPED_S)
        finally:
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    return strike


def restart_broker(stack: Stack) -> None:
    """An orderly restart."""
    stack.broker.down()
    time.sleep(RESTART_S)
    stack.broker.up([])


def fill_disk(stack: Stack) -> None:
    """No byte more can be written where checkpoints go, for ten seconds."""
    with stack.disk_full():
        time.sleep(STOPPED_S)


def rescale(parallelism: int) -> Blow:
    """The adaptive scheduler is told another parallelism."""

    def strike(stack: Stack) -> None:
        stack.rescale(parallelism)
        deadline = time.monotonic() + PATIENCE_S
        while stack.parallelism() != parallelism:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the job was not rescaled to {parallelism} within {PATIENCE_S:.0f} s")
            stack.revive()
            time.sleep(0.1)

    return strike


REDIS = ("kill-redis", "stop-redis")
"""Scenarios that need a Redis."""
SCENARIOS: dict[str, list[Blow]] = {
    "kill-worker": [kill("worker")],
    "kill-taskmanager": [kill("taskmanager")],
    "kill-host": [kill("host")],
    "kill-broker": [kill("broker")],
    "kill-jobmanager": [kill("jobmanager")],
    "kill-redis": [kill("redis")],
    "stop-worker": [stop("worker")],
    "stop-taskmanager": [stop("taskmanager")],
    "stop-host": [stop("host")],
    "stop-broker": [stop("broker")],
    "stop-jobmanager": [stop("jobmanager")],
    "stop-redis": [stop("redis")],
    "restart-broker": [restart_broker],
    "cut-network": [stop("broker-proxy", "redis-proxy")],
    "full-disk": [fill_disk],
    "rescale": [rescale(width) for width in (1, 2, 3, 2, 1, PARALLELISM)],
}
SHORT = "short"
"""The scenario of `make test`, which no other run needs: several blows, counted once."""
SCENARIOS[SHORT] = [kill("worker"), kill("host"), kill("broker"), kill("taskmanager")]


class Run:
    """Scenarios one after another on one job. `records` are sent at least in each."""

    def __init__(self, stack: Stack, sender: Sender, checker: Checker, records: int) -> None:
        self._stack, self._sender, self._checker, self._records = stack, sender, checker, records
        self._read: dict[Path, int] = {}

    def cold_start(self) -> float:
        """Starts the job under its load; seconds from Flink's taking it to the first outcome."""
        self._stack.submit()
        began = self._stack.started_at()
        self._checker.await_new()
        self._sender.on.set()
        first = self._first_new("the job's start")
        self._drain(0)
        self._logged()
        return first - began

    def scenario(self, name: str) -> Row:
        """One scenario to its end, everything drained. Raises RuntimeError where the job does not go on."""
        first, revived = self._sender.sent, self._stack.revived
        self._sender.on.set()
        in_flight, recoveries = [], []
        for blow in SCENARIOS[name]:
            in_flight.append(self._loaded(name))
            struck = time.time()
            self._checker.await_new()
            blow(self._stack)
            recoveries.append(self._first_new(name) - struck)
        for _ in self._patiently(f"{name}: requests to be sent", lambda: self._sender.sent):
            if self._sender.sent - first >= self._records:
                break
        tally = self._drain(first)
        fenced, not_committed = self._logged()
        return Row(
            scenario=name, blows=len(recoveries), in_flight=min(in_flight), recovery_s=max(recoveries), tally=tally,
            fenced=fenced, not_committed=not_committed, orphans=len(self._stack.orphans()),
            revived=self._stack.revived - revived,
        )  # fmt: skip

    def _loaded(self, name: str) -> int:
        """How many calls are in flight once enough are."""
        for _ in self._patiently(f"{name}: {IN_FLIGHT} calls in flight"):
            found = self._stack.in_flight()
            if found >= IN_FLIGHT:
                return found
        raise AssertionError

    def _first_new(self, name: str) -> float:
        for _ in self._patiently(f"{name}: a new outcome"):
            if self._checker.first_new is not None:
                return self._checker.first_new
        raise AssertionError

    def _patiently(self, what: str, moved: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """Again and again; RuntimeError after `PATIENCE_S`, counted from when `moved` last said something else."""
        last, deadline = moved(), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            yield
            self._stack.revive()
            time.sleep(0.02)
            if moved() != last:
                last, deadline = moved(), time.monotonic() + PATIENCE_S
        raise RuntimeError(f"waited {PATIENCE_S:.0f} s in vain for {what}")

    def _drain(self, first: int) -> Tally:
        """Sends nothing more and waits for what is in flight; what came out for requests `first` and on."""
        self._sender.on.clear()
        time.sleep(0.1)
        self._sender.flush()
        last, moved = -1, time.monotonic()
        while self._checker.answered < self._sender.sent and time.monotonic() < moved + PATIENCE_S:
            if self._checker.answered != last:
                last, moved = self._checker.answered, time.monotonic()
            self._stack.revive()
            time.sleep(0.1)
        time.sleep(SETTLE_S)
        return self._checker.judge(first, self._sender.sent)

    def _logged(self) -> tuple[int, int]:
        """Lines of fenced producers and of commits that failed, in what was logged since the last time."""
        fenced = not_committed = 0
        for file in self._stack.logs():
            with file.open("rb") as log:
                log.seek(self._read.get(file, 0))
                new = log.read()
                self._read[file] = log.tell()
            lines = new.splitlines()
            fenced += sum(_FENCED.search(line) is not None for line in lines)
            not_committed += sum(_NOT_COMMITTED.search(line) is not None for line in lines)
        return fenced, not_committed


def _resolved(stack: Stack, part: str) -> str:
    """A task manager that runs the job, where any is meant."""
    if part != "taskmanager":
        return part
    busy: dict[Any, int] = {}
    for worker in stack.cluster.python_workers():
        with contextlib.suppress(psutil.NoSuchProcess):
            for parent in worker.parents():
                busy[parent.pid] = busy.get(parent.pid, 0) + 1
    names = [name for name in stack.cluster.parts if name.startswith("taskmanager")]
    pids = {name: process.pid for name in names if (process := stack.cluster.process(name))}
    return max(pids, key=lambda name: busy.get(pids[name], 0))
