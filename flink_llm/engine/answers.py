"""What encoders have said, kept by the content they were asked about, in so many bytes.

An encoder says the same of the same text, so its answer needs no model the second time. Streams repeat
themselves: the same product, the same greeting, a record that runs again after a restore.
"""

import hashlib

import numpy as np
from cachetools import LRUCache
from msgspec import Struct
from numpy.typing import NDArray

from flink_llm.engine.protocol import Entity

ENTRY_BYTES = 700
"""About what an entry takes beside its numbers: its key, its places in two dicts, its objects."""
ENTITY_BYTES = 200
Numbers = NDArray[np.float32] | NDArray[np.float64]


class Answer(Struct, frozen=True):
    """What a model said of one text or pair, and of how many tokens that was.

    `numbers`: a whole embedding [dimension], probabilities [labels], or a score [1]; `entities` of a tagging.
    """

    tokens: int
    numbers: Numbers
    entities: tuple[Entity, ...] = ()

    @property
    def size(self) -> int:
        """About how many bytes of memory it takes in `Answers`."""
        return ENTRY_BYTES + self.numbers.nbytes + ENTITY_BYTES * len(self.entities)


class Answers:
    """Answers by their content, those used longest ago forgotten first. Used by one thread.

    They take about `megabytes` (of 10**6 bytes) at most; 0 keeps none.
    """

    def __init__(self, megabytes: float) -> None:
        self._kept: LRUCache[bytes, Answer] = LRUCache(megabytes * 1e6, getsizeof=lambda answer: answer.size)

    @property
    def size(self) -> float:
        """About how many bytes of memory they take."""
        return self._kept.currsize

    def get(self, key: bytes) -> Answer | None:
        """The answer kept for a key."""
        return self._kept.get(key)

    def put(self, key: bytes, answer: Answer) -> None:
        """Keeps an answer, unless it is larger than all that may be kept."""
        if answer.size <= self._kept.maxsize:
            self._kept[key] = answer


def content_key(model: str, kind: str, *texts: str) -> bytes:
    """What an answer is found again by: the SHA-256 of the model's hash, what is asked, and the texts."""
    digest = hashlib.sha256()
    for part in (model, kind, *texts):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "big") + raw)  # the length keeps "ab", "c" apart from "a", "bc"
    return digest.digest()
