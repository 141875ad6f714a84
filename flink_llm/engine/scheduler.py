"""Who runs next: pure decisions over requests and slots, on a clock that is handed in.

A request waits in its lane (priority 0 to 9), is given the lowest free slot, is prefilled in chunks that
alternate with everybody's decode steps, then decodes until it ends. No tensor and no thread here.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flink_llm.errors import Overloaded

T = TypeVar("T")
AGEING_S = 2.0
"""Waiting for so long counts as one step of priority, so that no lane starves."""


@dataclass
class Entry(Generic[T]):
    """One request. `prompt` tokens, of which `filled` are in the cache; `slot` None while it waits."""

    item: T
    prompt: int
    priority: int
    arrived: float
    expires: float | None = None
    filled: int = 0
    slot: int | None = None
    gone: bool = False


@dataclass
class Plan(Generic[T]):
    """One step: at most one chunk to prefill, and everybody who decodes. `expired` have to be ended."""

    prefill: tuple[Entry[T], int, int] | None = None
    decode: list[Entry[T]] = field(default_factory=list)
    expired: list[Entry[T]] = field(default_factory=list)


class Scheduler(Generic[T]):
    """Slots 0 to `slots` - 1, a queue of at most `limit`, chunks of at most `chunk` tokens."""

    def __init__(self, slots: int, limit: int, chunk: int) -> None:
        self._free = list(range(slots - 1, -1, -1))
        self._limit = limit
        self._chunk = chunk
        self._waiting: list[Entry[T]] = []
        self._running: list[Entry[T]] = []

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    def add(self, item: T, prompt: int, *, priority: int, now: float, deadline: float | None = None) -> Entry[T]:
        """Queues a request whose `deadline` is in seconds from now. Raises Overloaded when the queue is full."""
        if len(self._waiting) >= self._limit:
            raise Overloaded(f"{self._limit} requests are waiting", retry_after=0.5)
        expires = None if deadline is None else now + deadline
        entry = Entry(item, prompt, priority, now, expires)
        self._waiting.append(entry)
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Ends a request, wherever it is; its slot is free at once. Twice does no harm."""
        if entry.gone:
            return
        entry.gone = True
        if entry.slot is None:
            self._waiting.remove(entry)
            return
        self._running.remove(entry)
        self._free.append(entry.slot)
        self._free.sort(reverse=True)

    def plan(self, now: float) -> Plan[T]:
        """The next step. The caller runs it, then says `advance` of the chunk it prefilled."""
        everybody = [*self._waiting, *self._running]
        expired = [entry for entry in everybody if entry.expires is not None and entry.expires <= now]
        for entry in expired:
            self.remove(entry)
        self._admit(now)
        filling = [entry for entry in self._running if entry.filled < entry.prompt]
        plan = Plan(expired=expired, decode=[entry for entry in self._running if entry.filled >= entry.prompt])
        if filling:
            first = min(filling, key=lambda entry: (entry.priority, entry.arrived))
            plan.prefill = (first, first.filled, min(self._chunk, first.prompt - first.filled))
        return plan

    def advance(self, entry: Entry[T], tokens: int) -> None:
        """`tokens` more of the prompt are in the cache."""
        entry.filled += tokens

    def _admit(self, now: float) -> None:
        while self._free and self._waiting:
            best = min(
                self._waiting, key=lambda entry: (entry.priority - (now - entry.arrived) / AGEING_S, entry.arrived)
            )
            self._waiting.remove(best)
            best.slot = self._free.pop()
            self._running.append(best)
