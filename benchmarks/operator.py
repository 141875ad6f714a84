"""Records a second through the async operator, and through PyFlink's own `AsyncFunction`.

A standalone cluster with Python in process mode, parallelism 1, 16 shards. Each contender is a job of its
own on a task manager of its own, fed and counted in Java (see `benchmarks.contenders`); all are up at once,
stopped, and run in turns. Stock runs at several bundle settings, and the best of them is compared. Work is
100 ms on the average, exponentially distributed, in `asyncio.sleep`; the ideal is so many calls in flight
over that.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from benchmarks import samples
from benchmarks.contenders import Contender, Plan
from benchmarks.pipeline import quantile
from flink_llm.local.cluster import Cluster
from flink_llm.orphans import task_manager_of

READY_S = 180.0
SETTLE_S = 1.0
"""After a worker goes on all that slept ends at once: so long, and until the next second begins, is not counted."""
PRINTED_S = 3.0
"""The last second of each turn is printed once Java goes on and the second is over."""
_COUNTS = re.compile(r"^(\S+)> \+I\[(\d+):(\d+):(\d+), (-?\d+), (\d+)\]$", re.MULTILINE)

OUR_BUNDLE = (125, 10)
"""Size and milliseconds at 1,000 in flight: 1 ms, as `configure` sets it for latency, makes smaller bundles."""
OURS = [
    Contender(name="ours_1000", bundle=OUR_BUNDLE),
    Contender(name="ours_1000_full", full=True, bundle=OUR_BUNDLE),
    Contender(name="ours_100", in_flight=100),
    Contender(name="ours_zero", work_ms=0, bundle=OUR_BUNDLE),
]
STOCK = [Contender(name="stock_1000", stock=True, bundle=(1000, 1000))]
STOCK_ZERO = [Contender(name="stock_zero", stock=True, work_ms=0, timeout=False, bundle=(1000, 1000))]
MORE_STOCK = [
    Contender(name=f"stock_1000_{n}", stock=True, bundle=(n, ms))
    for n, ms in ((1000, 100), (10_000, 1000), (100_000, 10_000))
]
MORE_STOCK_ZERO = [
    Contender(name=f"stock_zero_{n}", stock=True, work_ms=0, timeout=False, bundle=(n, ms))
    for n, ms in ((1000, 100), (10_000, 1000))
]
ALL = [*OURS, *STOCK, *STOCK_ZERO, *MORE_STOCK, *MORE_STOCK_ZERO]


class Turn(Struct, frozen=True):
    """When a contender ran, in epoch seconds."""

    name: str
    began: float
    ended: float


class Field:
    """The jobs on their cluster. Use as a context manager."""

    def __init__(self, folder: Path, contenders: Sequence[Contender]) -> None:
        self._folder = folder
        self.contenders = list(contenders)
        properties = {
            "taskmanager.memory.process.size": "1400m",
            "taskmanager.memory.managed.size": "128m",
            "taskmanager.memory.jvm-metaspace.size": "256m",
            "web.checkpoints.history": "1000",
            # One that stands still between its turns is not dead.
            "heartbeat.timeout": 3_600_000,
            # What is remembered for a minute is more than the 5 MB that a job manager takes.
            "execution.checkpointing.storage": "filesystem",
            "execution.checkpointing.dir": (folder / "checkpoints").as_uri(),
        }
        self.cluster = Cluster(
            folder / "cluster", task_managers=len(contenders), slots=1, properties=properties
        )  # fmt: skip
        self._workers: dict[str, int] = {}
        self._java: dict[str, int] = {}
        self._jobs: dict[str, str] = {}

    def __enter__(self) -> "Field":
        (self._folder / "workers").mkdir()
        root = str(Path(__file__).parents[1])
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self.cluster.up()
            self._submit()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for pid in [*self._java.values(), *self._workers.values()]:
            with contextlib.suppress(ProcessLookupError):  # one that died must not keep the cluster up
                os.kill(pid, signal.SIGCONT)
        self.cluster.down()

    def _go_on(self, name: str) -> None:
        for pid in (self._java[name], self._workers[name]):
            os.kill(pid, signal.SIGCONT)

    def _stand_still(self, name: str) -> None:
        for pid in (self._workers[name], self._java[name]):
            os.kill(pid, signal.SIGSTOP)

    def _submit(self) -> None:
        plan, job = self._folder / "plan.json", self._folder / "job.py"
        workers = self._folder / "workers"
        plan.write_bytes(msgspec.json.encode(Plan(folder=str(workers), contenders=self.contenders)))
        job.write_text("from benchmarks.contenders import main\n\nmain()\n")
        self.cluster.run("-d", "-pyexec", sys.executable, "-pyclientexec", sys.executable, "-py", str(job), str(plan))
        deadline = time.monotonic() + READY_S
        while len(self._workers) < len(self.contenders):
            if time.monotonic() > deadline:
                missing = {one.name for one in self.contenders} - set(self._workers)
                raise RuntimeError(f"no worker of {', '.join(sorted(missing))}, see {self.cluster.logs}")
            time.sleep(0.2)
            self._workers = {file.stem: int(file.read_text()) for file in workers.glob("*.pid")}
        self._jobs = {job["name"]: job["jid"] for job in self.cluster.rest("/jobs/overview")["jobs"]}
        for name, pid in self._workers.items():
            java = task_manager_of(psutil.Process(pid))
            if java is None:
                raise RuntimeError(f"the task manager of {name} has ended, see {self.cluster.logs}")
            self._java[name] = java.pid
            self._stand_still(name)

    def run(self, name: str, seconds: float, *, sampled: Path | None = None) -> Turn:
        """Lets a contender run; where `sampled` is a file, samples of its stacks go there."""
        began = time.time()
        self._go_on(name)
        if sampled is None:
            time.sleep(seconds)
        else:
            samples.record(self._workers[name], seconds, sampled)
        try:
            self._stand_still(name)
        except ProcessLookupError as error:
            entries = self.cluster.rest(f"/jobs/{self._jobs[name]}/exceptions")["exceptionHistory"]["entries"]
            told = entries[0]["stacktrace"][:4000] if entries else "no reason given"
            raise RuntimeError(f"the worker of {name} has ended: {told}") from error
        return Turn(name, began, time.time())

    def counts(self) -> dict[str, dict[int, dict[int, int]]]:
        """Of each contender and second of the day: how many results were how many milliseconds late."""
        for pid in self._java.values():
            os.kill(pid, signal.SIGCONT)
        time.sleep(PRINTED_S)
        found: dict[str, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
        for file in self.cluster.logs.glob("taskmanager-*.out"):
            for name, hours, minutes, seconds, late, count in _COUNTS.findall(file.read_text(errors="replace")):
                second = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
                found[name][second][int(late)] = int(count)
        return found

    def checkpoints(self, turns: Sequence[Turn]) -> list[float]:
        """Milliseconds of the checkpoints that began in these turns, once calls ran evenly."""
        name = turns[0].name
        history = self.cluster.rest(f"/jobs/{self._jobs[name]}/checkpoints")["history"]
        return [
            float(one["end_to_end_duration"])
            for one in history
            if one["status"] == "COMPLETED"
            and any(turn.began + SETTLE_S < one["trigger_timestamp"] / 1000 < turn.ended - 0.5 for turn in turns)
        ]


def seconds_of(turn: Turn) -> Iterator[int]:
    """The whole seconds of a turn that count, by the second of the local day, as the jobs print them."""
    first, last = int(turn.began + SETTLE_S) + 1, int(turn.ended)
    for moment in range(first, last):
        at = time.localtime(moment)
        yield at.tm_hour * 3600 + at.tm_min * 60 + at.tm_sec


def rates(turns: Sequence[Turn], counts: dict[int, dict[int, int]]) -> list[float]:
    """Results a second of each turn."""
    found = []
    for turn in turns:
        totals = [sum(counts.get(second, {}).values()) for second in seconds_of(turn)]
        found.append(sum(totals) / max(1, len(totals)))
    return found


def late(turns: Sequence[Turn], counts: dict[int, dict[int, int]]) -> list[float]:
    """How late each result was, in milliseconds."""
    return [
        float(ms)
        for turn in turns
        for second in seconds_of(turn)
        for ms, count in counts.get(second, {}).items()
        for _ in range(count)
    ]


def measure(
    folder: Path, contenders: Sequence[Contender], *, warm_up_s: float, seconds: float, rounds: int
) -> dict[str, Any]:
    """Rates by contender, and what was late where ours was full."""
    with Field(folder, contenders) as field:
        names = [one.name for one in field.contenders]
        for name in names:
            field.run(name, warm_up_s)
        turns = [
            field.run(name, seconds) for number in range(rounds) for name in names[number % 2 :] + names[: number % 2]
        ]
        counts = field.counts()
        by_name = {name: [turn for turn in turns if turn.name == name] for name in names}
        found: dict[str, Any] = {name: statistics.median(rates(by_name[name], counts[name])) for name in names}
        full = by_name.get("ours_1000")
        if full:
            found["late"] = late(full, counts["ours_1000"])
            found["checkpoints"] = field.checkpoints(full)
    return found


def profile(folder: Path, contender: Contender, *, warm_up_s: float, seconds: float) -> dict[str, Any]:
    """Where one contender's worker spends its time, and its rate while it is looked at."""
    with Field(folder, [contender]) as field:
        field.run(contender.name, warm_up_s)
        turn = field.run(contender.name, seconds, sampled=folder / "stacks.txt")
        rate = rates([turn], field.counts()[contender.name])[0]
    return {"per_s": round(rate), **samples.shares((folder / "stacks.txt").read_text())}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that are looked at."""
    best = {
        kind: max((rate, name) for name, rate in found.items() if name.startswith(f"stock_{kind}"))
        for kind in ("1000", "zero")
    }
    return {
        "x_stock_1000": round(found["ours_1000"] / best["1000"][0], 2),
        "x_stock_most": round(10_000 / best["1000"][0], 2),
        "of_ideal_1000": round(found["ours_1000"] / 10_000, 3),
        "x_stock_1000_full": round(found["ours_1000_full"] / best["1000"][0], 2),
        "of_ideal_1000_full": round(found["ours_1000_full"] / 10_000, 3),
        "of_ideal_100": round(found["ours_100"] / 1000, 3),
        "x_stock_zero_work": round(found["ours_zero"] / best["zero"][0], 2),
        "zero_work_per_s": round(found["ours_zero"]),
        "completion_to_emit_p99_ms": quantile(found["late"], 0.99),
        "checkpoint_p99_ms": quantile(found["checkpoints"], 0.99) if found["checkpoints"] else None,
        "rates": {name: round(rate) for name, rate in found.items() if isinstance(rate, float)},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short turn each, stock at one bundle setting")
    parser.add_argument("--profile", metavar="NAME", help="sample one contender instead, ours_zero for one (py-spy)")
    args = parser.parse_args()
    if args.profile:
        chosen_one = next((one for one in ALL if one.name == args.profile), None)
        if chosen_one is None:
            parser.error(f"--profile: one of {', '.join(one.name for one in ALL)}")
        with tempfile.TemporaryDirectory(prefix="flink-llm-") as name:
            print(json.dumps(profile(Path(name), chosen_one, warm_up_s=3.0, seconds=10.0)))
        return
    contenders = [*OURS, *STOCK, *STOCK_ZERO]
    if not args.quick:
        contenders += [*MORE_STOCK, *MORE_STOCK_ZERO]
    chosen = (
        {"warm_up_s": 1.5, "seconds": 4.0, "rounds": 1}
        if args.quick
        else {"warm_up_s": 8.0, "seconds": 12.0, "rounds": 3}
    )
    with tempfile.TemporaryDirectory(prefix="flink-llm-") as name:
        print(json.dumps(summary(measure(Path(name), contenders, **chosen))))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
