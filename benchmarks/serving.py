"""What a request sees of the others: steady load, a long prompt in its midst, a prompt's known beginning.

Steady: requests of mixed lengths arrive at random (Poisson) at 70 % of what the engine can take; each
one's time per output token over what a bare loop over the same graph takes for a step of as many rows as
were decoding meanwhile. Long prompt: eight replies stream, then a prompt of 1,000 tokens arrives; the gaps
between the others' tokens until its first one, over their gaps before. Prefix: the same system prompt of
512 tokens a second time, another question behind it, time to the first token.

Some machines are half again as slow from one minute to the next. So there are several windows of steady load, each
with a capacity and bare steps of its own, and several long prompts; told is the median of what each gave.
"""

import argparse
import asyncio
import itertools
import json
import logging
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes
from benchmarks.bare import Bare
from benchmarks.load import Request, make, mixed
from benchmarks.machine import CORES, as_a_host, isa
from benchmarks.ours import Ours
from benchmarks.shapes import Shape, prompt

SHARE = 0.7
SLOTS = 16
STREAMS = 8
CALM = 40
"""Tokens of each stream before the long prompt."""


@dataclass(frozen=True)
class Size:
    """Seconds of a window of steady load, longest request, tokens of the long prompt and of the system prompt,
    repeats, and windows."""

    seconds: float
    longest: int
    long_prompt: int = 1000
    system: int = 512
    repeats: int = 5
    windows: int = 5


FULL = Size(30.0, 96)
QUICK = Size(14.0, 48, repeats=2, windows=1)
RAMP_S = 3.0
"""Who arrives in a window's beginning finds it empty, and is not counted."""


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
    """Poisson arrivals at 70 % of capacity, in windows; medians of their figures."""
    found = [_window(engine, shape, size, bare, number) for number in range(size.windows)]
    told = {name: round(statistics.median(each[name] for each in found), 3) for name in found[0]}
    return {**told, "requests": sum(int(each["requests"]) for each in found)}


def _window(engine: Ours, shape: Shape, size: Size, bare: Bare, number: int) -> dict[str, float]:
    """One window, and bare steps before and after it."""
    sample = mixed(shape, 4 * SLOTS, size.longest, f"capacity/{number}")
    before = _bare_steps(bare, size.longest)
    per_second = engine.run(sample) / (sum(request.reply for request in sample) / len(sample))
    drawn = random.Random(f"arrivals/{number}")
    count = max(8, int(size.seconds * SHARE * per_second))
    at, requests = 0.0, []
    for request in mixed(shape, count, size.longest, f"steady/{number}"):
        at += drawn.expovariate(SHARE * per_second)
        requests.append(Request(request.tokens, request.text, request.reply, at))
    arrived, replies = engine.do(_timed(engine, requests))
    times = [reply.times for reply in replies]
    steps = [(one + other) / 2 for one, other in zip(before, _bare_steps(bare, size.longest), strict=True)]
    ramp = min(RAMP_S, size.seconds / 5)
    counted = [(at, reply) for request, at, reply in zip(requests, arrived, replies, strict=True) if request.at >= ramp]
    spans = [(reply.token_ms, expected(reply.times, times, steps)) for _, reply in counted if len(reply.times) > 1]
    ratios = [seen / alone for seen, alone in spans]
    waits = [(reply.times[0] - at) * 1000 for at, reply in counted]
    return {
        "tpot_p99_ratio": float(np.quantile(ratios, 0.99)),
        "tpot_p50_ratio": float(np.quantile(ratios, 0.5)),
        "tpot_p99_ms": float(np.quantile([seen for seen, _ in spans], 0.99)),
        "ttft_p50_ms": float(np.quantile(waits, 0.5)),
        "ttft_p99_ms": float(np.quantile(waits, 0.99)),
        "requests": len(counted),
        "requests_per_s": SHARE * per_second,
    }


@dataclass(frozen=True)
class Heard:
    """When a reply's tokens were heard, in seconds, the first as soon as the engine had it and the last with its end;
    how many it has.

    Random weights say bytes that are no whole character: such tokens are heard with a later one.
    """

    times: list[float]
    tokens: int

    @property
    def token_ms(self) -> float:
        """Milliseconds per token after the first."""
        return (self.times[-1] - self.times[0]) * 1000 / (self.tokens - 1)


async def _timed(engine: Ours, requests: list[Request]) -> tuple[list[float], list[Heard]]:
    """When each request came, and its reply."""
    began = time.perf_counter()

    async def one(request: Request) -> Heard:
        await asyncio.sleep(request.at - (time.perf_counter() - began))
        asked = time.perf_counter()
        reply = engine.model.generate(request.text, max_tokens=request.reply)
        times = [time.perf_counter() async for _ in reply] or [time.perf_counter()]
        times[0] = min(times[0], asked + reply.timings.first_token_ms / 1000)
        return Heard([*times[:-1], time.perf_counter()] if len(times) > 1 else times, reply.usage.completion_tokens)

    replies = await asyncio.gather(*(one(request) for request in requests))
    return [began + request.at for request in requests], list(replies)


def expected(said: list[float], everybody: list[list[float]], steps: list[float]) -> float:
    """What bare steps of as many rows as were decoding would have taken per token, in milliseconds."""
    spans = [(each[0], each[-1]) for each in everybody if each]
    rows = [sum(first < at <= last for first, last in spans) for at in said[1:]]
    return float(np.mean([steps[min(max(1, count), SLOTS)] for count in rows]))


def long_prompt(engine: Ours, shape: Shape, size: Size) -> dict[str, Any]:
    """A long prompt among streams."""
    pairs = [engine.do(_disturb(engine, shape, size, i)) for i in range(size.repeats)]
    tails = [(np.quantile(calm, 0.99), np.quantile(disturbed, 0.99)) for calm, disturbed in pairs]
    return {
        "gap_p99_ratio": round(float(np.median([during / before for before, during in tails])), 3),
        "gap_p99_ms": round(float(np.median([during for _, during in tails])) * 1000, 1),
        "calm_gap_p99_ms": round(float(np.median([before for before, _ in tails])) * 1000, 1),
        "calm_gap_p50_ms": round(float(np.median([gap for calm, _ in pairs for gap in calm])) * 1000, 1),
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
    parser.add_argument("--quick", action="store_true", help="one window of 14 s instead of five of 30, fewer repeats")
    parser.add_argument("--precision", default="int8", help="of the exported model (default: int8)")
    args = parser.parse_args()
    as_a_host()
    logging.disable(logging.WARNING)
    folder = shapes.exported(shapes.source(shapes.SMOLLM2), args.precision)
    print(json.dumps(measure(folder, shapes.SMOLLM2, QUICK if args.quick else FULL)))


if __name__ == "__main__":
    main()
