"""Speculation without a second model: what stood behind these tokens before may stand behind them again.

Prompt lookup decoding (Saxena 2023, "Prompt Lookup Decoding"): grounded replies quote their prompt, so
the tokens after the latest earlier occurrence of the last few are a good guess. Verifying a guess costs
one longer run; whether that pays is measured as it goes, and where it does not, guessing pauses.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that must agree for a guess, tried from the longest."""
GUESS = 12
"""Tokens of one guess at most."""
TRIAL, PAUSE = 3, 32
"""After so many guesses in a row that did not pay, how many tokens go by without one."""


class Lookup:
    """The tokens of one text, and where each short run of them stood last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST + 1)]
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on."""
        at = len(self._tokens)
        for size in range(SHORTEST, LONGEST + 1):  # the run that ends before `token` is known from now on
            if at >= size:
                self._ends[size][tuple(self._tokens[at - size :])] = at
        self._tokens.append(token)

    def guess(self, limit: int = GUESS) -> list[int]:
        """What may come next, at most `limit` tokens; empty where nothing is known."""
        for size in range(LONGEST, SHORTEST - 1, -1):
            start = self._ends[size].get(tuple(self._tokens[-size:]))
            if start is not None:
                return self._tokens[start : start + limit]
        return []


class Payoff:
    """Whether guessing pays for one text: told what each guess cost and brought."""

    def __init__(self) -> None:
        self._losses = 0
        self._pause = 0

    def worth_it(self) -> bool:
        """Whether to guess now; called once for each token or guess."""
        if self._pause > 0:
            self._pause -= 1
            return False
        return True

    def record(self, accepted: int, cost: float) -> None:
        """A guess whose run took `cost` plain steps and of whose tokens `accepted` were right.

        The run itself yields one token more, as a plain step does.
        """
        if accepted + 1 >= cost:
            self._losses = 0
            return
        self._losses += 1
        if self._losses >= TRIAL:
            self._losses, self._pause = TRIAL - 1, PAUSE
