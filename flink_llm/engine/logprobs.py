"""Log-probabilities of a reply's tokens, as the model gave them: before penalties, temperature and grammar."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.sampling import BLOCK, largest
from flink_llm.records import Logprob

Logits = NDArray[np.floating[Any]]


class Logprobs:
    """Those of one reply, with the `top` likeliest of each position; `text` gives the text of tokens."""

    def __init__(self, top: int, text: Callable[[list[int]], str]) -> None:
        self.found: list[Logprob] = []
        self._top = top
        self._text = text

    def look(self, logits: Logits) -> None:
        """At logits [vocabulary], before anything changes them."""
        self._logits = logits
        best = float(logits.max())
        blocks = (logits[start : start + BLOCK].astype(np.float64) for start in range(0, logits.size, BLOCK))
        self._total = best + float(np.log(sum(np.exp(block - best).sum() for block in blocks)))
        tokens = largest(logits, min(self._top, logits.size)) if self._top else np.empty(0, np.int64)
        self._likeliest = sorted(((float(logits[token]), int(token)) for token in tokens), key=lambda one: -one[0])

    def take(self, token: int, before: float | None) -> None:
        """The token that was chosen of them; `before` is its logit where that has been changed since."""
        logit = float(self._logits[token]) if before is None else before
        top = [self._one(likely, score) for score, likely in self._likeliest]
        self.found.append(self._one(token, logit, top))

    def _one(self, token: int, logit: float, top: list[Logprob] | None = None) -> Logprob:
        return Logprob(id=token, text=self._text([token]), logprob=round(logit - self._total, 6), top=top or [])
