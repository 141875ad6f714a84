"""Tokens per second of our engine against what users would otherwise run, on one machine and one set of weights.

The shape is SmolLM2-135M's, its weights random; every precision we ship against every one of a peer's, the
best of each compared. Three loads: 16 requests of mixed lengths that arrive within a tenth of what
onnxruntime-genai's Generator takes for all of them one at a time; 16 of one length at once; and one alone. Tokens over
the makespan, prompts included; medians of runs in turns. Our engine tokenises its prompts and streams text,
the peers are handed token ids and stop at them. Speculation is measured by itself, on the demo model.
"""

import argparse
import contextlib
import functools
import importlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import quality, shapes, speculation
from benchmarks.bare import Bare
from benchmarks.demo_source import demo_source
from benchmarks.load import Request, arriving, make, mixed
from benchmarks.machine import CORES, Run, as_a_host, best, interleave, isa, medians, ratio
from benchmarks.ours import Ours
from benchmarks.shapes import Shape

LLAMA = "llama.cpp"
GENAI = ("genai-generator", "genai-engine")
LOSS = 0.02
"""What of its perplexity our best may lose against fp32 to be compared with llama.cpp."""


@dataclass(frozen=True)
class Size:
    """How much is run: rounds, the longest of the mixed lengths, (prompt, reply) of the other loads, forms left out."""

    rounds: int
    mixed: int
    static: tuple[int, int]
    one: tuple[int, int]
    dialogues: int
    without: tuple[str, ...] = ()


FULL = Size(5, 160, (64, 96), (64, 128), 60)
QUICK = Size(1, 32, (16, 16), (16, 32), 12, without=("fp32", "Q8_0"))


@dataclass
class Contenders:
    """What takes part, opened; `missing` says why a peer does not."""

    ours: dict[str, Ours] = field(default_factory=dict)
    bare: dict[str, Bare] = field(default_factory=dict)
    genai: dict[str, Any] = field(default_factory=dict)
    llama: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def measure(shape: Shape, size: Size, *, root: Path, peers: bool = True, demo: Path | None = None) -> dict[str, Any]:
    """All loads; see the module. With `demo`, a Hugging Face folder, the quality of the precisions too."""
    with contextlib.ExitStack() as stack:
        found = _open(shape, size, root, stack, peers)
        rates: dict[str, dict[str, float]] = {}
        static = _asked(lambda number: make(shape, [size.static] * 16, f"static/{number}"))
        several = _asked(lambda number: mixed(shape, 16, size.mixed, f"mixed/{number}"))
        one = _asked(lambda number: make(shape, [size.one], f"one/{number}"))
        rates["static_16"] = _run(_static(found, static), size.rounds, found)
        rates["mixed_16"] = _run(_mixed(found, several), size.rounds, found)
        rates["one"] = _run(_one(found, one), size.rounds, found)
        chosen = best(rates["static_16"], "ours")
        precision = chosen[0].split()[1] if chosen else "fp32"
        rates["engine_16"], around = _around(found, shape, size, precision, root)
    checked = quality.report(shape, found.llama, root=root, demo=demo) if demo else {}
    return {
        **_figures(rates, checked.get("perplexity_loss", {})),
        **around,
        "rates": rates,
        **checked,
        **speculation.measure(_many(size), size.dialogues),
        "missing": found.missing,
        "isa": isa(),
        "cores": CORES,
        "shape": shape.name,
    }


def _open(shape: Shape, size: Size, root: Path, stack: contextlib.ExitStack, peers: bool) -> Contenders:
    found = Contenders()
    source = shapes.source(shape, root)
    for precision in _taken(shapes.precisions(), size):
        folder = shapes.exported(source, precision, root)
        found.ours[precision] = stack.enter_context(Ours(folder))
        found.bare[precision] = Bare(folder)
    if peers:
        genai = _peer("genai", found)
        for precision in _taken(genai.PRECISIONS, size) if genai else ():
            found.genai[precision] = genai.Genai(genai.build(source, precision, root))
        llama = _peer("llamacpp", found)
        for form in _taken(llama.FORMS, size) if llama else ():
            found.llama[form] = llama.LlamaCpp(llama.convert(source, form, root))
    else:
        found.missing["peers"] = "left out"
    return found


def _taken(forms: Iterable[str], size: Size) -> list[str]:
    return [form for form in forms if form not in size.without]


def _peer(name: str, found: Contenders) -> Any:
    try:
        return importlib.import_module(f"benchmarks.peers.{name}")
    except Exception as error:  # a broken installation raises what it likes
        found.missing[name] = f"{type(error).__name__}: {error}; make bench-setup installs it"[:300]
        return None


Asked = Callable[[int], Sequence[Request]]


def _asked(made: Asked) -> Asked:
    return functools.cache(made)


def _run(runs: dict[str, Run], rounds: int, found: Contenders) -> dict[str, float]:
    figures, failed = interleave(runs, rounds)
    found.missing.update(failed)
    return medians(figures)


def _static(found: Contenders, asked: Asked) -> dict[str, Run]:
    return {
        **_each("ours", found.ours, lambda each, number: each.run(asked(number))),
        **_each("bare", found.bare, lambda each, number: each.run(asked(number))),
        **_each("genai-static", found.genai, lambda each, number: each.static(asked(number))),
        **_each(LLAMA, found.llama, lambda each, number: each.run(asked(number))),
    }


def _mixed(found: Contenders, asked: Asked) -> dict[str, Run]:
    totals = []
    for each in found.genai.values():
        began = time.perf_counter()
        each.one_by_one(asked(-1))
        totals.append(time.perf_counter() - began)
    within = min(totals, default=0.0) / 10
    due = _asked(lambda number: arriving(asked(number), within))
    return {
        **_each("ours", found.ours, lambda each, number: each.run(due(number))),
        **_each("genai-generator", found.genai, lambda each, number: each.one_by_one(due(number))),
        **_each("genai-engine", found.genai, lambda each, number: each.engine(due(number))),
        **_each(LLAMA, found.llama, lambda each, number: each.run(due(number))),
    }


def _one(found: Contenders, asked: Asked) -> dict[str, Run]:
    return {
        **_each("ours", found.ours, lambda each, number: each.run(asked(number))),
        **_each("genai-generator", found.genai, lambda each, number: each.one_by_one(asked(number))),
        **_each("genai-engine", found.genai, lambda each, number: each.engine(asked(number))),
        **_each(LLAMA, found.llama, lambda each, number: each.run(asked(number))),
    }


def _each(family: str, contenders: dict[str, Any], run: Callable[[Any, int], float]) -> dict[str, Run]:
    return {f"{family} {name}": functools.partial(run, each) for name, each in contenders.items()}


def _around(
    found: Contenders, shape: Shape, size: Size, precision: str, root: Path
) -> tuple[dict[str, float], dict[str, float | None]]:
    """The best precision alone: bare, embedded and behind the socket, in turns.

    They differ by less than a machine's speed does from one minute to the next: told is the median of turns' ratios.
    """
    asked = _asked(lambda number: make(shape, [size.static] * 16, f"around/{number}"))
    folder = shapes.exported(shapes.source(shape, root), precision, root)
    with Ours(folder, "host") as host:
        host.run(asked(-1)[:1])
        runs: dict[str, Run] = {
            "ours": lambda number: found.ours[precision].run(asked(number)),
            "bare": lambda number: found.bare[precision].run(asked(number)),
            "host": lambda number: host.run(asked(number)),
        }
        figures, failed = interleave(runs, _many(size))
    found.missing.update(failed)
    bare, cost = _paired(figures, "ours", "bare"), _paired(figures, "host", "ours")
    return medians(figures), {"x_bare_16": bare, "host_cost": None if cost is None else round(1 - cost, 3)}


def _many(size: Size) -> int:
    """Rounds of what differs by little, and is over soon."""
    return 1 if size.rounds == 1 else 2 * size.rounds + 3


def _paired(figures: dict[str, list[float]], one: str, other: str) -> float | None:
    pairs = list(zip(figures.get(one, []), figures.get(other, []), strict=False))
    return round(statistics.median(above / below for above, below in pairs), 3) if pairs else None


def _figures(rates: dict[str, dict[str, float]], loss: dict[str, float | None]) -> dict[str, Any]:
    """The fields of the table in issue 5, and whose figures they are made of."""
    static, several, one = rates["static_16"], rates["mixed_16"], rates["one"]
    lossy = {f"ours {name}" for name, share in loss.items() if share is not None and share > LOSS}
    pairs = {
        "x_genai_16": (best(several, "ours"), best(several, *GENAI)),
        "x_genai_static_16": (best(static, "ours"), best(static, "genai-static")),
        "x_genai_1": (best(one, "ours"), best(one, *GENAI)),
        "x_llamacpp_1": (best(_without(one, lossy), "ours"), best(one, LLAMA)),
        "x_llamacpp_16": (best(_without(static, lossy), "ours"), best(static, LLAMA)),
    }
    return {
        **{name: ratio(above and above[1], below and below[1]) for name, (above, below) in pairs.items()},
        "compared": {name: [each and each[0] for each in pair] for name, pair in pairs.items()},
    }


def _without(figures: dict[str, float], names: set[str]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name not in names}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round without fp32 and Q8_0, no quality")
    parser.add_argument("--demo", type=Path, help="another Hugging Face folder of the demo model, for the quality")
    parser.add_argument("--rounds", type=int, help=f"of each load (default: {FULL.rounds}; half an hour on two cores)")
    parser.add_argument("--without", action="append", default=[], help="a precision or form to leave out, e.g. fp32")
    args = parser.parse_args()
    as_a_host()
    logging.disable(logging.WARNING)
    size = QUICK if args.quick else FULL
    size = replace(size, rounds=args.rounds or size.rounds, without=(*size.without, *args.without))
    demo = None if args.quick else args.demo or demo_source()
    print(json.dumps(measure(shapes.SMOLLM2, size, root=shapes.ROOT, demo=demo)))


if __name__ == "__main__":
    main()
