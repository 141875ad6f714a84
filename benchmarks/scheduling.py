"""The scheduler by itself, on a virtual clock, with costs that are handed in: what a rule of its does to everybody.

No model runs here: a rule can be judged for machines that are not at hand, in seconds, and without their noise. Three
loads: 64 requests at once over 16 slots; requests at random (Poisson) at 70 % of that, as in benchmarks.serving; and
16 requests within `--within` seconds, as in benchmarks.decoder. Costs vary by up to a tenth from run to run.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from benchmarks.load import lengths
from benchmarks.serving import RAMP_S, SHARE, SLOTS, expected
from flink_llm.engine import scheduler
from flink_llm.engine.scheduler import Entry, Plan, Scheduler
from flink_llm.engine.tempo import TempoMeter

NOISE = 0.1
LONGEST, WINDOW_S = 96, 30.0
LONGEST_OF_16 = 160
SEEDS, QUICK_SEEDS = 9, 3


class Costs(Struct, frozen=True, kw_only=True):
    """Milliseconds: of a step by rows, each token of a prompt, a run over a prompt by itself, all else around a run."""

    steps: dict[int, float]
    token: float
    run: float
    around: float

    @property
    def by_rows(self) -> list[float]:
        """Of a step of 0, 1, … `SLOTS` rows."""
        return list(np.interp(range(SLOTS + 1), list(self.steps), list(self.steps.values())))


class Arrival(Struct, frozen=True):
    """A request: when it comes in seconds, tokens of its prompt and of its reply."""

    at: float
    prompt: int
    reply: int


class Simulated:
    """An engine whose runs take what `costs` say. `now` is its clock, in seconds."""

    def __init__(self, costs: Costs, seed: int) -> None:
        self.now = 0.0
        self._costs, self._by_rows = costs, costs.by_rows
        self._drawn = random.Random(seed)
        self._scheduler: Scheduler[int] = Scheduler(SLOTS, 1_000_000, mixes=True, clock=lambda: self.now)
        self._meter = TempoMeter()
        self._served = 0

    def serve(self, arrivals: Sequence[Arrival]) -> list[list[float]]:
        """When each token of each reply was said; times of arrival count from now."""
        began = self.now
        said: list[list[float]] = [[] for _ in arrivals]
        due = sorted(range(len(arrivals)), key=lambda number: arrivals[number].at)
        while due or self._scheduler.running or self._scheduler.waiting:
            while due and began + arrivals[due[0]].at <= self.now:
                self._add(due.pop(0), arrivals, began)
            if not self._scheduler.running and not self._scheduler.waiting:
                self.now = began + arrivals[due[0]].at
                continue
            plan = self._scheduler.plan(tempo=self._meter.tempo)
            self.now += self._costs.around / 1000
            self._carry_out(plan, arrivals, said)
        return said

    def _add(self, number: int, arrivals: Sequence[Arrival], began: float) -> None:
        self._served += 1
        one = arrivals[number]
        prompt = [-self._served] * one.prompt  # nobody's beginning is another's
        self._scheduler.add(number, prompt, priority=5, now=began + one.at, tokens=one.reply)

    def _carry_out(self, plan: Plan[int], arrivals: Sequence[Arrival], said: list[list[float]]) -> None:
        decode = plan.decode
        if plan.prefill is not None:
            first, start, count = plan.prefill
            slots = [entry.slot for entry in decode if entry.slot is not None]
            beside = plan.mixed and not min(slots) < (first.slot or 0) < max(slots)
            rows, tokens = (len(decode), count) if beside else (0, plan.tokens)
            took = self._run(rows, tokens)
            if beside:
                self._scheduler.waited(self._meter.mixed(tokens, took))
            else:
                self._meter.read(tokens, took, start)
                self._scheduler.waited(took)
            for entry in decode if beside else ():
                self._say(entry, arrivals, said)
            for entry in plan.reads:
                self._scheduler.advance(entry, entry.left if plan.beside else count)
                if not entry.left:
                    self._say(entry, arrivals, said, decoded=False)
            if beside:
                return
            decode = [*decode, *(entry for entry in plan.reads if not (entry.left or entry.gone or plan.mixed))]
        if decode:
            self._meter.stepped(self._run(len(decode), 0))
            for entry in decode:
                self._say(entry, arrivals, said)

    def _run(self, rows: int, tokens: int) -> float:
        base = self._by_rows[rows] if rows else self._costs.run
        took = (base + tokens * self._costs.token) / 1000 * self._drawn.uniform(1 - NOISE, 1 + NOISE)
        self.now += took
        return took

    def _say(
        self, entry: Entry[int], arrivals: Sequence[Arrival], said: list[list[float]], *, decoded: bool = True
    ) -> None:
        said[entry.item].append(self.now)
        if len(said[entry.item]) == arrivals[entry.item].reply:
            self._scheduler.remove(entry)
        elif decoded:
            self._scheduler.decoded(entry, 0)


def _all_at_once(simulated: Simulated, seed: int) -> float:
    """Requests a second."""
    count, began = 4 * SLOTS, simulated.now
    simulated.serve([Arrival(0.0, *pair) for pair in lengths(count, LONGEST, f"burst/{seed}")])
    return count / (simulated.now - began)


def _steadily(simulated: Simulated, per_second: float, steps: list[float], seed: int) -> dict[str, float]:
    drawn, at, arrivals = random.Random(f"arrivals/{seed}"), 0.0, []
    for pair in lengths(max(8, int(WINDOW_S * per_second)), LONGEST, f"steady/{seed}"):
        at += drawn.expovariate(per_second)
        arrivals.append(Arrival(at, *pair))
    began = simulated.now
    said = simulated.serve(arrivals)
    counted = [(one, times) for one, times in zip(arrivals, said, strict=True) if one.at >= RAMP_S]
    ratios = [(times[-1] - times[0]) * 1000 / (one.reply - 1) / expected(times, said, steps) for one, times in counted]
    waits = [(times[0] - began - one.at) * 1000 for one, times in counted]
    return {
        "tpot_p99_ratio": float(np.quantile(ratios, 0.99)), "tpot_p50_ratio": float(np.quantile(ratios, 0.5)),
        "ttft_p50_ms": float(np.quantile(waits, 0.5)), "ttft_p99_ms": float(np.quantile(waits, 0.99)),
    }  # fmt: skip


def _sixteen(simulated: Simulated, within: float, seed: int) -> float:
    """Tokens a second."""
    began = simulated.now
    pairs = lengths(16, LONGEST_OF_16, f"sixteen/{seed}")
    simulated.serve([Arrival(within * i / 16, *pair) for i, pair in enumerate(pairs)])
    return sum(reply for _, reply in pairs) / (simulated.now - began)


def measure(costs: Costs, *, within: float, seeds: int) -> dict[str, float]:
    """Medians over `seeds` of each load; see the module."""
    found = []
    for seed in range(seeds):
        simulated = Simulated(costs, seed)
        capacity = _all_at_once(simulated, seed)
        steady = _steadily(simulated, SHARE * capacity, costs.by_rows, seed)
        found.append({
            "requests_per_s": capacity, **steady, "tokens_per_s_16": _sixteen(simulated, within, seed),
        })  # fmt: skip
    return {name: round(statistics.median(each[name] for each in found), 3) for name in found[0]}


def _steps(words: str) -> dict[int, float]:
    return {int(rows): float(ms) for rows, ms in (pair.split(":") for pair in words.split(","))}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default, what in (
        ("--steps", _steps, "1:5.2,4:6.3,16:12.7", "ms of a step, ROWS:MS,…"),
        ("--token", float, 0.36, "ms of a token of a prompt"),
        ("--run", float, 2.0, "ms of a prompt's run by itself"),
        ("--around", float, 0.5, "ms around a run"),
        ("--within", float, 1.0, "s in which 16 requests come"),
        ("--least", float, scheduler.DELAY_LEAST, "how much longer a reply may take for a prompt that comes alone"),
        ("--most", float, scheduler.DELAY_MOST, "the same where as many wait as there are slots"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} draws of each load instead of {SEEDS}")
    args = parser.parse_args()
    scheduler.DELAY_LEAST, scheduler.DELAY_MOST = args.least, args.most
    costs = Costs(steps=args.steps, token=args.token, run=args.run, around=args.around)
    seeds = QUICK_SEEDS if args.quick else SEEDS
    print(json.dumps({**measure(costs, within=args.within, seeds=seeds), "least": args.least, "most": args.most}))


if __name__ == "__main__":
    main()
