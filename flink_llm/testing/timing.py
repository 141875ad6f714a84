"""Event loops of a harness: one whose time passes without waiting, and one that goes with the clock on the wall."""

import asyncio
import math
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

BUSY_S = 10.0
"""Real seconds that a handler may keep its loop, before a harness says that it blocks it."""
LOOK_S = 0.002
"""How often work in other threads is looked after."""


class KeptLoop(asyncio.SelectorEventLoop):
    """A loop that outlives its runner: `close` does nothing, `dispose` closes it.

    Time is real here; `VirtualLoop` says what the methods are for.
    """

    def close(self) -> None:
        """Called by a runner at its end, after which another may go on with this loop."""

    def dispose(self) -> None:
        """Closes the loop, which must not run any more."""
        super().close()

    def settle(self) -> None:
        """Here there is nothing to wait for: time passes anyway."""

    def run_to(self, moment: float, pause: Callable[[], bool]) -> None:
        """Lets time pass until `moment`, or a little after `pause()` is true."""
        while self.time() < moment and not pause():
            time.sleep(min(LOOK_S, max(0.0, moment - self.time())))

    def set_free(self, pause: Callable[[], bool] = lambda: False) -> None:
        """Time is free already."""

    def freeze(self) -> None:
        """Real time cannot be stopped."""

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()


class VirtualLoop(KeptLoop):
    """A loop whose time stands still until `run_to` or `set_free` lets it pass, and then jumps.

    All that is ready at a moment runs before time goes on, to the next timer and no further: the same test
    runs the same way each time. While a job of `asyncio.to_thread` is under way no time passes. What waits
    for a socket or for a thread of its own is not seen, and its time not either: take real time for that.
    The clock on the wall begins now, or at `since` where that is later.
    """

    def __init__(self, since: float = 0.0) -> None:
        self._now = self._moment = 0.0
        self._pause: Callable[[], bool] = lambda: False
        self._elsewhere = self._asked = self._marked = self._rested = 0
        self._changed = threading.Condition()
        self._began = max(round(time.time(), 3), since)
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now

    def wall(self) -> float:
        """As `time`, since the epoch."""
        return self._began + self._now

    def settle(self) -> None:
        """Waits until all that can run at this moment has run. Raises TimeoutError when a handler blocks the loop."""
        self.run_to(self._now, lambda: True)

    def run_to(self, moment: float, pause: Callable[[], bool]) -> None:
        """Lets time pass until `moment`, or until nothing can run and `pause()` is true, or a thread is waited for."""
        with self._changed:
            self._moment, self._pause = moment, pause
            self._asked += 1
            asked = self._asked
        self.call_soon_threadsafe(self._mark, asked)
        with self._changed:
            if not self._changed.wait_for(lambda: self._rested >= asked, BUSY_S):
                raise TimeoutError(f"the handler has kept its loop for {BUSY_S:g} s: it blocks where it should await")
            self._moment = self._now
            waited_for = self._elsewhere and not pause()
        if waited_for and self._now < moment:
            time.sleep(LOOK_S)

    def set_free(self, pause: Callable[[], bool] = lambda: False) -> None:
        """Lets time pass until `freeze`, or until `pause()` is true, while the caller waits for something else."""
        with self._changed:
            self._moment, self._pause = math.inf, pause
        self.call_soon_threadsafe(lambda: None)

    def freeze(self) -> None:
        """Time stands still again."""
        with self._changed:
            self._moment = self._now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """As any loop's; no time passes until it is done."""
        future = super().run_in_executor(executor, func, *args)
        self._elsewhere += 1
        future.add_done_callback(self._back)
        return future

    def _back(self, _: Any) -> None:
        self._elsewhere -= 1

    def _mark(self, asked: int) -> None:
        self._marked = asked

    def _jump(self, timeout: float | None) -> bool:
        """Nothing is ready, and the next timer in `timeout` seconds: whether time has passed instead of a wait."""
        with self._changed:
            if not self._elsewhere and self._now < self._moment and not self._pause():
                moment = math.inf if timeout is None else self._now + timeout
                moment = min(moment, self._moment)
                if moment < math.inf:
                    self._now = moment
                    return True
            self._rested = self._marked
            self._changed.notify_all()
            return False


class _Jumping(selectors.EpollSelector):
    """A selector that asks, before it waits, whether time may pass instead."""

    def __init__(self, jump: Callable[[float | None], bool]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0) or self._jump(timeout):
            return events
        return super().select(None)
