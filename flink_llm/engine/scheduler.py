"""Who runs next: pure decisions over requests and slots, on a clock that is handed in.

A request waits in its lane (priority 0 to 9), is given a free slot, is prefilled in chunks that alternate
with everybody's decode steps, then decodes until it ends. No tensor and no thread here.
"""

import heapq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flink_llm.errors import Overloaded

T = TypeVar("T")
AGEING_S = 2.0
"""Waiting for so long counts as one step of priority, so that no lane starves."""
LANES = 10


@dataclass(eq=False)
class Entry(Generic[T]):
    """One request. `prompt` tokens, of which `filled` are in the cache; `slot` None while it waits."""

    item: T
    prompt: int
    rank: tuple[float, int]
    filled: int = 0
    slot: int | None = None
    gone: bool = False


@dataclass(eq=False)
class Plan(Generic[T]):
    """One step: at most one chunk to prefill, and everybody who decodes."""

    prefill: tuple[Entry[T], int, int] | None = None
    decode: list[Entry[T]] = field(default_factory=list)


class Scheduler(Generic[T]):
    """Slots 0 to `slots` - 1, a queue of at most `limit`, chunks of at most `chunk` tokens.

    Both who is given a slot and who is prefilled is decided by rank: arrival, later by `AGEING_S` for each
    step of priority. It never changes, so whoever comes more than that later is behind.
    """

    def __init__(self, slots: int, limit: int, chunk: int) -> None:
        self._free = list(range(slots))
        self._limit = limit
        self._chunk = chunk
        self._arrivals = 0
        self._queue: list[tuple[tuple[float, int], Entry[T]]] = []
        self._waiting = 0
        self._running: list[Entry[T]] = []

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._waiting

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    def add(self, item: T, prompt: int, *, priority: int, now: float) -> Entry[T]:
        """Queues a request. Raises Overloaded when the queue is full."""
        if self._waiting >= self._limit:
            raise Overloaded(f"{self._limit} requests are waiting", retry_after=0.5)
        self._arrivals += 1
        lane = max(0, min(priority, LANES - 1))
        entry = Entry(item, prompt, (now + lane * AGEING_S, self._arrivals))
        heapq.heappush(self._queue, (entry.rank, entry))
        self._waiting += 1
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Ends a request, wherever it is; its slot is free at once. Twice does no harm."""
        if entry.gone:
            return
        entry.gone = True
        if entry.slot is None:
            self._waiting -= 1
            self._sweep()
        else:
            self._running.remove(entry)
            heapq.heappush(self._free, entry.slot)

    def plan(self) -> Plan[T]:
        """What to do in the next step. The caller runs it, then says `advance` of the chunk it prefilled."""
        self._admit()
        filling = [entry for entry in self._running if entry.filled < entry.prompt]
        plan = Plan(decode=[entry for entry in self._running if entry.filled >= entry.prompt])
        if filling:
            first = min(filling, key=lambda entry: entry.rank)
            plan.prefill = (first, first.filled, min(self._chunk, first.prompt - first.filled))
        return plan

    def advance(self, entry: Entry[T], tokens: int) -> None:
        """`tokens` more of the prompt are in the cache."""
        entry.filled += tokens

    def _admit(self) -> None:
        while self._free and self._queue:
            _, best = heapq.heappop(self._queue)
            if not best.gone:
                self._waiting -= 1
                best.slot = heapq.heappop(self._free)  # low ones: a decode step runs up to the highest
                self._running.append(best)

    def _sweep(self) -> None:
        """Those who have gone leave the queue when they are most of it."""
        if len(self._queue) > 2 * self._waiting + LANES:
            self._queue = [ranked for ranked in self._queue if not ranked[1].gone]
            heapq.heapify(self._queue)
