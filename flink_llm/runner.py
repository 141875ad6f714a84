"""What runs a handler: one asyncio loop on a thread of its own, places, turns, deadlines, retries.

The main thread (Flink's) submits calls and later takes their events from the shard; everything
between happens on the loop thread. Both meet in two places only: the inbox, which the loop works off
in order, and the count of free places. A place is free when its call's outcome *could* be emitted,
never on emission itself: a subtask full of finished calls of another shard would otherwise wait for
itself.
"""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from flink_llm import codec
from flink_llm.arrivals import EventTimes
from flink_llm.call import Call, Failed, Lane, OperatorSettings, Outcome, Result
from flink_llm.engine.generation import CallInfo, current_call
from flink_llm.errors import DeadlineExceeded, FlinkLlmError, Outage, Overloaded, RecordError
from flink_llm.handler import AsyncUdf, CallContext, Context, Metrics, Services, check_result, signature_of

log = logging.getLogger(__name__)

BACKOFF_S, BACKOFF_LIMIT_S = 0.1, 5.0
TICK_S = 0.01
GRACE_S = 1.0
PATIENCE_S = 1.0
CLOSE_S = 10.0
_EMPTY_STATE = codec.pack({})
_INFRASTRUCTURE = (Outage, ConnectionError, MemoryError)


class Runner:
    """Runs `udf` for one subtask. `start`, then `submit` from one thread, `close` at the end.

    `clock` gives seconds and never goes back; `delay` draws how long to wait before a retry.
    """

    def __init__(
        self,
        udf: AsyncUdf,
        services: Services,
        settings: OperatorSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.name = type(udf).__name__
        self.takes, self._returns = signature_of(udf)
        self.stateful = udf.stateful
        self.metrics = Metrics()
        self.event_times = EventTimes()
        self._udf = udf
        self._services = services
        self._clock = clock
        self._context = Context(services, self.metrics, logging.getLogger(f"flink_llm.handler.{self.name}"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=f"flink-llm {self.name}", daemon=True)
        self._inbox: deque[Call | Callable[[], None]] = deque()
        self._woken = False
        self._places = threading.Condition()
        self._free = settings.capacity
        self._stalled = 0
        self._alive: dict[tuple[int, bytes], Call] = {}
        self._lanes: dict[tuple[int, str], Lane] = {}
        self._timed: set[Call] = set()
        self._out_total = 0.0
        self._last_tick = clock()
        self._closing = False

    # The main thread's side.

    def start(self) -> None:
        """Opens the handler and loads what it asked for. Raises FlinkLlmError naming handler and cause."""
        self._thread.start()
        opened = asyncio.run_coroutine_threadsafe(self._open(), self._loop)
        try:
            opened.result()
        except Exception as error:
            self.close()
            if isinstance(error, FlinkLlmError):
                raise
            raise FlinkLlmError(f"{self.name}.open failed: {type(error).__name__}: {error}") from error

    def submit(self, call: Call, *, wait: bool = True) -> None:
        """Takes a place, waiting for one if asked to, and starts the call.

        The wait ends after `PATIENCE_S` even without a place, and at once while a call waits for its
        partials to be emitted: the caller holds Flink's mailbox, and timers, checkpoints and those
        partials pass only when it lets go. Such a call is over capacity for a while.
        """
        with self._places:
            if wait:
                self._places.wait_for(lambda: self._free > 0 or self._stalled > 0, PATIENCE_S)
            self._free -= 1
        self._post(call)

    def stalled(self, change: int) -> None:
        """Counts the calls that wait for their partials to be emitted."""
        with self._places:
            self._stalled += change
            self._places.notify_all()

    def sent(self, call: Call) -> None:
        """A partial of `call` was emitted."""
        call.unsent -= 1
        flow = call.flow
        if flow is not None and call.unsent == 0:
            self._loop.call_soon_threadsafe(flow.set)

    def committed(self, call: Call, *, last_of_key: bool) -> None:
        """The outcome of `call` is in Flink's hands: what was kept for its repeats can go."""

        def forget() -> None:
            if call.identity is not None and self._alive.get(call.identity) is call:
                del self._alive[call.identity]
            if last_of_key:
                self._lanes.pop((call.shard.number, call.key), None)

        self._post(forget)

    def wait_for_events(self, shard: Any, timeout: float) -> None:
        """Waits until the shard has an event, or `timeout` seconds."""
        with self._places:
            self._places.wait_for(lambda: bool(shard.events), timeout)

    def close(self) -> None:
        """Cancels what runs, closes handler and services, ends the thread."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)

    def _post(self, item: Call | Callable[[], None]) -> None:
        self._inbox.append(item)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._work_off)

    # The loop thread's side.

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _open(self) -> None:
        await self._udf.open(self._context)
        await self._services.start()
        self._ticker = asyncio.create_task(self._tick())

    async def _close(self) -> None:
        self._closing = True
        running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        try:
            await self._udf.close()
        finally:
            await self._services.close()

    def _work_off(self) -> None:
        self._woken = False  # before the inbox is read: whoever appends from here on wakes the loop again
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Call):
                self._start(item)
            else:
                item()

    def _start(self, call: Call) -> None:
        call.clock = self.now
        call.started_at = self.now()
        try:
            limit = call.wanted_deadline(self.settings.deadline, time.time() * 1000)
        except RecordError as error:
            self._queue(call)
            return self._end(call, Failed(error.code, error.message))
        if limit is not None:
            call.expires_at = call.started_at + limit
            self._timed.add(call)
        lane = self._queue(call)
        if call.outcome is not None:
            return self._end(call, call.outcome)
        first = self._alive.get(call.identity) if call.identity is not None else None
        if first is not None:
            return self._repeat(first, call)
        if call.identity is not None:
            self._alive[call.identity] = call
        self._take_turn(call, lane)

    def _queue(self, call: Call) -> Lane | None:
        if not (self.stateful or self.settings.ordered):
            return None
        lane = self._lanes.setdefault((call.shard.number, call.key), Lane(call.committed_state))
        if self.settings.ordered:
            lane.order.append(call)
        return lane

    def _repeat(self, first: Call, call: Call) -> None:
        if first.payload_hash != call.payload_hash:
            self._end(call, conflict(call.request_id))
        elif first.ended and isinstance(first.outcome, Result):
            self._end(call, first.outcome)
        else:
            first.repeats.append(call)

    def _take_turn(self, call: Call, lane: Lane | None) -> None:
        if self.stateful and lane is not None:
            if lane.running is not None:
                lane.waiting.append(call)
                return
            lane.running = call
        call.task = self._loop.create_task(self._run(call, lane))

    async def _run(self, call: Call, lane: Lane | None) -> None:
        while not call.ended:
            began = self.now()
            try:
                self._end(call, await self._attempt(call, lane))
            except Overloaded as error:
                self.metrics.add("overloaded")
                await self._pause(call, "overloaded", str(error), error.retry_after)
            except _INFRASTRUCTURE as error:
                self.metrics.add("outages")
                if call.attempt == 0:
                    log.warning("%s: %s; the record waits and is tried again", self.name, error)
                delay = random.uniform(0.5, 1) * min(BACKOFF_LIMIT_S, BACKOFF_S * 2 ** min(call.attempt, 10))
                if self.settings.on_outage == "wait" and call.expires_at is not None:
                    call.expires_at += self.now() - began + delay
                await self._pause(call, "outage", str(error), delay)

    async def _pause(self, call: Call, code: str, message: str, delay: float) -> None:
        call.attempt += 1
        try:
            await asyncio.sleep(delay)
        except asyncio.CancelledError:
            if self._closing:
                raise
            self._end(call, Failed(code, f"{message} (until the deadline)"[:500]))

    async def _attempt(self, call: Call, lane: Lane | None) -> Outcome:
        state = codec.unpack(lane.state or _EMPTY_STATE) if self.stateful and lane is not None else None
        call.info = CallInfo(
            job=self.settings.job,
            operator=self.settings.operator,
            key=call.key,
            request_id=call.request_id or call.arrival.place,
            session_id=call.key,
            remaining=call.remaining,
            priority=getattr(call.request, "priority", 5),
        )
        current_call.set(call.info)
        try:
            result = await self._udf.call(call.request, CallContext(self._context, call, state=state))
            return self._result(call, result, state, lane)
        except (Overloaded, *_INFRASTRUCTURE):
            raise
        except RecordError as error:
            return Failed(error.code, error.message[:2000], self._generation(call))
        except asyncio.CancelledError:
            if self._closing:
                raise
            late = call.expires_at is not None and self.now() >= call.expires_at
            ended = DeadlineExceeded() if late else RecordError("handler_error", "the call cancelled itself")
            return Failed(ended.code, ended.message, self._generation(call))
        except BaseException as error:  # whatever a handler raises is its record's, SystemExit included
            log.warning("%s failed on %s", self.name, call.arrival.place, exc_info=error)
            text = f"{type(error).__name__}: {error}"[:2000]
            return Failed("handler_error", text, self._generation(call))
        finally:
            for generation in list(call.info.open_generations):
                generation.close()

    def _result(self, call: Call, result: Any, state: dict[str, Any] | None, lane: Lane | None) -> Result:
        check_result(result, self._returns, self.name)
        try:
            value = result if isinstance(result, bytes) else codec.encode(result)
        except (TypeError, msgspec.EncodeError) as error:
            raise RecordError("bad_result", f"the result cannot be encoded: {error}") from error
        if len(value) > self.settings.max_result_bytes:
            raise RecordError(
                "result_too_large",
                f"the result has {len(value)} bytes, its topic takes {self.settings.max_result_bytes}",
            )
        new_state = None
        if state is not None and lane is not None:
            try:
                packed = codec.pack(state)
            except (TypeError, RecursionError, OverflowError) as error:
                raise RecordError("bad_state", str(error)) from error
            new_state = packed if packed != (lane.state or _EMPTY_STATE) else None
        return Result(value, call.reply_to, new_state)

    @staticmethod
    def _generation(call: Call) -> str | None:
        return (call.info.last_generation or None) if call.info is not None else None

    def _end(self, call: Call, outcome: Outcome) -> None:
        """Ends a call once: frees its turn, answers its repeats, hands over what may be emitted."""
        if call.ended:
            return
        call.ended = True
        call.outcome = outcome
        self._timed.discard(call)
        lane = self._lanes.get((call.shard.number, call.key))
        if lane is None:
            self._hand_over([call])
        else:
            self._next_turn(call, lane, outcome)
        repeats, call.repeats = call.repeats, []
        if isinstance(outcome, Result):
            for repeat in repeats:
                self._end(repeat, Result(outcome.value, outcome.topic))
            return
        if call.identity is not None and self._alive.get(call.identity) is call:
            del self._alive[call.identity]  # a failure is not remembered: the next repeat runs in its place
            for repeat in repeats:
                if not repeat.ended:
                    self._again(repeat)

    def _again(self, call: Call) -> None:
        first = self._alive.get(call.identity) if call.identity is not None else None
        if first is not None:
            return self._repeat(first, call)
        if call.identity is not None:
            self._alive[call.identity] = call
        self._take_turn(call, self._lanes.get((call.shard.number, call.key)))

    def _next_turn(self, call: Call, lane: Lane, outcome: Outcome) -> None:
        if isinstance(outcome, Result) and outcome.state is not None:
            lane.state = outcome.state
        if lane.running is call:
            lane.running = None
            while lane.waiting and lane.running is None:
                waiting = lane.waiting.popleft()
                if not waiting.ended:
                    self._take_turn(waiting, lane)
        if not self.settings.ordered:
            return self._hand_over([call])
        ready = []
        while lane.order and lane.order[0].ended:
            ready.append(lane.order.popleft())
        self._hand_over(ready)

    def _hand_over(self, calls: list[Call]) -> None:
        for call in calls:
            call.shard.events.append((call, None))
        with self._places:
            self._free += len(calls)
            self._places.notify_all()

    # Clocks.

    def now(self) -> float:
        """Seconds on the records' clock, which stands still while a part is out (`on_outage: wait`)."""
        total = self._clock() - self._out_total
        since = self._services.outage_since
        if since is not None and self.settings.on_outage == "wait":
            total -= max(0.0, self._clock() - max(since, self._last_tick))
        return total

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            since = self._services.outage_since
            if since is not None and self.settings.on_outage == "wait":
                self._out_total += max(0.0, now - max(since, self._last_tick))
            self._last_tick = now
            if self._timed:
                self._expire(self.now())

    def _expire(self, now: float) -> None:
        for call in [call for call in self._timed if call.expires_at is not None and call.expires_at <= now]:
            generations = call.info.open_generations if call.info is not None else ()
            if call.task is None:
                self._end(call, Failed("deadline", "the deadline passed while the record waited for its turn"))
            elif now >= (call.expires_at or 0) + GRACE_S:
                self.metrics.add("abandoned")
                log.warning("%s did not end %s s after its deadline; its call is abandoned", self.name, GRACE_S)
                call.task.cancel()
                self._end(call, Failed("deadline", "the deadline has passed", self._generation(call)))
            elif generations and self._udf.on_deadline == "partial":
                for generation in list(generations):
                    generation.expire()
            elif call.task.cancelling() == 0:
                call.task.cancel()


def conflict(request_id: str | None) -> Failed:
    """The outcome of a request id that was used before with another payload."""
    return Failed("conflicting_request", f"request id {request_id!r} was used before with another payload")
