"""The next token from its logits. A request's draws depend on its seed and position alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.protocol import Options

Logits = NDArray[np.floating[Any]]


def sample(logits: Logits, rows: list[int], options: list[Options], positions: list[int]) -> list[int | None]:
    """One token for each of `rows` of `logits` [any, vocabulary]; None for a row that is not finite.

    `positions` counts the tokens a request has been given. Greedy rows cost one argmax of the whole
    matrix and no copy of it.
    """
    best = logits.argmax(axis=-1)
    chosen: list[int | None] = []
    for row, option, position in zip(rows, options, positions, strict=True):
        top = int(best[row])
        if not np.isfinite(logits[row, top]):
            chosen.append(None)
        elif option.temperature == 0:
            chosen.append(top)
        else:
            chosen.append(_draw(logits[row], option, position))
    return chosen


def _draw(row: Logits, option: Options, position: int) -> int:
    """One draw after temperature, top-k and top-p, by inverse transform over the sorted candidates."""
    count = option.top_k if 0 < option.top_k < row.size else row.size
    candidates = np.argpartition(row, -count)[-count:] if count < row.size else np.arange(row.size)
    # Ties are broken by the token's number, so that the order never depends on the partition.
    candidates = candidates[np.lexsort((candidates, -row[candidates]))]
    scores = row[candidates].astype(np.float64) / option.temperature
    shares = np.exp(scores - scores[0])
    total = np.cumsum(shares)
    if option.top_p < 1:
        kept = int(np.searchsorted(total, option.top_p * total[-1])) + 1
        total = total[:kept]
    drawn = int(np.searchsorted(total, uniform(option.seed, position) * total[-1], "right"))
    return int(candidates[min(drawn, len(total) - 1)])


def uniform(seed: int, position: int) -> float:
    """The draw of a position, in [0, 1): Philox is a function of (key, counter), it has no history."""
    bits = np.random.Philox(key=seed, counter=position)
    return float(np.random.Generator(bits).random())
