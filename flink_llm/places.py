"""The places of a subtask: how many records may be in flight, and who waits for room.

One thread takes places, another gives them back: each counts by itself, so that neither waits for the other's lock
as long as there is room.
"""

import threading
import time
from collections.abc import Callable

PATIENCE_S, PATIENCE_MOST_S = 0.03, 1.0
"""How long a full operator may hold Flink's mailbox before it lets go for once: while it has hardly
overdrawn, and at the most. Calls that began together end together, with nothing for as long as one takes
in between: a checkpoint must not wait for that."""
OVERDRAFT = 4
"""One in so many places may be overdrawn soon."""


class Places:
    """`capacity` places. `clock` gives seconds and never goes back."""

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._taken = 0  # changed by who takes alone, `_given` by who gives
        self._given = 0
        self._awaited = False
        self._most = max(1, capacity // OVERDRAFT)
        self._overdraft = 0
        self._lent = 0
        self._patience = PATIENCE_S
        self._clock = clock
        self._changed = threading.Condition()

    def take(self, *, wait: bool = True) -> None:
        """Takes a place, waiting for one if asked to.

        The caller holds Flink's mailbox meanwhile: timers, checkpoints and partials pass only when it lets
        go. So all waits since `let_go` together end some time, with or without a place, and what is taken
        then is over capacity for a while.
        """
        if wait and not self._room():
            began = self._clock()
            self.wait_until(self._room, self._patience)
            self._patience = max(0.0, self._patience - (self._clock() - began))
        self._taken += 1

    @property
    def room(self) -> bool:
        """Whether `take` would not have to wait, as far as one can say without asking the other thread."""
        return self._room()

    def give(self, count: int) -> None:
        """Gives places back."""
        self._given += count
        if self._awaited:  # set before the waiter looks: what was given until then it sees by itself
            with self._changed:
                self._changed.notify_all()

    def lend(self, change: int) -> None:
        """Counts calls that can end only when the mailbox is let go: each lends a place until then."""
        with self._changed:
            self._lent += change
            self._changed.notify_all()

    def let_go(self) -> None:
        """The mailbox was free just now: the next bundle may hold it again."""
        with self._changed:
            self._overdraft = 0
            self._patience = PATIENCE_S
            if self._free() <= -self._most:  # from here on a record comes in for each that ends
                self._overdraft = self._most
                self._patience = PATIENCE_MOST_S

    def wait_until(self, there: Callable[[], bool], timeout: float) -> None:
        """Waits until a place was given back and `there()` is true, at most `timeout` seconds."""
        with self._changed:
            self._awaited = True
            self._changed.wait_for(there, timeout)
            self._awaited = False

    def _free(self) -> int:
        return self._capacity - self._taken + self._given

    def _room(self) -> bool:
        return self._free() > -self._lent - self._overdraft
