"""Speculation without a second model: what stood behind these tokens before may stand behind them again.

Prompt lookup decoding (Saxena 2023, "Prompt Lookup Decoding"): grounded replies quote their prompt, so
the tokens after the latest earlier occurrence of the last few are a good guess; the more agree, the longer
it is (Oliaro et al. 2024, "SuffixDecoding"). Verifying a guess costs one longer run; whether that pays is
measured as it goes, and where it does not, guessing pauses.
"""

from collections.abc import Collection, Sequence
from itertools import takewhile

import numpy as np

from flink_llm.engine.pace import smoothed

AGREE = {32: 64, 16: 32, 8: 12, 4: 12, 3: 12, 2: 8}
"""Tokens that must agree for a guess, tried from the most, and how many are guessed then at most."""
CERTAIN = 8
"""So many agree by chance, or for the sake of a template, so seldom that the guess may be read with the prompt."""
TRIAL, PAUSE = 3, 32
"""After so many guesses in a row that did not pay, how many tokens go by without one."""
REACH = 16_384
"""Tokens of a prompt that are searched, its last."""
WIDTH = 4
"""Bytes of a token."""


class Lookup:
    """The tokens of one text, searched as bytes: a search backwards is cheaper than keeping an index.

    Nothing is guessed from one of `ends` on: a reply that says it is over.
    """

    def __init__(self, tokens: Sequence[int], ends: Collection[int] = ()) -> None:
        self._text = bytearray(np.asarray(tokens[-REACH:], "<u4").tobytes())
        self._ends = ends

    def add(self, token: int) -> None:
        """The text goes on."""
        self._text += token.to_bytes(WIDTH, "little")

    def guess(self, limit: int | None = None, least: int = 0) -> list[int]:
        """What may come next before an end, at most `limit` tokens; empty where nothing is known, or fewer than
        `least` agree.
        """
        if self._before(min(AGREE) * WIDTH) is None:  # nor do more
            return []
        for size, most in AGREE.items():
            end = self._before(size * WIDTH) if size >= least else None
            if end is not None:
                count = most if limit is None else min(limit, most)
                found = np.frombuffer(self._text[end : end + count * WIDTH], "<u4").tolist()
                return list(takewhile(lambda token: token not in self._ends, found))
        return []

    def _before(self, length: int) -> int | None:
        """Where the latest earlier occurrence of the last `length` bytes ends."""
        run, end = self._text[-length:], len(self._text) - WIDTH
        while len(run) == length:
            start = self._text.rfind(run, 0, end)
            if start < 0:
                return None
            if start % WIDTH == 0:
                return start + length
            end = start + length - 1  # bytes of two tokens that look like one
        return None


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
        self._runs: dict[int, float] = {}  # by the guess's length, within a factor of two

    def step(self, size: int, seconds: float) -> None:
        """A plain step of `size` texts."""
        self._steps[size] = smoothed(self._steps.get(size), seconds)

    def run(self, size: int, guessed: int, seconds: float) -> float:
        """A guess's run while `size` texts decoded; how many tokens plain steps would have made meanwhile."""
        length = guessed.bit_length()
        self._runs[length] = smoothed(self._runs.get(length), seconds)
        return self.tokens(size, seconds)

    def allow_any(self, size: int) -> bool:
        """Whether any guess can pay."""
        return any(self.allow(size, guessed) for guessed in AGREE.values())

    def allow(self, size: int, guessed: int) -> bool:
        """Whether a guess of so many tokens can pay if it is right, as far as is known."""
        return size in self._steps and guessed + 1 > self.tokens(size, self._runs.get(guessed.bit_length(), 0.0))

    def tokens(self, size: int, seconds: float) -> float:
        """How many tokens plain steps of `size` texts make in so many seconds; 0 where that is not known."""
        return seconds * size / self._steps[size] if self._steps.get(size) else 0.0
