"""What steps, and runs over prompts, have been taking. Pure: no clock in here."""

from collections import deque
from dataclasses import dataclass

from flink_llm.engine.pace import smoothed

KEPT = 32
"""Runs over prompts that are remembered."""
NEAR = 128
"""Tokens of a prompt up to which attention takes no part that counts; longer runs tell nothing of shorter ones."""
TELLING = 16
"""Tokens of a prompt in a step from which on they tell something."""
MOST_ABOVE = 4.0
"""How many times as long as expected a run may count for: a machine that stood still tells nothing of a run."""
LEAST_SHARE = 0.25
"""Of a run's time, what its tokens take at the least: measurements that say less are chance."""


@dataclass(frozen=True)
class Tempo:
    """Seconds: a step of everybody who decodes, a run over prompts by itself, each of its tokens; 0: unknown."""

    step_s: float = 0.0
    run_s: float = 0.0
    token_s: float = 0.0

    @property
    def known(self) -> bool:
        """Whether a step can be compared with the reading of a prompt."""
        return bool(self.step_s and self.token_s)

    def reading(self, tokens: int) -> float:
        """Seconds of a run over so many tokens of prompts, padding included."""
        return self.run_s + tokens * self.token_s

    @property
    def mixed(self) -> "Tempo":
        """Where prompts are read in the runs of steps: a run by itself takes nothing more."""
        return Tempo(self.step_s, 0.0, self.token_s)

    def tokens_in(self, seconds: float) -> int:
        """How many tokens of prompts a run of so many seconds reads, 0 where it takes longer for one. Once `known`."""
        return max(0, int((seconds - self.run_s) / self.token_s))

    @property
    def worth_a_run(self) -> int:
        """Tokens that take as long as a run does by itself, at most `NEAR`; 0 where unknown."""
        return min(NEAR, int(self.run_s / self.token_s)) if self.token_s else 0


UNKNOWN = Tempo()


class TempoMeter:
    """Learns the `tempo` from what it is told.

    A run reads all weights, however few its tokens are, and then takes so much for each of them: a straight
    line through the latest short runs (least squares), those at the beginning of prompts if there are any of several
    lengths, else those behind. How far runs are from it at present is told by the latest of them, wherever.
    """

    def __init__(self) -> None:
        self._step_s: float | None = None
        self._near: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self._far: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self._line = UNKNOWN
        self._above = 1.0
        self.tempo = UNKNOWN

    def stepped(self, seconds: float) -> None:
        """A step of everybody who decodes took so long."""
        self._step_s = smoothed(self._step_s, seconds)
        self._tell()

    def read(self, tokens: int, seconds: float, past: int = 0) -> None:
        """A run over so many tokens, behind `past` tokens of their prompt, took so long."""
        if expected := self._line.reading(tokens):
            seconds = min(seconds, MOST_ABOVE * expected)
            self._above = smoothed(self._above, seconds / expected)
        if tokens <= NEAR or not expected:
            (self._near if past + tokens <= NEAR else self._far).append((tokens, seconds))
            runs = self._near if _several(self._near) or not _several(self._far) else self._far
            self._line = Tempo(0.0, *_line(runs or self._far))
        self._tell()

    def mixed(self, tokens: int, seconds: float) -> float:
        """A step in whose run so many tokens of a prompt were read took so long; how much longer than without them.

        Of a few tokens nothing is learnt: steps differ by as much.
        """
        longer = max(0.0, seconds - (self._step_s or 0.0))
        expected = tokens * self._line.token_s
        if expected and tokens >= TELLING:
            self._above = smoothed(self._above, min(longer / expected, MOST_ABOVE))
            self._tell()
        return longer

    def _tell(self) -> None:
        line, above = self._line, self._above
        self.tempo = Tempo(self._step_s or 0.0, above * line.run_s, above * line.token_s)


def _several(runs: deque[tuple[int, float]]) -> bool:
    """Whether their lengths differ."""
    return len({count for count, _ in runs}) > 1


def _line(runs: deque[tuple[int, float]]) -> tuple[float, float]:
    """Seconds of a run by itself, and of a token."""
    tokens = sum(count for count, _ in runs) / len(runs)
    seconds = sum(took for _, took in runs) / len(runs)
    spread = sum((count - tokens) ** 2 for count, _ in runs)
    together = sum((count - tokens) * (took - seconds) for count, took in runs)
    most = seconds / tokens
    token_s = min(max(together / spread, LEAST_SHARE * most), most) if spread else most
    return seconds - token_s * tokens, token_s
