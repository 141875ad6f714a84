"""Which piece of work is alive, who listens to it, and what finished lately.

An engine is a `Backend` (what computes) behind a `WorkTable` (what finds work again). A second submit of
the same work joins the first, from its beginning; one that has finished is answered from memory; one
whose listeners were lost, rather than closed, goes on for a while so that a restarted worker joins it.
"""

import asyncio
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from flink_llm.engine.protocol import Done, Event, Fault, Loaded, Submit, Tokens
from flink_llm.errors import FlinkLlmError

REMEMBERED = 4096
REMEMBER_S = 120.0
LINGER_S = 30.0


class Backend(Protocol):
    """What computes. All methods are called on one loop, and `emit` must be called on it."""

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        """Makes a model ready. Raises ModelFolderError, ConfigError, Outage."""

    def start(self, work: Submit, generation: str, emit: Callable[[Event], None]) -> Callable[[], None]:
        """Starts a piece of work, which ends with one `Done` or `Fault`; returns what cancels it."""

    async def close(self) -> None: ...


class Events(AsyncIterator[Event]):
    """The events of one call, as an iterator that can be ended from outside."""

    def __init__(self, on_close: Callable[["Events"], None] | None = None) -> None:
        self._queue: deque[Event | Exception | None] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._on_close = on_close
        self._closed = False

    def push(self, event: Event | Exception | None) -> None:
        """The next event; an exception is raised to the reader, None ends the iteration."""
        self._queue.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self) -> None:
        """Ends the iteration now, whatever was still to come."""
        self._queue.clear()
        self.push(None)

    def __aiter__(self) -> "Events":
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._queue.popleft()
        if event is None:
            self._closed = True
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event

    @property
    def closed(self) -> bool:
        """Whether nobody reads any more."""
        return self._closed

    async def aclose(self) -> None:
        """Lets go of the call; work that nobody else listens to is cancelled."""
        self.close()

    def close(self) -> None:
        """As `aclose`."""
        self._closed = True
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(self)


class _Alive:
    """A piece of work and all it has said so far."""

    __slots__ = ("cancel", "done", "ended_at", "generation", "listeners", "said")

    def __init__(self, generation: str) -> None:
        self.generation = generation
        self.said: list[Event] = []
        self.listeners: dict[Events, int] = {}
        self.cancel: Callable[[], None] = lambda: None
        self.done = False
        self.ended_at = 0.0


class WorkTable:
    """An `Engine` over a backend. Lives on one loop."""

    def __init__(self, backend: Backend, *, linger_s: float = LINGER_S) -> None:
        self._backend = backend
        self._linger_s = linger_s
        self._alive: dict[str, _Alive] = {}
        self._finished: OrderedDict[str, _Alive] = OrderedDict()

    @property
    def alive(self) -> int:
        """Pieces of work that have not ended."""
        return len(self._alive)

    async def load(self, folder: str, sha256: str | None = None) -> Loaded:
        """See `Engine.load`."""
        return await self._backend.load(folder, sha256)

    def submit(self, work: Submit) -> Events:
        """See `Engine.submit`."""
        events = Events(lambda closed: self._close(work.work, closed))
        found = self._alive.get(work.work) or self._recall(work.work)
        if found is None:
            found = self._alive[work.work] = _Alive(uuid.uuid4().hex)
            found.listeners[events] = work.call
            self._start(work, found)
            return events
        for event in found.said:
            events.push(_addressed(event, work.call))
        if not found.done:
            found.listeners[events] = work.call
        return events

    def detach(self, events: Events, work: str) -> None:
        """The listener was lost: its work goes on for `linger_s`, in case somebody asks for it again."""
        alive = self._alive.get(work)
        if alive is None or alive.listeners.pop(events, None) is None or alive.listeners:
            return
        loop = asyncio.get_running_loop()
        loop.call_later(self._linger_s, self._give_up, work, alive)

    async def close(self) -> None:
        """Cancels what is alive and closes the backend."""
        for alive in list(self._alive.values()):
            alive.cancel()
        self._alive.clear()
        await self._backend.close()

    def _start(self, work: Submit, alive: _Alive) -> None:
        def emit(event: Event) -> None:
            if alive.done:
                return
            alive.said.append(event)
            if not isinstance(event, Tokens):
                self._end(work.work, alive, keep=isinstance(event, Done))
            for events, call in list(alive.listeners.items()):
                events.push(_addressed(event, call))

        try:
            alive.cancel = self._backend.start(work, alive.generation, emit)
        except FlinkLlmError as error:
            emit(Fault(call=0, kind="outage", code="outage", message=str(error)))

    def _end(self, work: str, alive: _Alive, *, keep: bool) -> None:
        alive.done = True
        alive.ended_at = time.monotonic()
        self._alive.pop(work, None)
        if keep:
            self._finished[work] = alive
        while len(self._finished) > REMEMBERED:
            self._finished.popitem(last=False)

    def _recall(self, work: str) -> _Alive | None:
        oldest = time.monotonic() - REMEMBER_S
        while self._finished and next(iter(self._finished.values())).ended_at < oldest:
            self._finished.popitem(last=False)
        return self._finished.get(work)

    def _close(self, work: str, events: Events) -> None:
        alive = self._alive.get(work)
        if alive is not None and alive.listeners.pop(events, None) is not None and not alive.listeners:
            self._cancel(work, alive)

    def _give_up(self, work: str, alive: _Alive) -> None:
        if not alive.done and not alive.listeners:
            self._cancel(work, alive)

    def _cancel(self, work: str, alive: _Alive) -> None:
        alive.done = True
        self._alive.pop(work, None)
        alive.cancel()


def _addressed(event: Event, call: int) -> Event:
    return event if event.call == call else msgspec.structs.replace(event, call=call)
