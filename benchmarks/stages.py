"""Which stage of a record's way its milliseconds went to, and what the machine was doing at that time.

A staged handler stamps the records of its worker: when the operator took each in and when it gave its outcome
to Flink, as headers; when each bundle began and ended, and Python's collections, as lines of a file. The broker
stamps what it appends, Java tells its pauses, Flink its checkpoints. Stamps cost some microseconds of a record.
"""

import gc
import itertools
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pipeline import quantile, rest
from flink_llm.runner import Runner
from flink_llm.shard import Output, Shard

TAIL = 0.99
PAUSE_MS = 2.0
"""Shorter ones are not looked at."""
BROKER = {"log.message.timestamp.type": "LogAppendTime"}
"""Of the broker whose topics say when a record was appended."""
Span = tuple[float, float]


def install(folder: str) -> None:
    """From now on this worker stamps its records and writes its bundles and collections down, epoch seconds."""
    from apache_beam.runners.worker import sdk_worker  # slow to import, and a worker has it

    taken: dict[int, float] = {}
    submit: Any = Runner.submit
    output: Any = Shard._output
    bundle: Any = sdk_worker.SdkWorker.process_bundle
    log = (Path(folder) / f"spans.{os.getpid()}").open("a", buffering=1)  # read while the job still runs
    began = [0.0]

    def stamped_submit(runner: Any, call: Any, **options: Any) -> None:
        taken[id(call.arrival)] = time.time()
        submit(runner, call, **options)

    def stamped_output(shard: Any, kind: str, arrival: Any, *rest: Any) -> Output:
        made: Output = output(shard, kind, arrival, *rest)
        at = taken.get(id(arrival), 0.0) if kind == "partial" else taken.pop(id(arrival), 0.0)
        made.headers.update(stages=f"{arrival.timestamp / 1000} {at} {time.time()}".encode())
        return made

    def stamped_bundle(worker: Any, request: Any, instruction: str) -> Any:
        start = time.time()
        try:
            return bundle(worker, request, instruction)
        finally:
            log.write(f"bundle {start} {time.time()}\n")

    def collected(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            began[0] = time.time()
        else:
            log.write(f"gc{info['generation']} {began[0]} {time.time()}\n")

    changed: Any = (Runner, Shard, sdk_worker.SdkWorker)
    changed[0].submit, changed[1]._output, changed[2].process_bundle = stamped_submit, stamped_output, stamped_bundle
    gc.callbacks.append(collected)


class Spans:
    """What went on in a job's processes, as spans of epoch seconds by name, `bundle` among them."""

    def __init__(self, folder: Path, port: int) -> None:
        found: dict[str, list[Span]] = {"bundle": []}
        for file in folder.glob("spans.*"):
            for line in file.read_text().splitlines():
                name, *times = line.split()
                if len(times) == 2:  # the last line may be half written
                    found.setdefault(f"Python's {name}" if name != "bundle" else name, []).append(
                        (float(times[0]), float(times[1]))
                    )
        found["Java's pauses"] = [span for file in folder.glob("pauses.*") for span in pauses(file.read_text())]
        history = rest(port, "/checkpoints")["history"]
        found["checkpoints"] = [
            (each["trigger_timestamp"] / 1000, each["latest_ack_timestamp"] / 1000)
            for each in history if each["status"] == "COMPLETED"
        ]  # fmt: skip
        self.bundles = sorted(found.pop("bundle"), key=lambda span: span[1])
        self._ends = [end for _, end in self.bundles]
        self.others = found

    def bundle_end(self, at: float) -> float:
        """When the bundle ended that something was emitted in, `at` itself where none is known."""
        place = bisect_left(self._ends, at)
        return self._ends[place] if place < len(self._ends) and self.bundles[place][0] <= at else at


def pauses(log: str) -> Iterable[Span]:
    """The safepoints of a Java log: `[1700000000123ms] Safepoint "G1...", ..., Total: 1234567 ns`."""
    for line in log.splitlines():
        if "Total:" in line and line.startswith("["):
            end = float(line[1 : line.index("ms]")]) / 1000
            yield end - float(line.rsplit("Total:", 1)[1].split()[0]) / 1e9, end


def told(rows: Sequence[dict[str, float]], spans: Spans) -> list[str]:
    """Lines: of each stage how long it takes, and what its share is of what the slowest records take longer.

    A row is one record: epoch seconds by name of the moment, in order; a stage is between two of them. After
    "emitted" comes "bundled", its bundle's end.
    """
    rows = [
        {
            part: at
            for name, when in row.items()
            for part, at in ((name, when), ("bundled", spans.bundle_end(when)))
            if part == name or name == "emitted"
        }
        for row in rows
    ]
    names = list(rows[0])
    stages = [f"{before} - {after}" for before, after in itertools.pairwise(names)]
    times = {
        stage: [(row[after] - row[before]) * 1000 for row in rows]
        for stage, before, after in zip(stages, names, names[1:], strict=False)
    }
    whole = [(row[names[-1]] - row[names[0]]) * 1000 for row in rows]
    limit = quantile(whole, TAIL)
    slow = [place for place, took in enumerate(whole) if took >= limit]
    middle = {stage: quantile(took, 0.5) for stage, took in times.items()}
    longer = {stage: sum(times[stage][place] - middle[stage] for place in slow) / len(slow) for stage in stages}
    total = max(1e-9, sum(longer.values()))
    lines = [f"{len(rows)} records: p50 {quantile(whole, 0.5):.1f} ms, p99 {limit:.1f} ms"]
    lines += [
        f"{stage:26} p50 {middle[stage]:6.1f}  p99 {quantile(times[stage], TAIL):7.1f} ms  "
        f"of the tail {longer[stage] / total:5.0%}"
        for stage in stages
    ]
    for name, found in spans.others.items():
        within = [span for span in found if rows[0][names[0]] <= span[1] <= rows[-1][names[-1]]]
        long = [span for span in within if (span[1] - span[0]) * 1000 >= PAUSE_MS]
        met = _meeting([(rows[place][names[0]], rows[place][names[-1]]) for place in slow], long)
        usual = _meeting([(row[names[0]], row[names[-1]]) for row in rows], long)
        lasted = [(span[1] - span[0]) * 1000 for span in long] or [0.0]
        lines.append(
            f"{name}: {len(long)} of {PAUSE_MS:.0f} ms and more, p50 {quantile(lasted, 0.5):.1f}, longest "
            f"{max(lasted):.1f} ms; {met:.0%} of the slowest met one, {usual:.0%} of all"
        )
    return lines


def _meeting(records: Sequence[Span], spans: Sequence[Span]) -> float:
    met = sum(any(start <= end and begin <= stop for begin, end in spans) for start, stop in records)
    return met / len(records)


def stamps(record: Any) -> list[float]:
    """Of what a worker emitted: when its request was appended, taken in, and when it was itself emitted."""
    return [float(stamp) for stamp in dict(record.headers)["stages"].decode().split()]


Seen = Callable[[Any, float], None]
"""What is told each record that a consumer sees, and when, epoch seconds."""
