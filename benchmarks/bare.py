"""A bare ONNX Runtime loop over our own graph: what the engine around it can at most be.

Also what measures a graph itself: milliseconds of a step, logits of given tokens.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.load import Request, rate
from benchmarks.machine import CORES
from flink_llm.engine.denormals import flushed
from flink_llm.engine.graphs import LOGITS_FROM, open_session
from flink_llm.engine.model import open_model_folder

Floats = NDArray[np.floating[Any]]


class Bare:
    """One batch in a shared-buffer cache: prompts of one length together, then everybody's tokens."""

    def __init__(self, folder: Path, rows: int = 16) -> None:
        opened = open_model_folder(folder)
        manifest = opened.manifest
        self.session = open_session(opened, "cpu", CORES)
        self.vocabulary = manifest.vocab_size
        self.context = manifest.context_length
        self._shape = (manifest.num_kv_heads, manifest.context_length, manifest.head_dim)
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._type = kinds[next(v.type for v in self.session.get_inputs() if v.name.endswith("0.key"))]
        self._cache = {
            f"{layer}.{part}": np.zeros((rows, *self._shape), self._type)
            for layer in range(manifest.num_layers)
            for part in ("key", "value")
        }

    def run(self, requests: Sequence[Request]) -> float:
        """Tokens per second over the makespan, greedy, prompts and replies of one length each."""
        began = time.perf_counter()
        length, replies = len(requests[0].tokens), requests[0].reply
        last = self.read(np.array([request.tokens for request in requests]), length - 1)[:, -1].argmax(axis=-1)
        step = Step(self, len(requests))
        for position in range(length, length + replies - 1):
            last = step(last, position).argmax(axis=-1)
        return rate(requests, began)

    def read(self, tokens: NDArray[np.int64], first: int = 0) -> Floats:
        """Logits [rows, length - first, vocabulary] of prompts from their beginning."""
        rows, length = tokens.shape
        logits = np.empty((rows, length - first, self.vocabulary), self._type)
        binding = self.bind(tokens, logits)
        begin = np.array([first], np.int64)
        binding.bind_input(LOGITS_FROM, "cpu", 0, np.int64, begin.shape, begin.ctypes.data)
        mask = np.ones((rows, length), np.int64)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, mask.shape, mask.ctypes.data)
        with flushed():
            self.session.run_with_iobinding(binding)
        return logits

    def bind(self, tokens: NDArray[np.int64], logits: Floats) -> ort.IOBinding:
        """A binding of everything but the mask; the arrays must outlive it."""
        binding = self.session.io_binding()
        shape = [len(tokens), *self._shape]
        for name, value in self._cache.items():
            binding.bind_input(f"past_key_values.{name}", "cpu", 0, self._type, shape, value.ctypes.data)
            binding.bind_output(f"present.{name}", "cpu", 0, self._type, shape, value.ctypes.data)
        binding.bind_input("input_ids", "cpu", 0, np.int64, tokens.shape, tokens.ctypes.data)
        binding.bind_output("logits", "cpu", 0, self._type, logits.shape, logits.ctypes.data)
        return binding

    def step_ms(self, rows: int, position: int, count: int = 24) -> float:
        """Median milliseconds of a step of `rows` sequences that are `position` tokens long, argmax included.

        The sequences are read first: a cache that was never written is one page of zeros, in the processor's nearest
        memory, and a step of sixteen takes a fifth less over it.
        """
        drawn = np.random.default_rng(position)
        self.read(drawn.integers(0, self.vocabulary, (rows, position)), position - 1)
        step = Step(self, rows)
        tokens = np.full(rows, 300 % self.vocabulary)
        times = []
        for _ in range(count + 1):
            began = time.perf_counter()
            step(tokens, position).argmax(axis=-1)
            times.append((time.perf_counter() - began) * 1000)
        return float(np.median(times[1:]))


class Step:
    """One token in each of the first `rows` rows, all at the same position."""

    def __init__(self, bare: Bare, rows: int) -> None:
        self._session = bare.session
        self._tokens = np.zeros((rows, 1), np.int64)
        self._logits = np.empty((rows, 1, bare.vocabulary), bare._type)
        self._mask = np.ones(rows * bare.context, np.int64)
        self._rows = rows
        self._binding = bare.bind(self._tokens, self._logits)

    def __call__(self, tokens: NDArray[np.int64], position: int) -> Floats:
        self._tokens[:, 0] = tokens
        shape = (self._rows, position + 1)
        self._binding.bind_input("attention_mask", "cpu", 0, np.int64, shape, self._mask.ctypes.data)
        with flushed():
            self._session.run_with_iobinding(self._binding)
        return self._logits[:, 0]
