"""From a label for each token to entities in the text: BIO, read word by word.

A word has the label of its first token, since that is what such models are trained on: the other pieces of
a word are left out of their loss. "B-X" begins an entity, "I-X" goes on with one of the same X that ends
just before it and else begins one, as conlleval reads it; a label without either is read as "I-".
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from flink_llm.engine.protocol import Entity
from flink_llm.engine.tokenizer import Spans

OUTSIDE = "O"


def entities(text: str, spans: Spans, shares: NDArray[np.floating[Any]], labels: Sequence[str]) -> list[Entity]:
    """The entities of a text in order, apart from each other. `shares` are probabilities [tokens, labels].

    The score of an entity is the mean probability of its words' labels.
    """
    found: list[_Open] = []
    before = OUTSIDE
    for word in _words(text, spans, shares, labels):
        begins, kind = _read(word.label)
        if kind != OUTSIDE and (begins or kind != before):
            found.append(_Open(kind, word.start, word.end, [word.score]))
        elif kind != OUTSIDE:
            found[-1].end = word.end
            found[-1].scores.append(word.score)
        before = kind
    return [Entity(each.label, sum(each.scores) / len(each.scores), each.start, each.end) for each in found]


class _Open(Struct):
    label: str
    start: int
    end: int
    scores: list[float]


def _words(text: str, spans: Spans, shares: NDArray[np.floating[Any]], labels: Sequence[str]) -> list[Entity]:
    """Each word with its label. Offsets of some tokenizers hold the space before a word: it is left out."""
    found: list[Entity] = []
    last: int | None = None
    for i, word in enumerate(spans.words):
        start, end = spans.offsets[i]
        if word is None or not text[start:end].strip():
            continue
        if word == last:
            found[-1] = Entity(found[-1].label, found[-1].score, found[-1].start, max(found[-1].end, end))
            continue
        last = word
        start += len(text[start:end]) - len(text[start:end].lstrip())
        best = int(shares[i].argmax())
        found.append(Entity(labels[best], float(shares[i, best]), start, end))
    return found


def _read(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and of what."""
    mark, dash, kind = label.partition("-")
    return (mark == "B", kind) if dash and kind and mark in ("B", "I") else (False, label)
