"""The way to the end of a constrained text: tokens that make it whole, found by walking.

A grammar says which tokens may come next, and not which of them lead to its end. So a text is gone on with by a habit
until it is whole. The first habit closes what is open. Where that goes round in circles, one that does not repeat
itself gets out (a number above zero, an address), or one that takes the longest tokens (a text of a least length).
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLOSING = ("}", "]", ",", ":", '"', "0")
"""What leads to the end of a JSON text, the best first; within a string, where a letter may stand, its quote does."""
FORMING = ("}", "]", '"', "@", ".", " ", "-", ",", ":", "/", *"0123456789")
"""What texts of a form turn on, the likeliest first."""
AGAIN = 1000.0
"""So much worse a token is for each time that it was taken."""
LONGEST_END = 512
"""Tokens of the longest way to the end that is looked for."""
SHORTENED = 128
"""Tokens of a way up to which it is looked through for what it can do without."""

Mask = Callable[[Any], NDArray[np.bool_]]
Habit = Callable[[NDArray[np.bool_], list[int]], int]


class Endings:
    """For the grammars of one model. `tokenizer` is llguidance's; a text is over with one of `ends`."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = list(ends)
        self._closing = [self._token(text) for text in CLOSING]
        self._quote, self._letter = self._token('"'), self._token("x")

    @property
    def habits(self) -> tuple[Habit, ...]:
        """In the order in which they are to be tried."""
        return self._close, self._vary, self._hurry

    def ways(self, matcher: Any, mask: Mask) -> list[tuple[list[int], Habit]]:
        """From the beginning of a text, by each habit that finds one."""
        found = [(self.way(matcher, mask, habit, LONGEST_END), habit) for habit in self.habits]
        return [(_shortened(matcher, way), habit) for way, habit in found if way is not None]

    def way(self, matcher: Any, mask: Mask, habit: Habit, most: int) -> list[int] | None:
        """Tokens from there to a whole text by a habit, the end mark included; None where it takes more than `most`."""
        matcher = matcher.deep_copy()
        way: list[int] = []
        while len(way) < most:
            forced = matcher.compute_ff_tokens()
            if forced and matcher.try_consume_tokens(forced) == len(forced):
                way += forced
                continue
            allowed = mask(matcher)
            if matcher.is_error() or not allowed.any():
                return None
            ends = [token for token in self._ends if allowed[token]]
            if ends or matcher.is_stopped():
                return [*way, *ends[:1]]
            in_text = allowed[self._quote] and allowed[self._letter]
            if in_text and (habit == self._close or way[-1:] != [self._quote]):  # else it may be no JSON
                token = self._quote
            else:
                token = habit(allowed, way)
            matcher.try_consume_tokens([token])
            way.append(token)
        return None

    def _close(self, allowed: NDArray[np.bool_], way: list[int]) -> int:
        return next((token for token in self._closing if allowed[token]), int(allowed.argmax()))

    def _vary(self, allowed: NDArray[np.bool_], way: list[int]) -> int:
        worth = self._ranks.copy()
        np.add.at(worth, way, AGAIN)
        worth[~allowed] = np.inf
        return int(worth.argmin())

    def _hurry(self, allowed: NDArray[np.bool_], way: list[int]) -> int:
        return int(np.where(allowed, self._lengths, -1).argmax())

    def _token(self, text: str) -> int:
        return int(self._tokenizer.tokenize_str(text)[0])

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        """[vocabulary]: bytes of each token."""
        return np.array([len(self._tokenizer.decode_bytes([token])) for token in range(self._vocabulary)])

    @cached_property
    def _ranks(self) -> NDArray[np.float64]:
        """[vocabulary]: how much texts of a form turn on each token, least on the long ones."""
        ranks = len(FORMING) + self._lengths.astype(np.float64)
        for rank, text in enumerate(FORMING):
            ranks[self._token(text)] = rank
        return ranks


def _shortened(matcher: Any, way: list[int]) -> list[int]:
    """The way without what it can do without: one that does not repeat itself goes round."""
    start = 0
    while start < len(way) <= SHORTENED:
        for later in range(len(way) - 1, start, -1):
            shorter = way[:start] + way[later:]
            if matcher.validate_tokens(shorter) == len(shorter):
                way = shorter
                break
        start += 1
    return way
