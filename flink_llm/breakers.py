"""Circuit breakers (Nygard, "Release It!", 2007): calls stop reaching what does nothing but fail.

    breakers = Breakers(BreakerSettings(failures=5, reset_s=1.0))
    engine = GuardedEngine(engine, breakers.named("models.large"))

Counts and states are pybreaker's. What it has not is here: a clock that is handed in, one probe at a time
on an event loop where calls overlap, and outcomes that come too late to mean anything (ADR 19).
"""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Annotated

import pybreaker
from msgspec import Meta, Struct

from flink_llm.engine.generation import CallInfo, current_call
from flink_llm.engine.protocol import Done, Engine, Event, EventStream, Fault, Loaded, Submit
from flink_llm.errors import CircuitOpen, Outage
from flink_llm.retries import INFRASTRUCTURE

log = logging.getLogger(__name__)
PROBE_AGAIN_S = 0.1
"""When whoever comes during a probe may come again."""
LEVELS = {pybreaker.STATE_CLOSED: 0, pybreaker.STATE_HALF_OPEN: 1, pybreaker.STATE_OPEN: 2}


class BreakerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`failures`: after so many outages in a row calls are refused, 0 for never; `reset_s`: seconds until one is
    let through to see whether they have ended."""

    failures: Annotated[int, Meta(ge=0)] = 5
    reset_s: Annotated[float, Meta(gt=0, le=3600)] = 1.0


class Breaker:
    """One circuit. `clock` gives monotonic seconds. Lives on one loop.

    Closed, all calls pass; `failures` outages in a row open it; open, none passes until `reset_s` later, when
    one does, the probe: it closes the circuit or opens it again. Only an outage (`retries.INFRASTRUCTURE`)
    is a failure: whoever says that a record is bad, or that there is no room, is there.
    """

    def __init__(self, name: str, settings: BreakerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._clock = clock
        self._reset_s = settings.reset_s
        # Its own timeout is never asked for: it goes by the system's clock.
        self._circuit = pybreaker.CircuitBreaker(settings.failures, name=name, throw_new_error_on_trip=False)
        self._off = not settings.failures
        self._since: float | None = None  # the first of the failures that opened it
        self._first: float | None = None
        self._due = 0.0
        self._probe: Pass | None = None
        self._prober: CallInfo | None = None  # the handler's call that makes it

    @property
    def level(self) -> int:
        """0 closed, 1 half-open (a probe is on its way), 2 open."""
        return LEVELS[self._circuit.current_state]

    @property
    def outage_since(self) -> float | None:
        """`clock` at the first of the failures that opened it, None while it is closed."""
        return self._since

    def enter(self) -> "Pass":
        """A call may begin, and says later how it ended. Raises CircuitOpen, with when to come again."""
        if self.level and self._probe is not None:
            if self._prober is not None and current_call.get(None) is self._prober:
                return Pass(self)  # its call would end for this one's sake, and the circuit never close
            raise self._refusal(PROBE_AGAIN_S)
        if self.level and self._clock() < self._due:
            raise self._refusal(self._due - self._clock())
        entered = Pass(self)
        if self.level:
            self._circuit.half_open()
            self._probe, self._prober = entered, current_call.get(None)
        return entered

    def check(self) -> None:
        """For a part that probes itself, and says `report` of all its reads. Raises CircuitOpen unless closed."""
        if self.level:
            raise self._refusal(self._reset_s)

    def probing(self) -> None:
        """That part is at it."""
        if self.level:
            self._circuit.half_open()

    def report(self, error: BaseException | None) -> None:
        """What became of one of its reads. An open circuit is closed by whichever is answered."""
        read = Pass(self)
        if self.level and error is None:
            self._circuit.half_open()
        if self.level == LEVELS[pybreaker.STATE_HALF_OPEN]:
            self._probe = read
        self.ended(read, error)

    def _refusal(self, after: float) -> CircuitOpen:
        failed = self._circuit.fail_max
        return CircuitOpen(f"{self.name} has failed {failed} times in a row and is left alone until it answers", after)

    def ended(self, entered: "Pass", error: BaseException | None) -> None:
        """What became of a call; of a circuit that is not closed only the probe's outcome counts."""
        if self._off or (self.level and entered is not self._probe):
            return
        self._probe = None
        if not isinstance(error, INFRASTRUCTURE):
            self._told(None)
            if self._since is not None:
                log.warning("%s is back after %.1f s", self.name, self._clock() - self._since)
            self._since = self._first = None
            return
        if self._circuit.fail_counter == 0 or self._first is None:
            self._first = self._clock()
        self._told(error)
        if self.level:
            self._due = self._clock() + self._reset_s
            if self._since is None:
                self._since = self._first
                log.warning("%s has failed %d times in a row, the last time: %s; it is probed every %g s",
                            self.name, self._circuit.fail_max, error, self._reset_s)  # fmt: skip

    def left(self, entered: "Pass") -> None:
        """A call was given up, which says nothing: if it was the probe, the next call is."""
        if entered is self._probe:
            self._probe = None

    def _told(self, error: BaseException | None) -> None:
        def outcome() -> None:
            if error is not None:
                raise error

        with contextlib.suppress(*INFRASTRUCTURE):
            self._circuit.call(outcome)


class Pass:
    """A call that a breaker let through. What is said of it first counts, and nothing after it."""

    __slots__ = ("_breaker", "_over")

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._over = False

    def ended(self, error: BaseException | None) -> None:
        """It came to its end, None for well."""
        if not self._over:
            self._over = True
            self._breaker.ended(self, error)

    def left(self) -> None:
        """Nobody waits for its end."""
        if not self._over:
            self._over = True
            self._breaker.left(self)


class Breakers(Mapping[str, Breaker]):
    """The breakers of one subtask by name: `models.NAME`, `features.VIEW`."""

    def __init__(self, settings: BreakerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._clock = clock
        self._made: dict[str, Breaker] = {}

    def named(self, name: str) -> Breaker:
        """The one of that name, made at its first use."""
        if name not in self._made:  # a new dict: other threads may be iterating over the one that was
            self._made = {**self._made, name: Breaker(name, self.settings, self._clock)}
        return self._made[name]

    @property
    def outage_since(self) -> float | None:
        """When the first of those opened that are open; None while all are closed."""
        earliest: float | None = None
        for one in self._made.values():  # asked several times a record: no lists
            since = one.outage_since
            if since is not None and (earliest is None or since < earliest):
                earliest = since
        return earliest

    def __getitem__(self, name: str) -> Breaker:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._made))

    def __len__(self) -> int:
        return len(self._made)


class GuardedEngine:
    """An `Engine` behind a breaker. While the engine itself says that it is out its calls wait for it: no failures."""

    def __init__(self, engine: Engine, breaker: Breaker) -> None:
        self._engine = engine
        self._breaker = breaker

    async def load(self, folder: str, sha256: str | None = None) -> Loaded:
        """See `Engine.load`."""
        return await self._engine.load(folder, sha256)

    def submit(self, work: Submit) -> EventStream:
        """See `Engine.submit`. Raises CircuitOpen."""
        entered = self._breaker.enter()
        try:
            return _Watched(self._engine.submit(work), entered, self._is_out)
        except BaseException as error:
            entered.ended(error)
            raise

    async def close(self) -> None:
        """See `Engine.close`."""
        await self._engine.close()

    def _is_out(self) -> bool:
        return getattr(self._engine, "outage_since", None) is not None


class _Watched:
    """The events of a call, whose end the breaker is told of."""

    __slots__ = ("_engine_is_out", "_entered", "_events", "_iterator")

    def __init__(self, events: EventStream, entered: Pass, engine_is_out: Callable[[], bool]) -> None:
        self._events = events
        self._iterator = aiter(events)
        self._entered = entered
        self._engine_is_out = engine_is_out

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await anext(self._iterator)
        except StopAsyncIteration:  # a call that was ended from outside has been left before
            self._ended(Outage("no answer"))
            raise
        except Exception as error:
            self._ended(error)
            raise
        if isinstance(event, Done):
            self._entered.ended(None)
        elif isinstance(event, Fault):
            self._ended(Outage(event.message) if event.kind == "outage" else None)
        return event

    def _ended(self, error: Exception | None) -> None:
        if error is not None and self._engine_is_out():
            self._entered.left()
        else:
            self._entered.ended(error)

    def end(self) -> None:
        """See `EventStream.end`."""
        self._entered.left()
        self._events.end()

    def close(self) -> None:
        """See `EventStream.close`."""
        self._entered.left()
        self._events.close()

    async def aclose(self) -> None:
        """See `EventStream.aclose`."""
        self.close()
