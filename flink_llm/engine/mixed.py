"""Mixed runs: a part of one prompt, and a token of everybody who decodes, in one run over the weights.

The graph is the other form of a decoder's, see `export_mixed`. ONNX Runtime packs the weights of each session by
itself, so they are held twice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flink_llm.engine.cache import KvCache
from flink_llm.engine.denormals import flushed
from flink_llm.engine.graphs import LOGITS_FROM, bind_input, bind_output, check_names, check_value, open_session
from flink_llm.engine.model import MIXED, ModelFolder

CHUNK_PAST, CHUNK_PRESENT = "chunk_past", "chunk_present"
"""Beginnings of the names of the cache's inputs and outputs, for the row of the prompt."""
CHUNK_LENGTH, CHUNK_TOTAL = "chunk_length", "chunk_total"
"""Inputs [1]: the last position that the prompt's row holds after the run, and how many."""
ROWS_LENGTHS, ROWS_TOTAL = "rows_lengths", "rows_total"
"""Inputs [rows], [1]: the same of those who decode; in all, of the longest."""
SPLIT = "split"
"""Input [2]: tokens of the prompt, rows that decode."""
_LENGTHS: dict[str, list[int | None]] = {
    CHUNK_LENGTH: [1],
    CHUNK_TOTAL: [1],
    ROWS_LENGTHS: [None],
    ROWS_TOTAL: [1],
    SPLIT: [2],
}


class MixedRuns:
    """The session of a checked folder's `mixed.onnx`, on the CPU, over a decoder's cache.

    Raises ModelFolderError for a graph that is another than the manifest says, Outage for a lack of memory.
    """

    def __init__(self, folder: ModelFolder, threads: int, slots: int, cache: KvCache, logits_dtype: Any) -> None:
        manifest = folder.manifest
        self._session = open_session(folder, "cpu", threads, MIXED)
        _check(self._session, folder)
        self._cache = cache
        self._binding = self._session.io_binding()
        self._logits = np.empty((1, 1 + slots, manifest.vocab_size), dtype=logits_dtype)
        self._rows: tuple[int, int] | None = None
        self._slot: int | None = None

    def run(
        self, first: int, tokens: Sequence[int], past: NDArray[np.int64], slot: int, chunk: Sequence[int], start: int
    ) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
        """Reads `chunk` at position `start` of `slot`, and `tokens` behind `past` in the rows from `first` on.

        Logits [vocabulary] after the chunk, and [any, vocabulary] by row; valid until the next call. `slot` is none
        of the rows.
        """
        end, count = first + len(tokens), len(chunk)
        self._bind_cache(first, end, slot)
        given: dict[str, NDArray[Any]] = {
            "input_ids": np.array([[*chunk, *tokens]], dtype=np.int64),
            CHUNK_LENGTH: np.array([start + count - 1], dtype=np.int32),
            CHUNK_TOTAL: np.array([start + count], dtype=np.int32),
            ROWS_LENGTHS: past.astype(np.int32),
            ROWS_TOTAL: np.array([past.max() + 1], dtype=np.int32),
            SPLIT: np.array([count, len(tokens)], dtype=np.int64),
            LOGITS_FROM: np.array([count - 1], dtype=np.int64),
        }
        for name, array in given.items():
            bind_input(self._binding, name, array)
        bind_output(self._binding, "logits", self._logits[:, first : end + 1])
        with flushed():
            self._session.run_with_iobinding(self._binding)
        return self._logits[0, first], self._logits[0, 1 : end + 1]

    def _bind_cache(self, first: int, end: int, slot: int) -> None:
        """What has not changed since the run before stays bound."""
        if self._rows != (first, end):
            self._cache.bind(self._binding, first=first, rows=end - first)
            self._rows = first, end
        if self._slot != slot:
            self._cache.bind(self._binding, first=slot, rows=1, past=CHUNK_PAST, present=CHUNK_PRESENT)
            self._slot = slot


def _check(session: ort.InferenceSession, folder: ModelFolder) -> None:
    manifest = folder.manifest
    parts = [f".{layer}.{part}" for layer in range(manifest.num_layers) for part in ("key", "value")]
    pasts = [f"{kind}{part}" for part in parts for kind in ("past_key_values", CHUNK_PAST)]
    presents = [f"{kind}{part}" for part in parts for kind in ("present", CHUNK_PRESENT)]
    inputs, outputs = check_names(manifest, session, {"input_ids", *_LENGTHS, *pasts}, {"logits", *presents})
    cache = [None, manifest.num_kv_heads, manifest.context_length, manifest.head_dim]
    for name in pasts:
        check_value(manifest, inputs[name], cache)
    for name in presents:
        check_value(manifest, outputs[name], cache)
    for name, shape in _LENGTHS.items():
        check_value(manifest, inputs[name], shape)
    check_value(manifest, outputs["logits"], [None, None, manifest.vocab_size])
