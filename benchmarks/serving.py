"""What a request sees of the others: steady load, a long prompt in its midst, a prompt's known beginning.

Steady: requests of mixed lengths arrive at random (Poisson) at 70 % of what the engine can take; each
one's time per output token over what a bare loop over the same graph takes for a step of as many rows as
were decoding meanwhile. Long prompt: eight replies stream, then a prompt of 1,000 tokens arrives; the gaps
between the others' tokens until its first one, over their gaps before. Prefix: the same system prompt of
512 tokens a second time, another question behind it, time to the first token.
"""

import argparse
import asyncio
import itertools
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes
from benchmarks.bare import Bare
from benchmarks.load import Request, make, mixed
from benchmarks.machine import CORES, isa
from benchmarks.ours import Ours
from benchmarks.shapes import Shape, prompt

SHARE = 0.7
SLOTS = 16
STREAMS = 8
CALM = 40
"""Tokens of each stream before the long prompt."""


@dataclass(frozen=True)
class Size:
    """Seconds of steady load, longest request, tokens of the long prompt and of the system prompt, repeats."""

    seconds: float
    longest: int
    long_prompt: int = 1000
    system: int = 512
    repeats: int = 5


FULL = Size(90.0, 96)
QUICK = Size(14.0, 48, repeats=2)


def measure(folder: Path, shape: Shape, size: Size) -> dict[str, Any]:
    """All three; see the module."""
    bare = Bare(folder, SLOTS)
    with Ours(folder, slots=SLOTS) as engine:
        engine.run(make(shape, [(16, 8)] * SLOTS, "warm"))
        return {
            **steady(engine, shape, size, bare),
            **long_prompt(engine, shape, size),
            **prefix(engine, shape, size),
            "isa": isa(),
            "cores": CORES,
        }


def _bare_steps(bare: Bare, position: int) -> list[float]:
    """Milliseconds of a bare step by rows, from 0 rows on."""
    measured = {rows: bare.step_ms(rows, position) for rows in (1, 2, 3, 4, 6, 8, 12, 16)}
    return list(np.interp(range(SLOTS + 1), list(measured), list(measured.values())))


def steady(engine: Ours, shape: Shape, size: Size, bare: Bare) -> dict[str, Any]:
    """Poisson arrivals at 70 % of capacity, and bare steps before and after them: a machine's speed changes."""
    sample = mixed(shape, 4 * SLOTS, size.longest, "capacity")
    per_second = engine.run(sample) / (sum(request.reply for request in sample) / len(sample))
    drawn = random.Random("arrivals")
    count = max(8, int(size.seconds * SHARE * per_second))
    at, requests = 0.0, []
    for request in mixed(shape, count, size.longest, "steady"):
        at += drawn.expovariate(SHARE * per_second)
        requests.append(Request(request.tokens, request.text, request.reply, at))
    before = _bare_steps(bare, size.longest)
    arrived, times = engine.do(_timed(engine, requests))
    steps = [(one + other) / 2 for one, other in zip(before, _bare_steps(bare, size.longest), strict=True)]
    found = [(span(said), expected(said, times, steps)) for said in times if len(said) > 1]
    ratios = [seen / alone for seen, alone in found]
    waits = [(said[0] - at) * 1000 for at, said in zip(arrived, times, strict=True) if said]
    return {
        "tpot_p99_ratio": round(float(np.quantile(ratios, 0.99)), 3),
        "tpot_p50_ratio": round(float(np.quantile(ratios, 0.5)), 3),
        "tpot_p99_ms": round(float(np.quantile([seen for seen, _ in found], 0.99)), 2),
        "ttft_p50_ms": round(float(np.quantile(waits, 0.5)), 1),
        "ttft_p99_ms": round(float(np.quantile(waits, 0.99)), 1),
        "requests": len(requests),
        "requests_per_s": round(SHARE * per_second, 2),
    }


async def _timed(engine: Ours, requests: list[Request]) -> tuple[list[float], list[list[float]]]:
    """When each request came, and each of its tokens."""
    began = time.perf_counter()

    async def one(request: Request) -> list[float]:
        await asyncio.sleep(request.at - (time.perf_counter() - began))
        return [time.perf_counter() async for _ in engine.model.generate(request.text, max_tokens=request.reply)]

    times = await asyncio.gather(*(one(request) for request in requests))
    return [began + request.at for request in requests], list(times)


def span(said: list[float]) -> float:
    """Milliseconds per token after the first."""
    return (said[-1] - said[0]) * 1000 / (len(said) - 1)


def expected(said: list[float], everybody: list[list[float]], steps: list[float]) -> float:
    """What bare steps of as many rows as were decoding would have taken per token, in milliseconds."""
    spans = [(each[0], each[-1]) for each in everybody if each]
    rows = [sum(first < at <= last for first, last in spans) for at in said[1:]]
    return float(np.mean([steps[min(max(1, count), SLOTS)] for count in rows]))


def long_prompt(engine: Ours, shape: Shape, size: Size) -> dict[str, Any]:
    """A long prompt among streams."""
    calm: list[float] = []
    disturbed: list[float] = []
    for i in range(size.repeats):
        before, during = engine.do(_disturb(engine, shape, size, i))
        calm += before
        disturbed += during
    return {
        "gap_p99_ratio": round(float(np.quantile(disturbed, 0.99) / np.quantile(calm, 0.99)), 3),
        "gap_p99_ms": round(float(np.quantile(disturbed, 0.99)) * 1000, 1),
        "calm_gap_p99_ms": round(float(np.quantile(calm, 0.99)) * 1000, 1),
        "calm_gap_p50_ms": round(float(np.quantile(calm, 0.5)) * 1000, 1),
    }


async def _disturb(engine: Ours, shape: Shape, size: Size, seed: int) -> tuple[list[float], list[float]]:
    """The others' gaps in seconds, of one length of time before the long prompt's arrival and until its first token."""
    streams = make(shape, [(16, shape.context - 32)] * STREAMS, f"streams/{seed}")
    times: list[list[float]] = [[] for _ in streams]

    noticed = asyncio.Event()

    async def follow(request: Request, into: list[float]) -> None:
        async for _ in engine.model.generate(request.text, max_tokens=request.reply):
            into.append(time.perf_counter())
            noticed.set()

    async def everybody(reached: Callable[[list[float]], bool]) -> None:
        while not all(reached(said) or task.done() for said, task in zip(times, tasks, strict=True)):
            noticed.clear()
            await noticed.wait()

    tasks = [asyncio.create_task(follow(request, into)) for request, into in zip(streams, times, strict=True)]
    await everybody(lambda said: len(said) >= CALM)
    arrived = time.perf_counter()
    text = prompt(shape, f"long/{seed}", size.long_prompt)[1]
    await engine.model.generate(text, max_tokens=1)
    first = time.perf_counter()
    await everybody(lambda said: said[-1] > first)  # the gap that was open ends
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    began = max(each[0] for each in times)
    pairs = [pair for each in times for pair in itertools.pairwise(each)]
    before = [later - earlier for earlier, later in pairs if earlier >= began and later <= arrived]
    during = [later - earlier for earlier, later in pairs if later > arrived and earlier < first]
    return before, during


def prefix(engine: Ours, shape: Shape, size: Size) -> dict[str, Any]:
    """A system prompt for the first and for the second time."""
    first, second = [], []
    for i in range(size.repeats):
        system = prompt(shape, f"system/{i}", size.system)[1]
        for question, into in (("once", first), ("again", second)):
            asked = prompt(shape, f"{question}/{i}", 16)[1]
            messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
            into.append(engine.do(_first_token(engine, messages)))
    return {
        "ttft_prefix_ratio": round(float(np.median(second) / np.median(first)), 3),
        "ttft_first_ms": round(float(np.median(first)) * 1000, 1),
        "ttft_again_ms": round(float(np.median(second)) * 1000, 1),
    }


async def _first_token(engine: Ours, messages: list[dict[str, str]]) -> float:
    began = time.perf_counter()
    await engine.model.chat(messages, max_tokens=1)
    return time.perf_counter() - began


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="14 s of steady load instead of 90, fewer repeats")
    parser.add_argument("--precision", default="int8", help="of the exported model (default: int8)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    folder = shapes.exported(shapes.source(shapes.SMOLLM2), args.precision)
    print(json.dumps(measure(folder, shapes.SMOLLM2, QUICK if args.quick else FULL)))


if __name__ == "__main__":
    main()
