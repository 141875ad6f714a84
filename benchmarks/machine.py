"""What a figure was measured on: instruction sets, cores; and how figures are made comparable."""

import gc
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flink_llm.engine.launch import in_large_pages

CORES = len(os.sched_getaffinity(0))
SLOW = 0.6
"""A form that reaches less than this share of its family's best in the first round is not run again."""

_SETS = {"avx2": ("avx2",), "avx512": ("avx512f",), "vnni": ("avx512_vnni", "avx_vnni"), "amx": ("amx_int8",)}


def cpu_flags() -> frozenset[str]:
    """The processor's flags as Linux names them, empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def as_a_host() -> None:
    """Starts this command again, as a model host is started, where it was not: peers in its process gain as much."""
    wanted = in_large_pages(os.environ)
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def isa() -> list[str]:
    """Of avx2, avx512, vnni and amx, those of this machine."""
    flags = cpu_flags()
    return [name for name, any_of in _SETS.items() if flags.intersection(any_of)]


Run = Callable[[int], float]
"""A figure, more is better, of a round: each round asks something else, so that nothing is remembered."""


def interleave(runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Every run once per round, in turns; figures by name, and why others have none.

    A name's family is its first word. What is far behind its family's best after the first round is
    left out of the others, so that a fair number of rounds is spent on what might be the best.
    """
    figures: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for number in range(rounds):
        order = list(runs)[number % max(1, len(runs)) :] + list(runs)[: number % max(1, len(runs))]
        for name in order:
            if name in failed or (number and is_slow(name, figures)):
                continue
            gc.collect()
            gc.freeze()  # as the operator does: a full collection would walk all modules, those of peers as well
            try:
                figures[name].append(runs[name](number))
            except Exception as error:  # a peer's errors share no base class, and it must not end the others' run
                failed[name] = f"{type(error).__name__}: {error}"[:300]
    return {name: found for name, found in figures.items() if found and name not in failed}, failed


def is_slow(name: str, figures: Mapping[str, Sequence[float]]) -> bool:
    """Whether the first figure of `name` is far below the best first one of its family."""
    family = [found[0] for other, found in figures.items() if other.split()[0] == name.split()[0] and found]
    return not figures[name] or figures[name][0] < SLOW * max(family)


def medians(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: round(statistics.median(found), 2) for name, found in figures.items()}


def best(figures: Mapping[str, float], *families: str) -> tuple[str, float] | None:
    """The name and figure of the best among `families`; None where there is none."""
    found = [(value, name) for name, value in figures.items() if name.split()[0] in families]
    return (max(found)[1], max(found)[0]) if found else None


def ratio(above: float | None, below: float | None, digits: int = 3) -> float | None:
    """`above` over `below`; None when either is missing."""
    return round(above / below, digits) if above and below else None
