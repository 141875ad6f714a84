"""Whether a canary may stay: decided by what its requests and the others' came to, without a clock or a model."""

from collections import deque
from statistics import median
from typing import NamedTuple

from flink_llm.engine.deployment import CanaryBounds

LEAST_MS = 1.0
"""Times below are not told apart: they are the machine's, not a model's."""
LATELY = 9
"""The others' samples that are of the same moment as a canary's."""


class Sample(NamedTuple):
    """What a request came to. Times are in milliseconds, None where there was none to measure."""

    failed: bool = False
    first_ms: float | None = None
    per_token_ms: float | None = None


class Window:
    """The last `size` samples."""

    def __init__(self, size: int) -> None:
        self._samples: deque[Sample] = deque(maxlen=size)

    def add(self, sample: Sample) -> None:
        """One more; the oldest falls out."""
        self._samples.append(sample)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._samples)

    @property
    def failures(self) -> int:
        """How many of them failed."""
        return sum(sample.failed for sample in self._samples)

    def times(self, name: str) -> list[float]:
        """The times `first_ms` or `per_token_ms`, of those that have one."""
        return [time for sample in self._samples if (time := getattr(sample, name)) is not None]


class Canary:
    """One canary against the versions that are none. `verdict` is None as long as it may stay, and then for good
    the reason why not, with the figures.

    It fails by `bounds.max_failure_rate` once more of its requests have failed than may in a whole window,
    so a version that answers nothing is gone after a few. A failure counts where none of the others' did about the
    same time, neither of the last ones before it nor the first after it: else it is the host that fails. Each of its
    times is compared with those that the others had at the same moment, since latency is load's before it is a
    version's; it is slow by the median of these ratios, once there are `least`.
    """

    def __init__(self, bounds: CanaryBounds) -> None:
        self._bounds = bounds
        self._own = Window(bounds.window)
        self._others = Window(bounds.window)
        self._lately = Window(LATELY)
        self._unjudged: deque[Sample] = deque(maxlen=bounds.window)  # failures, until another version's request ends
        self._pairs: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=bounds.window) for name in ("first_ms", "per_token_ms")
        }
        self.least = max(10, bounds.window // 5)
        self.verdict: str | None = None

    def note(self, sample: Sample, *, canary: bool) -> None:
        """A request has ended, the canary's or another version's."""
        if canary:
            if sample.failed and not self._lately.failures:
                self._unjudged.append(sample)
            else:
                self._own.add(sample._replace(failed=False))
            self._pair(sample)
        else:
            self._others.add(sample)
            self._lately.add(sample)
            while self._unjudged:
                self._own.add(self._unjudged.popleft()._replace(failed=not sample.failed))
        if self.verdict is None:
            self.verdict = self._failing() or self._slow("first_ms", "to the first token")
            self.verdict = self.verdict or self._slow("per_token_ms", "for each further token")

    def abandoned(self, waited_ms: float) -> None:
        """One of the canary's requests was given up before it said anything.

        It is slow as far as one can know if the wait was past the bound already, and else it says nothing.
        """
        others = self._lately.times("first_ms")
        if others and waited_ms > max(self._bounds.max_latency_ratio * median(others), LEAST_MS):
            self.note(Sample(first_ms=waited_ms), canary=True)

    def _pair(self, sample: Sample) -> None:
        for name, pairs in self._pairs.items():
            took, others = getattr(sample, name), self._lately.times(name)
            if took is not None and others:
                pairs.append((took, median(others)))

    def _failing(self) -> str | None:
        own, others, bound = self._own, self._others, self._bounds.max_failure_rate
        if own.failures <= bound * self._bounds.window:
            return None
        return (
            f"{own.failures} of its last {own.count} requests failed where the others' did not, more than "
            f"{bound:.0%} of {self._bounds.window}; of the others' last {others.count}, {others.failures}"
        )

    def _slow(self, name: str, what: str) -> str | None:
        pairs, bound = self._pairs[name], self._bounds.max_latency_ratio
        if len(pairs) < self.least:
            return None
        took, usual = (median(times) for times in zip(*pairs, strict=True))
        times = median(own / max(other, LEAST_MS) for own, other in pairs)
        if times <= bound or took <= LEAST_MS:
            return None
        return (
            f"it takes {took:.1f} ms {what}, {times:.1f} times the others' {usual:.1f} (medians), more than {bound:g}"
        )
