"""One shard of an operator without Flink: the library's own runner and state, on a clock of the test's."""

import asyncio
import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from msgspec import Struct

from flink_llm import codec
from flink_llm.arrivals import Arrival, Keyer, KeySpec
from flink_llm.call import OperatorSettings
from flink_llm.clock import Times
from flink_llm.handler import AsyncUdf, signature_of
from flink_llm.kept import Kept
from flink_llm.runner import READ_AHEAD, Runner
from flink_llm.shard import Output, Shard
from flink_llm.testing.reader import Reader
from flink_llm.testing.services import FakeServices
from flink_llm.testing.timing import KeptLoop, VirtualLoop

PATIENCE_S, REAL_PATIENCE_S = 3600.0, 10.0
"""How long `finish` lets virtual and real time pass."""
TOPIC = "test"


class MemoryMap:
    """A map of Flink state, in memory; `checkpoint` copies it.

    `taken_at` is when a checkpoint took it, in epoch seconds of its harness, 0 for one of no checkpoint.
    """

    def __init__(self) -> None:
        self.data: dict[Any, bytes] = {}
        self.taken_at = 0.0

    def get(self, key: Any) -> bytes | None:
        """The value, None where there is none."""
        return self.data.get(key)

    def put(self, key: Any, value: bytes) -> None:
        """Sets a value."""
        self.data[key] = value

    def remove(self, key: Any) -> None:
        """Removes a value that may not exist."""
        self.data.pop(key, None)

    def keys(self) -> Iterable[Any]:
        """All keys."""
        return list(self.data)


def copy_state(state: Kept) -> Kept:
    """What a checkpoint would hold."""
    copied = MemoryMap()
    copied.data = dict(state.entries.data)  # type: ignore[attr-defined]
    copied.taken_at = _taken_at(state)
    return Kept(copied)


def _taken_at(state: Kept) -> float:
    return getattr(state.entries, "taken_at", 0.0)


class _Checkpoint(Struct, frozen=True):
    """State, and how many records had been read and outputs written when it was taken."""

    state: Kept
    read: int
    written: int


class Harness:
    """Runs a handler as an operator would. Use as a context manager.

    `send` takes records as Kafka would bring them; time stands still until `advance` or `finish` lets it
    pass, and then passes without waiting: deadlines, backoff, times to live, `asyncio.sleep`, the delays of
    scripts. `outputs` has all that the operator has written, `results`, `partials` and `failures` decoded.

    `crash` and `crash_after` are a kill -9 of the worker and the restart from the last `checkpoint`: what
    was read since is read again, and with `delivery` "exactly_once" results and failures written since are
    gone, as from a transaction that was never committed. Scripted models live in another process, as it
    were: they go on speaking. `state` is what a `checkpoint` of another harness gave; the clock on the wall
    goes on from there.

    With `real_time` nothing is virtual: for handlers that wait for sockets or for threads of their own, and
    for real models behind `FakeServices`.
    """

    def __init__(
        self,
        udf: AsyncUdf,
        services: Any = None,
        *,
        key: KeySpec = "session_id",
        settings: OperatorSettings | None = None,
        state: Kept | None = None,
        delivery: Literal["exactly_once", "at_least_once"] = "exactly_once",
        real_time: bool = False,
    ) -> None:
        self._unopened, self._settings = _copied(udf), settings or OperatorSettings()
        self._keyer = Keyer(key, signature_of(udf)[0])
        self._exactly_once = delivery == "exactly_once"
        self._real_time = real_time
        self._log: list[bytes] = []  # the topic
        self._read = 0  # of it
        self._crash_in: int | None = None
        self.services = services or FakeServices()
        self.state = state or Kept(MemoryMap())
        self.loop = KeptLoop() if real_time else VirtualLoop(_taken_at(self.state))
        self.runner = self._runner(udf)
        self._last = _Checkpoint(copy_state(self.state), 0, 0)
        self.outputs: list[Output] = []
        self.crashes = 0

    def __enter__(self) -> "Harness":
        if isinstance(self.services, FakeServices):
            self.services.bind(self.loop.time)
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop(for_good=True)
        self.loop.dispose()

    # Input.

    def send(
        self, request: Any, *, headers: Mapping[str, bytes] | None = None, key: bytes | None = None, age: float = 0.0
    ) -> None:
        """One record arrives: a record or anything JSON; bytes and None go as they are.

        `key` is its Kafka key; its Kafka timestamp is `age` seconds ago. Sent twice it is a duplicate. Where
        the operator is full, time passes until it has a place. Returns when all that can happen at this
        moment has happened.
        """
        value = request if request is None or isinstance(request, bytes) else codec.encode(request)
        arrival = Arrival(
            value=value,
            from_kafka=True,
            kafka_key=key,
            headers=headers or {},
            topic=TOPIC,
            partition=0,
            offset=len(self._log),
            timestamp=int((self.loop.wall() - age) * 1000),
        )
        self._log.append(self._keyer.arrive(arrival)[1].to_bytes())
        self._catch_up()

    def outage(self, seconds: float, of: str | None = None) -> None:
        """From now on, for `seconds`, the model or view `of`, all of them if None, does not answer."""
        self.services.outage(seconds, of)
        self.loop.settle()

    def crash(self) -> None:
        """kill -9 of the worker now, and the restart from the last checkpoint, or from the beginning without one."""
        self._crash_in = None
        self.crashes += 1
        self._stop(for_good=False)
        if self._exactly_once:
            before, since = self.outputs[: self._last.written], self.outputs[self._last.written :]
            self.outputs[:] = [*before, *(output for output in since if output.kind == "partial")]
        self.state = copy_state(self._last.state)
        self._read = self._last.read
        self.runner = self._runner(self._another_worker())
        self._start()
        self._catch_up()
        self._look()

    def crash_after(self, outputs: int) -> None:
        """Crashes once, as soon as so many more outputs, partials among them, have been written."""
        self._crash_in = outputs

    # Time.

    def advance(self, seconds: float) -> None:
        """Lets time pass; what becomes ready meanwhile is written."""
        self._pass(self.loop.time() + seconds, until_idle=False)

    def finish(self, timeout: float | None = None) -> list[Output]:
        """Lets time pass until nothing is in flight. Raises TimeoutError after `timeout` seconds, an hour by default.

        In real time it is 10 s by default.
        """
        if timeout is None:
            timeout = REAL_PATIENCE_S if self._real_time else PATIENCE_S
        if not self._pass(self.loop.time() + timeout, until_idle=True):
            raise TimeoutError(f"{self.shard.in_flight} records are still in flight")
        return self.outputs

    # Output.

    def checkpoint(self) -> Kept:
        """Takes a checkpoint: what a crash goes back to, and its state, for another harness."""
        self._last = _Checkpoint(copy_state(self.state), self._read, len(self.outputs))
        taken = copy_state(self.state)
        taken.entries.taken_at = self.loop.wall()  # type: ignore[attr-defined]
        return taken

    def results(self) -> list[Any]:
        """The decoded values of all results so far."""
        return self._values("result")

    def partials(self) -> list[Any]:
        """The decoded values of all partials so far."""
        return self._values("partial")

    def failures(self) -> list[Any]:
        """The decoded failure records so far."""
        return self._values("failure")

    def reader(self) -> Reader:
        """A reader that has read all partials and results so far: `ChatResponse`s and their tokens."""
        reader = Reader()
        for token in self.partials():
            reader.token(token)
        for result in self.results():
            reader.result(result)
        return reader

    def _values(self, kind: str) -> list[Any]:
        return [codec.decode(output.value) for output in self.outputs if output.kind == kind]

    # Inside.

    def _runner(self, udf: AsyncUdf) -> Runner:
        times = Times(self.loop.time, self.loop.wall, lambda: self.loop)
        return Runner(udf, self.services, self._settings, times=times)

    def _another_worker(self) -> AsyncUdf:
        if isinstance(self._unopened, Exception):
            raise self._unopened
        return copy.deepcopy(self._unopened)

    def _start(self) -> None:
        # Opening may take time, which must not pass before it has begun, nor after it, when the ticker is there.
        self.loop.set_free(lambda: hasattr(self.runner, "_ticker") or not asyncio.all_tasks(self.loop))
        try:
            self.runner.start()
        finally:
            self.loop.freeze()
        self.shard = Shard(0, self.state, self.runner)
        self._write(self.shard.resume())

    def _stop(self, *, for_good: bool) -> None:
        if isinstance(self.services, FakeServices):
            self.services.host_ends = for_good
        if for_good:
            self.loop.set_free()
        else:
            self.runner._udf = AsyncUdf()  # of a handler that is killed, nothing is closed
        self.runner.close()
        self.loop.freeze()

    def _write(self, outputs: Iterable[Output]) -> None:
        """Until the crash, if there is to be one."""
        for output in outputs:
            self.outputs.append(output)
            if self._crash_in is not None:
                self._crash_in -= 1
                if self._crash_in <= 0:
                    return

    def _catch_up(self) -> None:
        """Reads what is in the topic, as the operator has room for it."""
        most = self._settings.capacity + self._settings.capacity // READ_AHEAD
        while self._read < len(self._log):
            if self.shard.in_flight >= most:
                if not self._end_one():
                    raise TimeoutError(f"the operator is full: none of its {self.shard.in_flight} records ends")
                continue  # a crash meanwhile has read on
            data = self._log[self._read]
            self._read += 1
            self._write(self.shard.receive(data))
            self._look()

    def _end_one(self) -> bool:
        """Lets time pass until the full operator has a place; whether it has."""
        before, until = self.shard.in_flight, self.loop.time() + PATIENCE_S
        while self.shard.in_flight >= before and self.loop.time() < until:
            self.loop.run_to(until, self._anything_to_write)
            self._look()
        return self.shard.in_flight < before

    def _pass(self, until: float, *, until_idle: bool) -> bool:
        """Lets time pass until a moment or until nothing is in flight; whether that was reached."""
        while True:
            self._look()
            if until_idle and not self.shard.in_flight and not self.shard.events:
                return True
            if self.loop.time() >= until:
                return not until_idle
            self.loop.run_to(until, self._anything_to_write)

    def _look(self) -> None:
        """Writes all that is ready at this moment, and what that makes ready."""
        self.loop.settle()
        while True:
            self._write(self.shard.drain())
            if self._crash_in is not None and self._crash_in <= 0:
                self.crash()
            self.loop.settle()
            if not self.shard.events:
                return

    def _anything_to_write(self) -> bool:
        return bool(self.shard.events)


def _copied(udf: AsyncUdf) -> AsyncUdf | Exception:
    """What a worker after a crash begins with, or why there is none."""
    try:
        return copy.deepcopy(udf)
    except Exception as error:
        name = type(udf).__name__
        return TypeError(f"{name} cannot be copied to another worker ({error}): make in open() what cannot be copied")
