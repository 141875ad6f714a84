"""What a handler holds of an encoder: it reads a text and says a vector, a class, entities or a ranking.

Every call raises RecordError for what this record did wrong, Overloaded for lack of room, and Outage.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from flink_llm.engine.generation import Served
from flink_llm.engine.protocol import Done, Engine, Entity
from flink_llm.errors import RecordError
from flink_llm.records import Usage


class Said(Struct, frozen=True, kw_only=True):
    """What every answer tells of its model: name, the hash of its manifest, and the tokens that it read."""

    model: str
    model_hash: str
    usage: Usage


class Embedding(Said, frozen=True, kw_only=True):
    """`vector` has shape [dimension], or as many as were asked for, float32."""

    vector: npt.NDArray[np.float32]


class Embedder(Served):
    """An embedding model: `await embedder(text)`."""

    def __init__(self, engine: Engine, name: str, folder: str) -> None:
        super().__init__(engine, name, folder, "embedding")

    async def __call__(self, text: str, *, dimensions: int | None = None) -> Embedding:
        """The embedding of a text, which is cut to what the model reads.

        `dimensions` keeps the first so many of a Matryoshka model, and makes them of length 1 again where
        the model does. Raises RecordError: `empty_text`; `bad_option` for dimensions that the model has not.
        """
        done = await self._finish("embed", text=text, dimensions=dimensions)
        vector = np.frombuffer(done.vector, dtype="<f4")
        return Embedding(vector=vector, **_said(self, done))


class Classification(Said, frozen=True, kw_only=True):
    """The best label, and the probability of each."""

    label: str
    scores: dict[str, float]


class Classifier(Served):
    """A classifier: `await classifier(text)`."""

    def __init__(self, engine: Engine, name: str, folder: str) -> None:
        super().__init__(engine, name, folder, "classifier")

    async def __call__(self, text: str) -> Classification:
        """The class of a text, which is cut to what the model reads. Raises RecordError `empty_text`."""
        done = await self._finish("classify", text=text)
        scores = dict(zip(self.loaded.labels, done.scores, strict=True))
        best = max(scores, key=scores.__getitem__)
        return Classification(label=best, scores=scores, **_said(self, done))


class Tagging(Said, frozen=True, kw_only=True):
    """`entities` in the order of the text, apart from each other."""

    entities: list[Entity]


class Tagger(Served):
    """A token classifier: `await tagger(text)`."""

    def __init__(self, engine: Engine, name: str, folder: str) -> None:
        super().__init__(engine, name, folder, "token_classifier")

    async def __call__(self, text: str) -> Tagging:
        """The entities of a text: `text[entity.start : entity.end]` is what each is called there.

        Raises RecordError: `empty_text`; `context_overflow` for a text that is longer than the model reads,
        since the entities of its rest would be missing.
        """
        done = await self._finish("tag", text=text)
        return Tagging(entities=done.entities, **_said(self, done))


class Ranked(Struct, frozen=True):
    """A document by its place in the list that was given, and its score."""

    index: int
    score: float


class Ranking(Said, frozen=True, kw_only=True):
    """`scores` are 0 to 1, the higher the more relevant, in the order of the documents."""

    scores: list[float]

    def best(self, count: int | None = None) -> list[Ranked]:
        """The `count` best documents, all by default, the best first; of equal scores the earlier one first."""
        order = sorted(range(len(self.scores)), key=lambda i: -self.scores[i])
        return [Ranked(i, self.scores[i]) for i in order[:count]]


class Reranker(Served):
    """A cross-encoder: `await reranker(query, documents)`."""

    def __init__(self, engine: Engine, name: str, folder: str) -> None:
        super().__init__(engine, name, folder, "reranker")

    async def __call__(self, query: str, documents: Sequence[str]) -> Ranking:
        """How well each document answers the query: the sigmoid of the model's logit for the two together.

        Of a pair that is longer than the model reads, the longer one is cut. Raises RecordError: `empty_text`
        for no documents, and for a query or a document without text; `too_large` for more than 256 documents.
        """
        done = await self._finish("rerank", text=query, documents=documents)
        if len(done.scores) != len(documents):
            raise RecordError("model_error", f"{self.name} gave {len(done.scores)} scores for {len(documents)} texts")
        return Ranking(scores=done.scores, **_said(self, done))


def _said(served: Served, done: Done) -> dict[str, Any]:
    usage = Usage(prompt_tokens=done.prompt_tokens)
    return {"model": served.name, "model_hash": done.model or served.loaded.sha256, "usage": usage}
