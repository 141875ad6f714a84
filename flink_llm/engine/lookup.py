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
SMOOTH = 0.2


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


class Costs:
    """What steps and guesses' runs have been taking, in seconds, smoothed."""

    def __init__(self) -> None:
        self._steps: dict[int, float] = {}
        self._run = 0.0

    def step(self, size: int, seconds: float) -> None:
        """A plain step of `size` texts."""
        self._steps[size] = _smoothed(self._steps.get(size, 0.0), seconds)

    def run(self, size: int, seconds: float) -> float:
        """A guess's run while `size` texts decoded; how many tokens plain steps would have made meanwhile."""
        self._run = _smoothed(self._run, seconds)
        return self._tokens(size, seconds)

    def allow(self, size: int, guessed: int) -> bool:
        """Whether a guess of so many tokens can pay if it is right, as far as is known."""
        return size in self._steps and guessed + 1 > self._tokens(size, self._run)

    def _tokens(self, size: int, seconds: float) -> float:
        return seconds * size / self._steps[size] if self._steps.get(size) else 0.0


def _smoothed(before: float, now: float) -> float:
    return now if before == 0 else before + SMOOTH * (now - before)
