"""What runs a handler: one asyncio loop on a thread of its own, places, turns, deadlines, retries.

The main thread (Flink's) submits calls and later takes their events from the shard; everything
between happens on the loop thread. Both meet in two places only: the inbox, which the loop works off
in order, and the places. A place is free when its call's outcome *could* be emitted,
never on emission itself: a subtask full of finished calls of another shard would otherwise wait for
itself. What the loop thread cannot go on from is raised on the main thread, where Flink hears of it.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from typing import Any

from flink_llm import codec
from flink_llm.arrivals import EventTimes
from flink_llm.call import EMPTY_STATE, Call, Failed, Lane, OperatorSettings, Outcome, Result
from flink_llm.clock import REAL, RecordClock, Times
from flink_llm.deadlines import Deadlines
from flink_llm.engine.generation import CallInfo, current_call
from flink_llm.errors import CircuitOpen, FlinkLlmError, Overloaded, RecordError, Retriable, StateError, told
from flink_llm.handler import AsyncUdf, CallContext, Context, Metrics, Services, check_result, signature_of
from flink_llm.inbox import Inbox
from flink_llm.leaks import Leaks
from flink_llm.places import Places
from flink_llm.retries import INFRASTRUCTURE, foremost, wait_before
from flink_llm.shedding import Shedding
from flink_llm.turns import Repeats, Turns
from flink_llm.watching import current_watch

log = logging.getLogger(__name__)

READ_AHEAD = 8
"""One in so many places more than run: while Flink's thread is at something else, an end begins the next."""
TICK_S = 0.01
CLOSE_S = 10.0


class Runner:
    """Runs `udf` for one subtask. `start`, then `submit` from one thread, `close` at the end.

    `times` are real ones, unless a test has its own.
    """

    def __init__(
        self,
        udf: AsyncUdf,
        services: Services,
        settings: OperatorSettings,
        *,
        times: Times = REAL,
    ) -> None:
        self.settings = settings
        self.wall = times.wall
        self.name = type(udf).__name__
        self.takes, self._returns = signature_of(udf)
        self.stateful = udf.stateful
        self.breakers = services.breakers
        self.metrics = Metrics()
        self.event_times = EventTimes()
        self.places = Places(settings.capacity + settings.capacity // READ_AHEAD, times.clock)
        self.clock = RecordClock(lambda: services.outage_since, stops=settings.on_outage == "wait", clock=times.clock)
        self._udf = udf
        self._services = services
        self._context = Context(services, self.metrics, logging.getLogger(f"flink_llm.handler.{self.name}"))
        self._loop = times.loop()
        self._thread = threading.Thread(target=self._serve, name=f"flink-llm {self.name}", daemon=True)
        self._leaks = Leaks(self.name, self.metrics)
        self.inbox = Inbox(self._loop, self._start, self._forget)
        self._given = 0  # places of calls that have ended in this turn of the loop
        self._fatal: FlinkLlmError | None = None
        self._answered_at = -1.0
        self._turns = Turns(self._ready_to_run, one_by_one=self.stateful, ordered=settings.ordered)
        self._repeats = Repeats(self._turns.take, self._end)
        self._deadlines = Deadlines(
            self.clock,
            self._end,
            out=lambda: services.outage_since is not None,
            on_deadline=udf.on_deadline,
            name=self.name,
            metrics=self.metrics,
        )
        self._shedding = Shedding() if settings.shed else None
        self._running = 0
        self._ready: deque[tuple[Call, Lane | None]] = deque()
        self._closing = False

    # The main thread's side.

    def start(self) -> None:
        """Opens the handler and loads what it asked for. Raises FlinkLlmError naming handler and cause."""
        self._thread.start()
        opened = asyncio.run_coroutine_threadsafe(self._open(), self._loop)
        try:
            opened.result()
        except BaseException:
            self.close()
            raise

    def submit(self, call: Call, *, wait: bool = True) -> None:
        """Takes a place, waiting for one if asked to, and starts the call. Raises what the loop cannot go on from."""
        if self._fatal is not None:
            raise self._fatal
        if self._shedding is not None:
            call.rank = self._shedding.join(self.clock.now(), call.priority)
        if wait and not self.places.room:
            self.inbox.wake()  # whoever ends next may be waiting there
        self.places.take(wait=wait)
        self.inbox.start(call)

    def refusal(self, call: Call) -> Failed | None:
        """Why a record that has just come is refused, None for one that is to be submitted."""
        if self._shedding is None or (self.settings.on_outage == "wait" and self._services.outage_since is not None):
            return None
        try:
            left = call.time_left(self.settings.deadline, self.wall() * 1000, since_ms=call.timestamp)
        except RecordError:
            return None
        if left is None:
            return None
        return self._shedding.refusal(call, left, self.clock.now())

    def check(self) -> None:
        """Raises what the loop thread could not go on from."""
        if self._fatal is not None:
            raise self._fatal
        if not self._thread.is_alive():
            raise FlinkLlmError(f"the loop of {self.name} has ended")

    def committed(self, call: Call, *, last_of_key: bool) -> None:
        """The outcome of `call` is in Flink's hands: what was kept for its repeats can go."""
        self.inbox.forget(call, last_of_key=last_of_key)

    def close(self) -> None:
        """Cancels what runs, closes handler and services, ends the thread."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)

    # The loop thread's side.

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._leaks.watch(self._loop)
        while True:
            try:
                self._loop.run_forever()
                break
            except BaseException as error:  # SystemExit of a task that a handler left behind comes out here
                log.error("a task of %s ended with %s; the others go on", self.name, type(error).__name__)
        self._loop.close()

    async def _open(self) -> None:
        try:
            await self._udf.open(self._context)
        except FlinkLlmError:
            raise
        except BaseException as error:
            raise FlinkLlmError(f"{self.name}.open failed: {told(error)}") from error
        await self._services.start()
        self._ticker = asyncio.create_task(self._tick())

    async def _close(self) -> None:
        self._closing = True
        with contextlib.suppress(Exception):
            await self._services.close()  # first: what is in flight is lost, not cancelled, and found again later
        running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._udf.close()

    def _forget(self, call: Call, last_of_key: bool) -> None:
        call.info = call.task = None  # which know the call: nobody but a full collection would free the three
        self._repeats.forget(call)
        if last_of_key:
            self._turns.forget(call)

    def _start(self, call: Call) -> None:
        call.clock = self.clock.now
        # The clock stands still across a restore too; how much had been used up is written nowhere.
        excused = call.restored and self.settings.on_outage == "wait"
        try:
            since_ms = None if excused else call.arrived_ms
            limit = call.time_left(self.settings.deadline, self.wall() * 1000, since_ms=since_ms)
        except RecordError as error:
            self._turns.enter(call)
            return self._end(call, Failed(error.code, error.message))
        if limit is not None:
            self._deadlines.watch(call, limit)
        self._turns.enter(call)
        if call.outcome is not None:
            return self._end(call, call.outcome)
        self._repeats.admit(call)

    def _ready_to_run(self, call: Call, lane: Lane | None) -> None:
        self._ready.append((call, lane))
        self._begin()

    def _begin(self) -> None:
        """Runs who is ready, as far as there is room."""
        while self._ready and self._running < self.settings.capacity:
            call, lane = self._ready.popleft()
            if not call.ended:
                self._running += 1
                call.watch.began()
                call.task = asyncio.Task(self._run(call, lane), loop=self._loop)  # none that `Leaks` asks about

    async def _run(self, call: Call, lane: Lane | None) -> None:
        try:
            while not call.ended and not self._closing:
                await self._try(call, lane)
        except StateError as error:  # no record's fault: the job has to be told
            self._fatal = self._fatal or error
        except Exception as error:  # nobody else would end the call
            log.exception("a call of %s could not be looked after", self.name)
            self._end(call, Failed("handler_error", told(error), call.generation_id))

    async def _try(self, call: Call, lane: Lane | None) -> None:
        began = self.clock.now()
        before, call.tried_at = call.tried_at, began
        try:
            self._end(call, await self._attempt(call, lane))
        except Overloaded as error:
            self.metrics.add("overloaded")
            await self._try_again(call, Failed("overloaded", f"{error} (until the deadline)"[:500]), error)
        except Retriable as error:
            await self._retry(call, error)
        except INFRASTRUCTURE as error:
            self.metrics.add("outages")
            if call.attempt == 0 and not isinstance(error, CircuitOpen):  # which says itself that it is
                log.warning("%s: %s; the record waits and is tried again", self.name, error)
            await self._wait_out(call, error, began, began if before is None else before)

    async def _retry(self, call: Call, error: Retriable) -> None:
        failed = Failed(str(error.code), str(error.message), call.generation_id)
        if call.retried >= self.settings.retries:
            return self._end(call, failed)
        call.retried += 1
        await self._try_again(call, failed, error)

    async def _wait_out(self, call: Call, error: Exception, began: float, before: float) -> None:
        """An outage since `began`: waits before another try, off the record's clock where that may stand still.

        Where a part says that it is out, the clock has stood still so far, and the wait may outlast the outage.
        Where none does, the handler knows of a part that we do not, or the record brings its part down by
        itself: while others are answered, it is the latter, and the record's own time. That is looked for since
        `before`, the try before this: one that fails at once leaves no time for others to be answered in.
        """
        told = self._services.outage_since is not None
        excused = self.settings.on_outage == "wait" and call.expires_at is not None
        excused = excused and (told or self._answered_at < before)
        left = call.remaining()
        failed = Failed("outage", f"{error} (until the deadline)"[:500])
        if not excused or left is None:
            return await self._try_again(call, failed, error)
        self._deadlines.forget(call)
        left += 0.0 if told else self.clock.now() - began
        await self._try_again(call, failed, error, excused=True)
        if not call.ended:
            self._deadlines.watch(call, left)

    async def _try_again(self, call: Call, failed: Failed, error: Exception, *, excused: bool = False) -> None:
        """Waits before another try; the call has failed where its deadline leaves time for none."""
        call.attempt += 1
        delay = wait_before(error, call.attempt, None if excused else call.remaining())
        if delay is None:
            return self._end(call, failed)
        self.metrics.add("retries")
        try:
            await asyncio.sleep(delay)
        except asyncio.CancelledError:
            if self._closing:
                raise
            self._end(call, failed)

    async def _attempt(self, call: Call, lane: Lane | None) -> Outcome:
        state = codec.unpack(lane.state or EMPTY_STATE) if self.stateful and lane is not None else None
        call.info = info = CallInfo(
            job=self.settings.job,
            operator=self.settings.operator,
            key=call.key,
            request_id=call.request_id or call.arrival.place,
            session_id=call.key,
            remaining=call.remaining,
            priority=call.priority,
        )
        current_call.set(info)
        current_watch.set(call.watch)
        try:
            context = CallContext(self._context, call, state=state)
            try:
                result = await self._udf.call(call.request, context)
            except BaseExceptionGroup as group:
                raise foremost(group) from None
            return self._result(call, result, state, lane)
        except (Overloaded, Retriable, *INFRASTRUCTURE):
            raise
        except RecordError as error:
            return Failed(str(error.code), str(error.message), call.generation_id)
        except asyncio.CancelledError:
            if self._closing:
                raise
            itself = Failed("handler_error", "the call cancelled itself")
            ended = self._deadlines.late() if self._deadlines.passed(call) else itself
            return Failed(ended.code, ended.message, call.generation_id)
        except BaseException as error:  # whatever a handler raises is its record's, SystemExit included
            if self._closing:
                raise
            log.warning("%s failed on %s", self.name, call.arrival.place, exc_info=error)
            return Failed("handler_error", told(error), call.generation_id)
        finally:
            for generation in list(info.open_generations):
                generation.close()
            if info.tasks:
                self._leaks.look(info)

    def _result(self, call: Call, result: Any, state: dict[str, Any] | None, lane: Lane | None) -> Result:
        check_result(result, self._returns, self.name)
        value = call.encoded(result, "the result")
        new_state = None
        if state is not None and lane is not None:
            try:
                packed = codec.pack(state)
            except TypeError as error:
                raise RecordError("bad_state", str(error)) from error
            new_state = packed if packed != (lane.state or EMPTY_STATE) else None
        return Result(value, call.reply_to, new_state)

    def _end(self, call: Call, outcome: Outcome) -> None:
        """Ends a call once: frees its turn, answers its repeats, hands over what may be emitted."""
        if call.ended:
            return
        call.ended = True
        call.outcome = outcome
        call.watch.ended()
        if self._shedding is not None:
            self._shedding.ended(call, outcome, self.clock.now())
        if call.task is not None:
            self._running -= 1
            self._begin()
        if isinstance(outcome, Result):
            self._answered_at = self.clock.now()
        self._deadlines.forget(call)
        if isinstance(outcome, Failed):  # before the turn is another's: a repeat runs in this call's place
            self._repeats.answer(call, outcome)
        self._hand_over(self._turns.leave(call, outcome))
        if isinstance(outcome, Result):
            self._repeats.answer(call, outcome)

    def _hand_over(self, calls: list[Call]) -> None:
        if not calls:
            return
        for call in calls:
            call.shard.events.append((call, None))
        if not self._given:
            self._loop.call_soon(self._give)  # once for all that end in this turn: Flink's thread wakes up for each
        self._given += len(calls)

    def _give(self) -> None:
        given, self._given = self._given, 0
        self.places.give(given)

    # Clocks.

    async def _tick(self) -> None:
        self.clock.tick()  # opening may take its time
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.inbox.work_off()
                self._deadlines.tick()
            except Exception:  # every deadline hangs on this task
                log.exception("the deadlines of %s could not be looked after", self.name)
