"""What a worker's threads are at: samples of their stacks by py-spy, counted by function.

py-spy reads the worker's memory from outside while it runs on: now and then a sample is torn and dropped, and the
worker is hardly slower.
"""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PER_S = 200
"""Samples a second."""
SHOWN = 40


def sampler() -> str:
    """py-spy's own program. Raises FileNotFoundError without one."""
    found = shutil.which("py-spy") or shutil.which(str(Path(sys.executable).parent / "py-spy"))
    if found is None:
        raise FileNotFoundError("py-spy is not installed: make bench-setup")
    return found


def record(pid: int, seconds: float, file: Path) -> None:
    """Samples a process for so long: stacks and their counts to `file`, idle threads left out.

    Raises RuntimeError with py-spy's own words, FileNotFoundError without py-spy.
    """
    options = [
        "--format",
        "raw",
        "--threads",
        "--nonblocking",
        "--rate",
        str(PER_S),
        "--duration",
        str(max(1, round(seconds))),
    ]
    command = [sampler(), "record", "--pid", str(pid), "--output", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not file.exists():
        raise RuntimeError(f"py-spy: {done.stderr.strip()[-500:]}")


def stacks(text: str) -> Iterable[tuple[list[str], int]]:
    """The stacks of py-spy's raw format, outermost frame first, with the samples of each."""
    for line in text.splitlines():
        frames, _, count = line.rpartition(" ")
        if frames:
            yield frames.split(";"), int(count)


def shares(text: str) -> dict[str, Any]:
    """By thread: its samples, and the share of them that were in a function (`own`) or below it (`with_calls`)."""
    totals: Counter[str] = Counter()
    own: dict[str, Counter[str]] = {}
    whole: dict[str, Counter[str]] = {}
    for frames, count in stacks(text):
        thread, *calls = frames
        functions = [_function(frame) for frame in calls]
        if not functions:
            continue
        totals[thread] += count
        own.setdefault(thread, Counter())[functions[-1]] += count
        for function in set(functions):
            whole.setdefault(thread, Counter())[function] += count
    return {
        thread: {
            "samples": total,
            "own": _most(own[thread], total),
            "with_calls": _most(whole[thread], total),
        }
        for thread, total in totals.most_common(3)
    }


def _function(frame: str) -> str:
    """`name (path/file.py:12)` as `name (folder/file.py)`."""
    name, _, place = frame.partition(" (")
    file = place.rstrip(")").rpartition(":")[0] or place.rstrip(")")
    return f"{name} ({'/'.join(Path(file).parts[-2:])})"


def _most(counts: Counter[str], total: int) -> dict[str, float]:
    return {name: round(count / total, 3) for name, count in counts.most_common(SHOWN)}
