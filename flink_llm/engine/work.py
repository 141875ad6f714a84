"""Which piece of work is alive, who listens to it, and what finished lately.

An engine is a `Backend` (what computes) behind a `WorkTable` (what finds work again). A second submit of
the same work joins the first, from its beginning; one that has finished is answered from memory; one
whose listeners were lost, rather than gone, goes on for a while so that a restarted worker joins it.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec
from msgspec import Struct

from flink_llm.engine.faults import closed, fault_of
from flink_llm.engine.ids import new_id
from flink_llm.engine.protocol import Done, Event, Loaded, Submit, Tokens
from flink_llm.errors import Outage

log = logging.getLogger(__name__)
REMEMBERED = 4096
REMEMBERED_BYTES = 64 * 1024 * 1024
REMEMBER_S = 120.0
_events = msgspec.msgpack.Encoder()
_said = msgspec.msgpack.Decoder(list[Event])
LINGER_S = 30.0


class Backend(Protocol):
    """What computes. All methods are called on one loop, and `emit` must be called on it."""

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        """Makes a model ready. Raises ModelFolderError, ConfigError, Outage."""

    def start(self, work: Submit, generation: str, emit: Callable[[Event], None]) -> Callable[[], None]:
        """Starts a piece of work, which ends with one `Done` or `Fault`; returns what cancels it.

        Whatever it raises instead is the end of that work.
        """

    async def close(self) -> None: ...


class Events(AsyncIterator[Event]):
    """The events of one call, as an iterator for one reader that can be ended from outside."""

    __slots__ = ("_closed", "_on_close", "_queue", "_waiter")

    def __init__(self, on_close: Callable[[], None] | None = None) -> None:
        self._queue: deque[Event | Exception | None] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._on_close = on_close
        self._closed = False

    def when_closed(self, on_close: Callable[[], None]) -> None:
        """Sets what `close` calls, once."""
        self._on_close = on_close

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
        if not isinstance(event, Tokens):
            self.close()
            if isinstance(event, Exception):
                raise event
        return event

    async def aclose(self) -> None:
        """Lets go of the call; work that nobody else listens to is cancelled."""
        self.close()

    def close(self) -> None:
        """As `aclose`."""
        self._closed = True
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


class _Alive:
    """A piece of work and all it has said so far."""

    __slots__ = ("cancel", "done", "generation", "kind", "listeners", "lost_at", "said", "work")

    def __init__(self, work: Submit) -> None:
        self.work = work.work
        self.kind = work.kind
        self.generation = new_id()
        self.said: list[Event] = []
        self.listeners: list[Listener] = []
        self.cancel: Callable[[], None] = nothing
        self.done = False
        self.lost_at = 0.0

    def add(self, work: Submit, hear: Callable[[Event], None]) -> "Listener":
        """One more that hears what it says from now on."""
        listener = Listener(self, work.call, hear)
        self.listeners.append(listener)
        return listener


class _Finished(Struct, frozen=True, gc=False):
    """A generation that has ended, and all it has said, as bytes: thousands are kept, and as objects a garbage
    collection would stop the host for each of their tokens."""

    ended_at: float
    said: bytes


class Listener:
    """One call that hears the events of a piece of work."""

    __slots__ = ("_alive", "call", "hear")

    def __init__(self, alive: _Alive, call: int, hear: Callable[[Event], None]) -> None:
        self._alive = alive
        self.call = call
        self.hear = hear

    @property
    def ended(self) -> bool:
        """Whether the work has ended: there is nothing more to hear."""
        return self._alive.done


class WorkTable:
    """An `Engine` over a backend. Lives on one loop.

    `linger_s`: how long work goes on whose listeners were lost; while somebody listens, only the engine
    ends it. Of generations that have finished, at most `REMEMBERED` and `REMEMBERED_BYTES` are kept,
    for `REMEMBER_S` seconds; other work is soon done again.
    """

    def __init__(self, backend: Backend, *, linger_s: float = LINGER_S) -> None:
        self._backend = backend
        self._linger_s = linger_s
        self._alive: dict[str, _Alive] = {}
        self._finished: OrderedDict[str, _Finished] = OrderedDict()
        self._finished_bytes = 0
        self._pruning: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def alive(self) -> int:
        """Pieces of work that have not ended."""
        return len(self._alive)

    async def load(self, folder: str, sha256: str | None = None) -> Loaded:
        """See `Engine.load`."""
        if self._closed:
            raise Outage("the engine is closed")
        return await self._backend.load(folder, sha256)

    def submit(self, work: Submit) -> Events:
        """See `Engine.submit`."""
        events = Events()
        listener = self.join(work, events.push)
        events.when_closed(lambda: self.leave(listener))
        return events

    def join(self, work: Submit, hear: Callable[[Event], None]) -> Listener:
        """Calls `hear` with every event of the work, those it has said already before this returns.

        Starts the work unless it is alive or remembered; events carry the number `work.call`. After `close`
        all there is to hear is an outage.
        """
        if self._closed:
            hear(closed(work.call))
            return _ended(work, hear)
        finished = self._recall(work.work)
        if finished is not None:
            for event in _said.decode(finished.said):
                hear(_addressed(event, work.call))
            return _ended(work, hear)
        alive = self._alive.get(work.work)
        if alive is not None:
            for event in alive.said:
                hear(_addressed(event, work.call))
            return alive.add(work, hear)
        alive = self._alive[work.work] = _Alive(work)
        listener = alive.add(work, hear)
        self._start(work, alive)
        return listener

    def leave(self, listener: Listener) -> None:
        """The listener wants no more; the work is cancelled when nobody else listens."""
        alive = listener._alive
        if _remove(alive, listener) and not alive.listeners:
            self._cancel(alive)

    def lose(self, listener: Listener) -> None:
        """The listener was lost: its work goes on for `linger_s`, in case somebody asks for it again."""
        alive = listener._alive
        if _remove(alive, listener) and not alive.listeners:
            loop = asyncio.get_running_loop()
            alive.lost_at = loop.time()
            loop.call_later(self._linger_s, self._give_up, alive, alive.lost_at)

    async def close(self) -> None:
        """Cancels what is alive, as an outage to whoever listens, and closes the backend."""
        self._closed = True
        if self._pruning is not None:
            self._pruning.cancel()
        for alive in list(self._alive.values()):
            listeners = alive.listeners
            self._cancel(alive)
            for listener in listeners:
                listener.hear(closed(listener.call))
        await self._backend.close()

    def _start(self, work: Submit, alive: _Alive) -> None:
        def emit(event: Event) -> None:
            if alive.done:
                return
            alive.said.append(event)
            listeners = alive.listeners
            if not isinstance(event, Tokens):
                self._end(alive)
            for listener in tuple(listeners):
                listener.hear(_addressed(event, listener.call))
            if alive.kind == "generate" and isinstance(event, Done):
                self._remember(alive, event)

        try:
            cancel = self._backend.start(work, alive.generation, emit)
        except Exception as error:  # one piece of work must not cost its neighbours their connection
            if not isinstance(error, Outage):
                about = {"request_id": work.request_id}
                log.exception("work for the model %s could not be started", work.model, extra=about)
            emit(fault_of(error))
        else:
            if not alive.done:  # what cancels it knows it: the two would be garbage that only a collection frees
                alive.cancel = cancel

    def _end(self, alive: _Alive) -> None:
        alive.done = True
        alive.listeners = []
        alive.cancel = nothing
        self._alive.pop(alive.work, None)

    def _remember(self, alive: _Alive, last: Done) -> None:
        # A fault is worth another try, and so is what was cut short: the next try may have more time.
        if last.finish not in ("stop", "length"):
            return
        finished = _Finished(asyncio.get_running_loop().time(), _events.encode(alive.said))
        self._finished[alive.work] = finished
        self._finished_bytes += len(finished.said)
        self._prune()

    def _recall(self, work: str) -> _Finished | None:
        self._prune()
        return self._finished.get(work)

    def _prune(self) -> None:
        """Forgets what is too old or too much, now and as long as there is something to forget."""
        oldest = asyncio.get_running_loop().time() - REMEMBER_S
        while self._finished and (
            len(self._finished) > REMEMBERED
            or self._finished_bytes > REMEMBERED_BYTES
            or next(iter(self._finished.values())).ended_at < oldest
        ):
            _, forgotten = self._finished.popitem(last=False)
            self._finished_bytes -= len(forgotten.said)
        if self._finished and self._pruning is None:
            self._pruning = asyncio.get_running_loop().call_later(REMEMBER_S, self._prune_again)

    def _prune_again(self) -> None:
        self._pruning = None
        self._prune()

    def _give_up(self, alive: _Alive, lost_at: float) -> None:
        if not alive.done and not alive.listeners and alive.lost_at == lost_at:
            self._cancel(alive)

    def _cancel(self, alive: _Alive) -> None:
        cancel = alive.cancel
        self._end(alive)
        cancel()


def nothing() -> None:
    """Cancels what has ended or not begun."""


def _ended(work: Submit, hear: Callable[[Event], None]) -> Listener:
    alive = _Alive(work)
    alive.done = True
    return Listener(alive, work.call, hear)


def _remove(alive: _Alive, listener: Listener) -> bool:
    if listener not in alive.listeners:
        return False
    alive.listeners.remove(listener)
    return True


def _addressed(event: Event, call: int) -> Event:
    return event if event.call == call else msgspec.structs.replace(event, call=call)
