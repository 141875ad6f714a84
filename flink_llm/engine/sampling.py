"""The next token from its logits. A request's draws depend on its logits, seed and position alone.

A vocabulary is worked through in blocks, so that nothing of the logits' size is ever made. Top-k narrows
the row first; what top-p leaves of it is told by a bound, the last candidate in the order of falling scores
(equal ones by rising number); min-p (Nguyen et al. 2024) then drops whoever is too far below the best. The
draw is an inverse transform over the candidates' rising numbers.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.protocol import Options

Logits = NDArray[np.floating[Any]]
Block = NDArray[np.float64]
Shares = Callable[[int], Block]

log = logging.getLogger(__name__)
BLOCK = 2048
BINS = 1024
SPAN = 100.0
"""How far below the best a score may be to have a bin of its own; whatever is further shares the last."""


class _Bound(NamedTuple):
    """The last candidate: its score, and its number among those of that score."""

    score: float
    token: int


def sample(logits: Logits, rows: list[int], options: list[Options], positions: list[int]) -> list[int | None]:
    """One token for each of `rows` of `logits` [any, vocabulary]; None for a row that allows no choice.

    `positions` counts the tokens a request has been given.
    """
    if not rows:
        return []
    first = min(rows)
    best = logits[first : max(rows) + 1].argmax(axis=-1)  # of a row the first NaN, if there is one
    return [
        _choose(logits[row], int(best[row - first]), option, position)
        for row, option, position in zip(rows, options, positions, strict=True)
    ]


def _choose(row: Logits, top: int, option: Options, position: int) -> int | None:
    try:
        if not math.isfinite(row[top]):
            return None
        return top if option.temperature == 0 else _draw(row, option, position)
    except Exception:  # one row's, whatever it is: the others of the step have theirs
        log.exception("no token could be drawn")
        return None


def _draw(row: Logits, option: Options, position: int) -> int:
    """One draw after temperature, top-k, top-p and min-p."""
    if 0 < option.top_k < row.size:
        tokens = largest(row, option.top_k)
        return int(tokens[_drawn(row[tokens], option, position)])
    return _drawn(row, option, position)


def _drawn(row: Logits, option: Options, position: int) -> int:
    best = float(row.max())
    bound: _Bound | None = None
    least = 0.0

    def shares(start: int) -> Block:
        """Of a block, relative to the best token's; 0 for those that are no candidates."""
        scores = _block(row, start)
        with np.errstate(over="ignore"):  # at a temperature near 0: minus infinity is what is meant
            found: Block = np.exp((scores - best) / option.temperature)
        if bound is not None:
            found[_beyond(scores, start, bound)] = 0.0
        found[found < least] = 0.0
        return found

    sums = np.array([shares(start).sum() for start in _starts(row)])
    if option.top_p < 1:
        bound = _bound(row, best, shares, option.top_p * float(sums.sum()))
    if option.top_p < 1 or option.min_p:
        least = option.min_p
        sums = np.array([shares(start).sum() for start in _starts(row)])
    block, rest = _fall(sums, uniform(option.seed, position) * float(sums.sum()))
    token, _ = _fall(shares(block * BLOCK), rest)
    return block * BLOCK + token


def _starts(row: Logits) -> range:
    return range(0, row.size, BLOCK)


def _block(row: Logits, start: int) -> Block:
    return row[start : start + BLOCK].astype(np.float64)


def largest(row: Logits, count: int) -> NDArray[np.int64]:
    """Numbers of the `count` largest, rising; of equal ones the first are taken."""
    tokens, scores = np.empty(0, np.int64), np.empty(0, row.dtype)
    for start in _starts(row):
        block = row[start : start + BLOCK]
        full = len(tokens) == count
        more = np.flatnonzero(block > scores.min()) if full else np.arange(len(block))
        tokens, scores = np.concatenate([tokens, more + start]), np.concatenate([scores, block[more]])
        if len(tokens) > count:
            order = np.lexsort((tokens, -scores))[:count]
            tokens, scores = tokens[order], scores[order]
    return np.sort(tokens)


def _beyond(scores: Block, start: int, bound: _Bound) -> NDArray[np.bool_]:
    """Which of a block come after the bound."""
    after = np.arange(start, start + len(scores)) > bound.token
    beyond: NDArray[np.bool_] = (scores < bound.score) | ((scores == bound.score) & after)
    return beyond


def _bound(row: Logits, best: float, shares: Shares, target: float) -> _Bound:
    """The candidate at which the running sum of shares reaches `target`.

    Shares are summed in bins first: only what is in the bin where that happens has to be sorted.
    """
    width = min(SPAN, best - float(row.min())) / BINS or 1.0
    totals = np.zeros(BINS)
    for start in _starts(row):
        totals += np.bincount(_bins(_block(row, start), best, width), shares(start), BINS)
    ends = np.cumsum(totals)
    crossing = min(int(np.searchsorted(ends, target)), int(np.flatnonzero(totals)[-1]))
    parts = []
    for start in _starts(row):
        scores = _block(row, start)
        inside = np.flatnonzero(_bins(scores, best, width) == crossing)
        parts.append((scores[inside], inside + start, shares(start)[inside]))
    scores, tokens, held = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((tokens, -scores))
    before = ends[crossing - 1] if crossing else 0.0
    reached = int(np.searchsorted(before + np.cumsum(held[order]), target))
    last = order[min(reached, len(order) - 1)]
    return _Bound(float(scores[last]), int(tokens[last]))


def _bins(scores: Block, best: float, width: float) -> NDArray[np.int64]:
    """0 for the best scores to `BINS` - 1 for the worst."""
    return np.minimum((best - scores) / width, BINS - 1).astype(np.int64)


def _fall(masses: Block, aim: float) -> tuple[int, float]:
    """Where `aim` falls in the running sum of the masses, never where there is none, and how far into it."""
    ends = np.cumsum(masses)
    at = min(int(np.searchsorted(ends, aim, "right")), int(np.flatnonzero(masses)[-1]))
    return at, aim - (float(ends[at - 1]) if at else 0.0)


def uniform(seed: int, position: int) -> float:
    """The draw of a position, in [0, 1): Philox is a function of (key, counter), it has no history."""
    bits = np.random.Philox(key=seed, counter=position)
    return float(np.random.Generator(bits).random())
