"""Whether an arriving record's call is waited for, so that its outcome leaves with its own bundle."""

from flink_llm.call import Call
from flink_llm.runner import Runner

MOMENT_S = 0.003
"""How long a piece of a bundle may hold it for calls that are about to end."""
WAIT_AGAIN_AFTER = 1000
"""Arrivals that are not waited for before one is again, to see whether it pays by now."""


class Patience:
    """Waits a moment for calls that have just begun, where such calls have been ending in a moment.

    What ends before its bundle does leaves with it, and not with the timer's, two bundles later. As a
    spinning lock does, this goes by what was seen: once calls take longer it only tries now and then.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._calls: list[Call] = []
        self._paid = 1.0  # moving share of calls that ended while they were waited for
        self._skipped = 0

    def begun(self, call: Call) -> None:
        """A call of the piece in hand."""
        self._calls.append(call)

    def wait(self) -> None:
        """For the calls that have begun since the last time, at the end of their piece."""
        count = len(self._calls)
        if not count:
            return
        if self._paid < 0.5 and self._skipped < WAIT_AGAIN_AFTER:
            self._skipped += count
        else:
            self._skipped = 0
            self._runner.places.wait_until(self._all_ended, MOMENT_S)
            self._paid += (1 - len(self._calls) / count - self._paid) / 16
        self._calls.clear()

    def _all_ended(self) -> bool:
        while self._calls and self._calls[-1].ended:
            self._calls.pop()
        return not self._calls
