"""Embedding and classification: what waits at the same moment is padded together and run once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.decoder import check_value, open_session
from flink_llm.engine.model import ModelFolder
from flink_llm.errors import ModelFolderError

PADDED_TOKENS = 4096
"""Tokens of one run, padding included."""
WARM_UP_TOKENS = 1024
"""The longest text of a warm-up: attention over a longer one takes seconds."""

_KNOWN = {"input_ids", "attention_mask", "token_type_ids"}


class Encoder:
    """One encoder's graph. Raises ModelFolderError for a graph with other inputs or outputs."""

    def __init__(self, folder: ModelFolder, *, device: str, threads: int) -> None:
        self._manifest = folder.manifest
        self._session = open_session(folder, device, threads)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._output = "logits" if folder.manifest.kind == "classifier" else "last_hidden_state"
        if not {"input_ids", "attention_mask"} <= self._inputs <= _KNOWN:
            raise ModelFolderError(f"{folder.manifest.name}: the graph's inputs are {sorted(self._inputs)}")
        found = {value.name: value for value in self._session.get_outputs()}.get(self._output)
        if found is None:
            raise ModelFolderError(f"{folder.manifest.name}: the graph has no output {self._output!r}")
        shape = [None, len(folder.manifest.labels)] if self._output == "logits" else [None, None, None]
        check_value(folder.manifest, found, shape)

    def warm_up(self) -> None:
        """Runs what a request would: the largest token, and a text that fills the context.

        Raises whatever ONNX Runtime does with a graph that is another than the manifest says.
        """
        largest = self._manifest.vocab_size - 1
        for length in {1, min(self._manifest.context_length, WARM_UP_TOKENS)}:
            answer = self._run([[largest] * length])[0]
            if self._output == "logits" and len(answer) != len(self._manifest.labels):
                labels = len(self._manifest.labels)
                raise ModelFolderError(f"the graph tells {len(answer)} classes apart, the manifest has {labels} labels")

    def run(self, texts: Sequence[list[int]]) -> list[NDArray[np.float32] | Exception]:
        """A vector for each text's tokens: an embedding [dimension], probabilities [labels], or its error."""
        answers: dict[int, NDArray[np.float32] | Exception] = {}
        for batch in batches([len(tokens) for tokens in texts]):
            answers.update(zip(batch, self._each([texts[i] for i in batch]), strict=True))
        return [answers[i] for i in range(len(texts))]

    def _each(self, texts: list[list[int]]) -> list[NDArray[np.float32] | Exception]:
        try:
            return list(self._run(texts))
        except Exception as error:
            if len(texts) == 1:
                return [error]
            return [answer for text in texts for answer in self._each([text])]  # shows whose fault it was

    def _run(self, texts: list[list[int]]) -> Any:
        longest = max(len(tokens) for tokens in texts)
        ids = np.zeros((len(texts), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        output = self._session.run([self._output], feeds)[0].astype(np.float32)
        return _softmax(output) if self._output == "logits" else self._pool(output, mask)

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


def batches(lengths: Sequence[int], limit: int = PADDED_TOKENS) -> list[list[int]]:
    """Indices of texts to run together: similar lengths, at most `limit` padded tokens where it can be."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    normed: NDArray[np.float32] = (shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)
    return normed
