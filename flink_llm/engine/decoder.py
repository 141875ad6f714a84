"""A decoder graph with its KV cache: prompts in by chunks, one token for everybody per step.

The graph is what onnxruntime-genai's builder writes: GroupQueryAttention whose past and present share
one buffer for each layer. A run is bound to rows of it, so nothing of the cache or of the logits is ever
copied in a step: prefill to the one row of its slot, a decode step to all rows from the first to the last
one that decodes. Rows between that do not decode run along, see `cache`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

from flink_llm.engine.adapters import BASE, Adapters
from flink_llm.engine.cache import KvCache
from flink_llm.engine.denormals import flushed
from flink_llm.engine.graphs import LOGITS_FROM, bind_input, bind_output, check_names, check_value, open_session
from flink_llm.engine.mixed import MixedRuns
from flink_llm.engine.model import Manifest, ModelFolder, held_twice
from flink_llm.errors import ConfigError, ModelFolderError

Array = NDArray[np.int64]
_TYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """One model's graph and cache. Not thread-safe: one thread runs the steps.

    `mixed_mb`: of what size in MB its weights may be to be held twice, for mixed runs. Raises ModelFolderError for
    a graph with other inputs or outputs than a decoder's, ConfigError for a cache that is larger than the machine's
    memory.
    """

    def __init__(self, folder: ModelFolder, *, device: str, threads: int, slots: int, mixed_mb: int = 0) -> None:
        manifest = folder.manifest
        self.vocabulary = manifest.vocab_size
        self.context = manifest.context_length
        self._session = open_session(folder, device, threads)
        self._dtype, logits_dtype = _check_graph(self._session, manifest)
        self._adapters = Adapters(folder, self._session, device)
        self._slices = LOGITS_FROM in {value.name for value in self._session.get_overridable_initializers()}
        self._shape = (manifest.num_kv_heads, manifest.context_length, manifest.head_dim)
        if device == "cpu":
            row = int(np.prod(self._shape)) * np.dtype(self._dtype).itemsize
            _check_room(manifest, slots, 2 * manifest.num_layers * slots * row)
        self._cache = KvCache(manifest.num_layers, slots, self._shape, self._dtype, device)
        self._lengths = np.zeros(slots, dtype=np.int64)
        self._tokens = np.zeros((slots, 1), dtype=np.int64)
        self._mask = np.zeros(slots * (manifest.context_length + 1), dtype=np.int64)
        self._mask_at = self._mask.ctypes.data
        self._positions = np.arange(manifest.context_length + 1)
        self._logits = np.empty((slots, 1, manifest.vocab_size), dtype=logits_dtype)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._readings: dict[tuple[int, int], ort.IOBinding] = {}
        self._read_with: dict[tuple[int, int], int] = {}
        self._adapted = np.full(slots, BASE)
        self._bound: dict[tuple[int, int], int] = {}
        mixes = bool(held_twice(manifest, mixed_mb)) and device == "cpu" and slots > 1
        self._mixed = MixedRuns(folder, threads, slots, self._cache, logits_dtype) if mixes else None

    @property
    def copies(self) -> bool:
        """Whether `copy` can be asked for."""
        return self._cache.in_reach

    @property
    def together(self) -> bool:
        """Whether `read_together` can be asked for: padded rows have been verified on the CPU only."""
        return self._cache.in_reach

    @property
    def mixes(self) -> bool:
        """Whether `step_beside` can be asked for."""
        return self._mixed is not None

    def fits_beside(self, slots: Sequence[int], slot: int) -> bool:
        """Whether a prompt in `slot` can be read in the run of a step of `slots`: not where it lies between them."""
        return self.mixes and not min(slots) < slot < max(slots)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that `adapt` takes besides ""."""
        return self._adapters.names

    def adapt(self, slot: int, adapter: str) -> None:
        """What a slot reads from now on is read with this adapter, "" for none. Raises KeyError."""
        self._adapted[slot] = self._adapters.number(adapter)

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> NDArray[np.floating[Any]]:
        """Reads `tokens` at position `start` of a slot; logits [vocabulary] after the last of them."""
        last: NDArray[np.floating[Any]] = self.read(slot, tokens, start, len(tokens) - 1)[0]
        return last

    def read(self, slot: int, tokens: Sequence[int], start: int, first: int = 0) -> NDArray[np.floating[Any]]:
        """As `prefill`; logits [tokens - first, vocabulary] after each of them from the one numbered `first` on."""
        if start == 0:
            self._cache.forget(slot)
        self._cache.use([slot])
        count = len(tokens)
        ids = np.asarray(tokens, dtype=np.int64).reshape(1, count)
        mask = np.ones((1, start + count), dtype=np.int64)
        begin = np.array([first if self._slices else 0], dtype=np.int64)
        logits = np.empty((1, count - int(begin[0]), self.vocabulary), dtype=self._logits.dtype)
        self._run(slot, ids, mask, begin, logits)
        self._lengths[slot] = start + count
        every: NDArray[np.floating[Any]] = logits[0, first - int(begin[0]) :]
        return every

    def _run(self, first: int, ids: Array, mask: Array, begin: Array, logits: NDArray[np.floating[Any]]) -> None:
        place = first, first + len(ids)
        binding = self._readings.get(place)
        if binding is None:
            binding = self._readings[place] = self._session.io_binding()
            self._cache.bind(binding, first=first, rows=len(ids))
        if self._slices:
            bind_input(binding, LOGITS_FROM, begin)
        bound = self._read_with.get(place, BASE)
        self._read_with[place] = self._adapters.bind(binding, self._adapted[first : place[1]], bound)
        bind_input(binding, "input_ids", ids)
        bind_input(binding, "attention_mask", mask)
        bind_output(binding, "logits", logits)
        with flushed():
            self._session.run_with_iobinding(binding)

    def read_together(self, first: int, prompts: Sequence[Sequence[int]]) -> NDArray[np.floating[Any]]:
        """Reads whole prompts into slots `first` and on in one run; logits [prompts, vocabulary] after each of them.

        Shorter ones are padded behind: what that writes into the cache is written over by their replies.
        """
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        rows, longest = len(prompts), int(lengths.max())
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        ids = np.zeros((rows, longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            self._cache.forget(first + row)
        begin = np.array([lengths.min() - 1 if self._slices else 0], dtype=np.int64)
        logits = np.empty((rows, longest - int(begin[0]), self.vocabulary), dtype=self._logits.dtype)
        self._run(first, ids, mask, begin, logits)
        self._lengths[first : first + rows] = lengths
        last: NDArray[np.floating[Any]] = logits[np.arange(rows), lengths - 1 - begin]
        return last

    def cut(self, slot: int, length: int) -> None:
        """Only the first `length` tokens that were read into a slot are to be held."""
        self._lengths[slot] = length

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> NDArray[np.floating[Any]]:
        """Reads one token in each of `slots`; logits [any, vocabulary] by slot, valid until the next call."""
        used = list(slots)
        first, end = min(used), max(used) + 1
        past = self._past(used, first, end)
        longest = int(past.max()) + 1
        mask = self._mask[: len(past) * longest].reshape(len(past), longest)
        np.less_equal(self._positions[:longest], past[:, None], out=mask, casting="unsafe")
        self._tokens[first:end] = 0
        self._tokens[used, 0] = tokens
        binding = self._bindings.get((first, end))
        if binding is None:
            binding = self._bindings[first, end] = self._session.io_binding()
            self._cache.bind(binding, first=first, rows=end - first)
            bind_input(binding, "input_ids", self._tokens[first:end])
            bind_output(binding, "logits", self._logits[first:end])
        binding.bind_input("attention_mask", "cpu", 0, np.int64, mask.shape, self._mask_at)
        if self.adapters:
            adapted = np.full(end - first, BASE)
            adapted[[slot - first for slot in used]] = self._adapted[used]
            self._bound[first, end] = self._adapters.bind(binding, adapted, self._bound.get((first, end), BASE))
        with flushed():
            self._session.run_with_iobinding(binding)
        self._lengths[used] += 1
        return self._logits[:end, 0]

    def step_beside(
        self, slots: Sequence[int], tokens: Sequence[int], slot: int, chunk: Sequence[int], start: int
    ) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
        """A `prefill` of `chunk` in `slot` and a `step` of the others in one run, where that `fits_beside` them."""
        if self._mixed is None:
            raise RuntimeError("a mixed run of a graph without the form for it: this is a bug")
        used = list(slots)
        first, end = min(used), max(used) + 1
        if start == 0:
            self._cache.forget(slot)
        self._cache.use([slot])
        past = self._past(used, first, end)
        given = np.zeros(end - first, dtype=np.int64)
        given[[each - first for each in used]] = tokens
        last, every = self._mixed.run(first, given.tolist(), past, slot, chunk, start)
        self._lengths[slot] = start + len(chunk)
        self._lengths[used] += 1
        return last, every

    def copy(self, source: int, slot: int, count: int) -> None:
        """Makes the first `count` tokens that a slot holds those of another."""
        self._cache.copy(source, slot, count)
        self._lengths[slot] = count

    def swap(self, one: int, other: int, count: int) -> None:
        """Makes what a slot holds, at most `count` tokens, that of another, and the other way round."""
        self._cache.swap(one, other, count)
        pair, turned = [one, other], [other, one]
        self._lengths[pair] = self._lengths[turned]
        self._adapted[pair] = self._adapted[turned]

    def warm_up(self) -> None:
        """Runs what a request would, the largest token and the last place of the context among it.

        Raises whatever ONNX Runtime does with a graph that is another than the manifest says.
        """
        for adapter in (*self.adapters[:1], ""):  # of the others each shape was compared with the graph
            self.adapt(0, adapter)
            self.prefill(0, [self.vocabulary - 1] * min(2, self.context), 0)
            for length in sorted({min(2, self.context - 1), self.context - 1}):
                self._lengths[0] = length
                self.step([0], [self.vocabulary - 1])
        if self.mixes:
            self._lengths[0] = self.context - 1
            self.step_beside([0], [self.vocabulary - 1], 1, [self.vocabulary - 1] * min(2, self.context), 0)
            self.release(1)
        self.release(0)

    def release(self, slot: int) -> None:
        """Nobody needs what the slot holds."""
        self._lengths[slot] = 0
        self._cache.forget(slot)

    def _past(self, used: list[int], first: int, end: int) -> NDArray[np.int64]:
        """How many tokens each row is to hold, as the attention sees it."""
        self._cache.use(used)
        if not self._cache.in_reach:  # the others write behind what they hold
            return np.minimum(self._lengths[first:end], self.context - 1)
        past = self._lengths[first:end]
        if len(used) < end - first:
            idle = set(range(first, end)).difference(used)
            self._cache.park(slot for slot in idle if self._lengths[slot])
            past = past.copy()
            past[[slot - first for slot in idle]] = 0
        return past


def _check_room(manifest: Manifest, slots: int, needed: int) -> None:
    there = psutil.virtual_memory().total
    if needed > there:
        raise ConfigError(
            f"{manifest.name}: the cache of {slots} generations of {manifest.context_length} tokens needs "
            f"{needed >> 20} MB, this machine has {there >> 20}: lower host.slots"
        )


def _check_graph(session: ort.InferenceSession, manifest: Manifest) -> tuple[type[np.floating[Any]], ...]:
    """Compares the graph with the manifest; the element types of its cache and of its logits."""
    layers = range(manifest.num_layers)
    parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    wanted = {"input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)}
    inputs, outputs = check_names(manifest, session, wanted, {"logits", *(f"present.{part}" for part in parts)})
    if not parts:
        raise ModelFolderError(f"{manifest.name}: the manifest names no layers")
    cache = [None, manifest.num_kv_heads, manifest.context_length, manifest.head_dim]
    for part in parts:
        check_value(manifest, inputs[f"past_key_values.{part}"], cache)
        check_value(manifest, outputs[f"present.{part}"], cache)
    check_value(manifest, outputs["logits"], [None, None, manifest.vocab_size])
    types = [inputs[f"past_key_values.{parts[0]}"].type, outputs["logits"].type]
    for kind in types:
        if kind not in _TYPES:
            raise ModelFolderError(f"{manifest.name}: the graph's cache or logits are {kind}")
    return tuple(_TYPES[kind] for kind in types)
