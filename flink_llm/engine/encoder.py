"""An encoder's graph: texts are padded together, run once, and what it says is pooled or made probabilities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.denormals import flushed
from flink_llm.engine.graphs import check_value, open_session
from flink_llm.engine.model import ModelFolder
from flink_llm.errors import ModelFolderError

WARM_UP_TOKENS = 1024
"""The longest text of a warm-up: attention over a longer one takes seconds."""

_KNOWN = {"input_ids", "attention_mask", "token_type_ids"}


class Encoder:
    """One encoder's graph. Raises ModelFolderError for a graph with other inputs or outputs."""

    def __init__(self, folder: ModelFolder, *, device: str, threads: int) -> None:
        self._manifest = folder.manifest
        self._session = open_session(folder, device, threads)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._classes = 1 if folder.manifest.kind == "reranker" else len(folder.manifest.labels)
        self._output = "last_hidden_state" if folder.manifest.kind == "embedding" else "logits"
        if not {"input_ids", "attention_mask"} <= self._inputs <= _KNOWN:
            raise ModelFolderError(f"{folder.manifest.name}: the graph's inputs are {sorted(self._inputs)}")
        found = {value.name: value for value in self._session.get_outputs()}.get(self._output)
        if found is None:
            raise ModelFolderError(f"{folder.manifest.name}: the graph has no output {self._output!r}")
        shapes: dict[str, list[int | None]] = {
            "embedding": [None, None, None],
            "token_classifier": [None, None, self._classes],
        }
        check_value(folder.manifest, found, shapes.get(folder.manifest.kind, [None, self._classes]))
        self.dimension = 0
        """Of an embedding, known once it has warmed up."""

    def warm_up(self) -> None:
        """Runs what a request would: the largest token, and a text that fills the context.

        Raises whatever ONNX Runtime does with a graph that is another than the manifest says.
        """
        largest = self._manifest.vocab_size - 1
        for length in {1, min(self._manifest.context_length, WARM_UP_TOKENS)}:
            answer = self._run([[largest] * length])[0]
            self.dimension = answer.shape[-1]
            if self._output == "logits" and self.dimension != self._classes:
                wanted = "a reranker has 1" if self._manifest.kind == "reranker" else None
                wanted = wanted or f"the manifest has {self._classes} labels"
                raise ModelFolderError(f"the graph tells {self.dimension} classes apart, {wanted}")

    def run(
        self, texts: Sequence[list[int]], types: Sequence[list[int]] = ()
    ) -> list[NDArray[np.float32] | NDArray[np.float64] | Exception]:
        """One run: what the model says of each text's tokens, or its error.

        An embedding [dimension], probabilities [labels] or [tokens, labels], a score [1] from 0 to 1. `types`
        are the texts' token types, all 0 by default.
        """
        try:
            return list(self._run(texts, types))
        except Exception as error:
            if len(texts) == 1:
                return [error]
            each = zip(texts, types or [[]] * len(texts), strict=True)
            return [self.run([text], [kinds])[0] for text, kinds in each]  # shows whose fault it was

    def _run(self, texts: Sequence[list[int]], types: Sequence[list[int]] = ()) -> Any:
        ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
        mask, kinds = np.zeros_like(ids), np.zeros_like(ids)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        for row, tokens in enumerate(types):
            kinds[row, : len(tokens)] = tokens
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        with flushed():
            found = self._session.run([self._output], feeds)[0]
        output = found.astype(np.float32)
        match self._manifest.kind:
            case "embedding":
                return self._pool(output, mask)
            case "token_classifier":
                return [_softmax(logits[: len(tokens)]) for logits, tokens in zip(output, texts, strict=True)]
            case "reranker":
                return _sigmoid(output)
        return _sigmoid(output) if self._manifest.scores == "sigmoid" else _softmax(output)

    def _pool(self, hidden: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """[texts, tokens, dimension] to [texts, dimension]."""
        if self._manifest.pooling == "cls":
            pooled = hidden[:, 0]
        elif self._manifest.pooling == "last":
            pooled = hidden[np.arange(len(hidden)), mask.sum(axis=1) - 1]
        else:
            weights = mask[:, :, None].astype(np.float32)
            pooled = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
        if self._manifest.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        vectors: NDArray[np.float32] = pooled.astype(np.float32)
        return vectors


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    normed: NDArray[np.float32] = (shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)
    return normed


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """In 64 bits, where far more scores differ near 1. Not finite where a logit is not."""
    finite = np.where(np.isfinite(logits), logits, np.nan).astype(np.float64)
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = np.exp(-np.logaddexp(0, -finite))
    return shares
