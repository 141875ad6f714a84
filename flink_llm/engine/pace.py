"""How long whoever waits will wait, as far as the past tells, and who is refused for it. Pure: no clock in here."""

from flink_llm.errors import Overloaded

SMOOTH = 0.2
"""How much the latest measurement counts."""
RETRY_S = (0.1, 30.0)
"""The bounds of a retry-after: below, refused requests only come to be refused again; above, the past says little."""
RETRY_UNKNOWN_S = 0.5
"""The retry-after while nothing has been served yet."""


class Pace:
    """The pace of `places` that serve side by side, each for a smoothed time which `took` is told."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._service_s: float | None = None

    def took(self, seconds: float) -> None:
        """A place was held for so long. However that ended: it is free again."""
        self._service_s = smoothed(self._service_s, seconds)

    def wait(self, turns: int) -> float | None:
        """Seconds until places have become free `turns` times, None while nothing is known."""
        if turns <= 0:
            return 0.0
        return None if self._service_s is None else turns * self._service_s / self._places

    def admit(self, turns: int, left: float | None, *, full: bool = False) -> None:
        """Lets a request in for which places have to become free `turns` times first, 0 if it need not wait.

        Raises Overloaded if the wait alone is known to be longer than the `left` seconds that it has (None:
        for ever), with the wait as the retry-after; or because the queue is `full`, with the time in which
        one place of it becomes free.
        """
        wait = self.wait(turns)
        if turns > 0 and left is not None and wait is not None and wait > left:
            text = f"the wait is about {wait:.1f} s, the deadline is in {max(0.0, left):.1f}"
            raise Overloaded(text, _bounded(wait), "deadline")
        if full:
            raise Overloaded("the queue is full", _bounded(self.wait(1)), "full")


def smoothed(before: float | None, now: float) -> float:
    """The moving mean of what was measured; `before` None where nothing was yet."""
    return now if before is None else before + SMOOTH * (now - before)


def _bounded(wait: float | None) -> float:
    return RETRY_UNKNOWN_S if wait is None else min(max(wait, RETRY_S[0]), RETRY_S[1])
