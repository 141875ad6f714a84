"""What time it is for a runner, and the clock of its records, which stands still while a part is out."""

import asyncio
import time
from collections.abc import Callable

from msgspec import Struct


class Times(Struct, frozen=True):
    """`clock` gives seconds and never goes back, `wall` those since the epoch, `loop` a loop that goes by `clock`."""

    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop


REAL = Times()


class RecordClock:
    """Seconds since some moment. `outage_since` says since when a part has been out, on `clock`, or None.

    With `stops` false it runs on through outages. `tick` is called often: an outage that came and went
    between two ticks is not seen.
    """

    def __init__(
        self, outage_since: Callable[[], float | None], *, stops: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._outage_since = outage_since
        self._stops = stops
        self._clock = clock
        self._stood_still = 0.0
        self._last_tick = clock()

    def now(self) -> float:
        """Seconds, those of outages left out."""
        at = self._clock()
        if self._outage_since() is None:  # asked several times a record
            return at - self._stood_still
        return at - self._stood_still - self._still_since_tick(at)

    def tick(self) -> float:
        """Books what the clock has stood still since the last tick; how many seconds ago that was."""
        at = self._clock()
        self._stood_still += self._still_since_tick(at)
        passed, self._last_tick = at - self._last_tick, at
        return passed

    def _still_since_tick(self, at: float) -> float:
        since = self._outage_since()
        if since is None or not self._stops:
            return 0.0
        return max(0.0, at - max(since, self._last_tick))
