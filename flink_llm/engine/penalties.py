"""What options add to the logits of some tokens: penalties of what was said already, and a bias.

Repetition penalty: Keskar et al. 2019, "CTRL", over prompt and reply. Presence and frequency penalties are
those of OpenAI's API, over the reply. Only the tokens that are concerned are touched.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.protocol import Options
from flink_llm.errors import RecordError

Logits = NDArray[np.floating[Any]]


class Penalties:
    """The changes of one reply's logits; told of each token of the reply by `add`."""

    def __init__(self, options: Options, prompt: Sequence[int]) -> None:
        self._options = options
        self._row: dict[int, int] = {}  # where a token stands in the arrays
        self._tokens = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._bias = np.empty(0, np.float64)
        self._seen = np.empty(0, np.bool_)
        repeated = set(prompt) if options.repetition_penalty != 1 else set()
        self._enter(sorted(repeated.union(token for token, _ in options.logit_bias)))
        for token, bias in options.logit_bias:
            self._bias[self._row[token]] = bias
        for token in repeated:
            self._seen[self._row[token]] = True
        self._before = np.empty(0, np.float64)

    def add(self, token: int) -> None:
        """The reply goes on with `token`."""
        if token not in self._row:
            self._enter([token])
        self._counts[self._row[token]] += 1
        self._seen[self._row[token]] = True

    def apply(self, logits: Logits) -> None:
        """Changes logits [vocabulary] in place."""
        options = self._options
        found = self._before = logits[self._tokens].astype(np.float64)
        factor = np.where(found > 0, 1 / options.repetition_penalty, options.repetition_penalty)
        changed = np.where(self._seen, found * factor, found)
        changed -= options.frequency_penalty * self._counts + options.presence_penalty * (self._counts > 0)
        logits[self._tokens] = changed + self._bias

    def before(self, token: int) -> float | None:
        """The logit of a token before the last `apply`, None where that left it alone."""
        at = self._row.get(token, len(self._before))
        return float(self._before[at]) if at < len(self._before) else None

    def _enter(self, tokens: Sequence[int]) -> None:
        self._row |= {token: len(self._row) + i for i, token in enumerate(tokens)}
        more = len(tokens)
        self._tokens = np.concatenate([self._tokens, np.asarray(tokens, np.int64)])
        self._counts, self._bias, self._seen = (
            np.concatenate([old, np.zeros(more, old.dtype)]) for old in (self._counts, self._bias, self._seen)
        )


def penalties(options: Options, prompt: Sequence[int]) -> Penalties | None:
    """Those that `options` ask for, None for none."""
    neutral = (options.repetition_penalty, options.presence_penalty, options.frequency_penalty) == (1, 0, 0)
    return None if neutral and not options.logit_bias else Penalties(options, prompt)


def check_tokens(bias: Sequence[tuple[int, float]], vocabulary: int) -> None:
    """Raises RecordError `bad_option` for a token that the model does not have."""
    beyond = max((token for token, _ in bias), default=0)
    if beyond >= vocabulary:
        raise RecordError("bad_option", f"logit_bias names token {beyond}, the model has 0 to {vocabulary - 1}")
