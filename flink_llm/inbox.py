"""What Flink's thread leaves for the loop thread: calls to start, and calls that can be forgotten, in order."""

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum

from flink_llm.call import Call


class _Asked(Enum):
    START = 1
    FORGET = 2
    FORGET_KEY = 3


class Inbox:
    """One thread posts; the loop's calls `start(call)`, and `forget(call, last_of_key)`.

    Waking the loop costs more than most of what it is woken for. While `held` nobody is, until `wake`; for what
    is forgotten never: it waits for the next start, or for whoever calls `work_off` now and then.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, start: Callable[[Call], None], forget: Callable[[Call, bool], None]
    ) -> None:
        self._loop = loop
        self._start = start
        self._forget = forget
        self._items: deque[tuple[Call, _Asked]] = deque()
        self._woken = False
        self.held = False

    def start(self, call: Call) -> None:
        """It is started now, or with the next `wake`."""
        self._items.append((call, _Asked.START))
        if not self.held:
            self.wake()

    def forget(self, call: Call, *, last_of_key: bool) -> None:
        """It is forgotten before whatever is started later."""
        self._items.append((call, _Asked.FORGET_KEY if last_of_key else _Asked.FORGET))

    def wake(self) -> None:
        """Has the loop thread work off what there is."""
        if self._items and not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self.work_off)

    def work_off(self) -> None:
        """On the loop thread."""
        self._woken = False  # before it is read: whoever appends from here on wakes the loop again
        while self._items:
            call, asked = self._items.popleft()
            if asked is _Asked.START:
                self._start(call)
            else:
                self._forget(call, asked is _Asked.FORGET_KEY)
