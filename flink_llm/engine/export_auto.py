"""Which precision is the fastest on this machine."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flink_llm.engine.graphs import open_session
from flink_llm.engine.model import ModelFolder, open_model_folder
from flink_llm.engine.parity import open_decoder

BATCHES = (1, 16)
ROUNDS = 3
SECONDS = 1.0
PROMPT = 32
"""Tokens that each generation, or each text of an encoder, begins with."""


@dataclass(frozen=True)
class Rate:
    """Tokens (decoders) or texts (encoders) a second, alone and with fifteen others."""

    alone: float
    together: float

    @property
    def mean(self) -> float:
        """Geometric: as good as the other one in both, or better by as much as worse."""
        return math.sqrt(self.alone * self.together)


def measure_rates(folders: Sequence[Path]) -> list[Rate | Exception]:
    """Medians over rounds that take turns, since a machine's speed drifts by more than precisions differ; or the
    error of a folder that cannot be run."""
    found: list[list[list[float]]] = [[[] for _ in BATCHES] for _ in folders]
    errors: dict[int, Exception] = {}
    for _ in range(ROUNDS):
        for number in set(range(len(folders))) - set(errors):
            try:
                _measure(folders[number], found[number])
            except Exception as error:  # ONNX Runtime's errors share no base class
                errors[number] = error
    return [errors.get(i) or Rate(*(statistics.median(seen) for seen in rates)) for i, rates in enumerate(found)]


def _measure(folder: Path, rates: list[list[float]]) -> None:
    """One round of a folder, for each of the batches."""
    opened = open_model_folder(folder)
    run = _decoding(opened) if opened.manifest.kind == "decoder" else _encoding(opened)
    for batch, seen in zip(BATCHES, rates, strict=True):
        seen.append(batch / _seconds(partial(run, batch)))


def _decoding(folder: ModelFolder) -> Callable[[int], Any]:
    decoder = open_decoder(folder, max(BATCHES))
    longest = decoder.context - 1
    random = np.random.default_rng(0)
    prompts = random.integers(0, folder.manifest.vocab_size, (max(BATCHES), PROMPT)).tolist()
    lengths = dict.fromkeys(BATCHES, longest)

    def step(batch: int) -> None:
        if lengths[batch] >= longest:
            for slot in range(batch):
                decoder.release(slot)
                decoder.prefill(slot, prompts[slot], 0)
            lengths[batch] = PROMPT
        decoder.step(range(batch), [prompts[slot][0] for slot in range(batch)])
        lengths[batch] += 1

    return step


def _encoding(folder: ModelFolder) -> Callable[[int], Any]:
    session = open_session(folder, "cpu", 0)
    names = {value.name for value in session.get_inputs()}
    length = min(PROMPT, folder.manifest.context_length)

    def run(batch: int) -> None:
        ids = np.full((batch, length), 5, dtype=np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        session.run(None, {name: value for name, value in feeds.items() if name in names})

    return run


def _seconds(run: Callable[[], Any]) -> float:
    """The median of the runs that fit into the time, three at least; the first warms up."""
    run()
    took: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(took) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return statistics.median(took)
