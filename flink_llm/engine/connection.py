"""One connection of a client to a model host: calls by number, and the watch over the host's silence."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

from flink_llm import __version__
from flink_llm.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Done,
    Fault,
    FrameReader,
    Hello,
    Load,
    Ping,
    Pong,
    Submit,
    ToClient,
    ToHost,
    Tokens,
    Welcome,
    frame,
)
from flink_llm.engine.work import Events
from flink_llm.errors import Outage, ProtocolError, RecordError

log = logging.getLogger(__name__)
PING_S = 1.0
GREETING_S = 10.0
FINISH_S = 1.0
GONE = "the model host is gone"
CLOSED = "the engine is closed"


class Connection(asyncio.Protocol):
    """One connection to a host: calls by number, frames of one turn of the loop in one write.

    `lost` is set once it has ended; `on_lost` is called first, then every call ends in Outage.
    """

    def __init__(self, on_lost: Callable[["Connection"], None]) -> None:
        self.lost = asyncio.Event()
        self._on_lost = on_lost
        self._reader = FrameReader("client")
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, Events] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._unsent: list[bytes] = []
        self._heard = False
        self._watcher: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        try:
            for message in self._reader.feed(data):
                self._handle(message)
        except ProtocolError as error:
            log.error("the model host breaks the protocol: %s", error)
            self.abort()

    async def greet(self, silence_s: float) -> None:
        """The handshake. Raises ProtocolError for another version, Outage for silence.

        From here on a host that is silent for `silence_s` is taken for dead.
        """
        hello = Hello(protocol=PROTOCOL_VERSION, package=__version__, client=str(os.getpid()))
        try:
            answer = await asyncio.wait_for(self._ask(0, hello), max(silence_s, GREETING_S))
        except TimeoutError as error:
            raise Outage("the model host accepts connections and says nothing") from error
        if not isinstance(answer, Welcome):
            raise ProtocolError(getattr(answer, "message", "the model host does not greet"))
        self._watcher = asyncio.get_running_loop().create_task(self._watch(silence_s))

    async def ask(self, load: Load) -> Any:
        """Sends a `Load` and waits for its answer. Raises Outage when the host goes meanwhile."""
        return await self._ask(load.call, load)

    async def _ask(self, call: int, message: ToHost) -> Any:
        if self.lost.is_set():
            raise Outage(GONE)
        future = self._answers[call] = asyncio.get_running_loop().create_future()
        self._send(frame(message))
        return await future

    def submit(self, work: Submit, events: Events) -> None:
        """Sends work whose answers go to `events`."""
        if self.lost.is_set():
            return events.push(Outage(GONE))
        try:
            data = frame(work)
        except ProtocolError as error:
            return events.push(RecordError("too_large", str(error)))
        self._calls[work.call] = events
        self._send(data)

    def cancel(self, call: int) -> None:
        """Stops a call that has not ended."""
        if self._calls.pop(call, None) is not None:
            self._send(frame(Cancel(call=call)))

    async def finish(self) -> None:
        """Ends the connection; every call in flight ends in Outage here, and goes on at the host for a while."""
        calls, self._calls = self._calls, {}
        for events in calls.values():
            events.push(Outage(CLOSED))
        self._flush()
        if self._transport is not None:
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lost.wait(), FINISH_S)
            self.abort()

    def abort(self) -> None:
        """Ends the connection; every call in flight ends in Outage."""
        if self._transport is not None:
            self._transport.abort()
        self._fail()

    async def _watch(self, silence_s: float) -> None:
        """Ends the connection when the host has been silent for `silence_s`.

        Turns are counted, not time: a loop that was itself held up has proved nothing.
        """
        step = min(PING_S, silence_s / 3)
        ping = frame(Ping(call=0))
        quiet = 0.0
        while quiet < silence_s * 0.999:
            self._heard = False
            self._send(ping)
            await asyncio.sleep(step)
            quiet = 0.0 if self._heard else quiet + step
        log.warning("the model host has said nothing for %s s", silence_s)
        self.abort()

    def _send(self, data: bytes) -> None:
        if self.lost.is_set():
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(data)

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if data and self._transport is not None and not self.lost.is_set():
            self._transport.write(data)

    def _handle(self, message: ToClient) -> None:
        if isinstance(message, Tokens):
            events = self._calls.get(message.call)
            if events is not None:
                events.push(message)
        elif isinstance(message, Done) or (isinstance(message, Fault) and message.call in self._calls):
            events = self._calls.pop(message.call, None)
            if events is not None:
                events.push(message)
        elif not isinstance(message, Pong):
            future = self._answers.pop(getattr(message, "call", 0), None)
            if future is not None and not future.done():
                future.set_result(message)

    def _fail(self) -> None:
        if self.lost.is_set():
            return
        self.lost.set()
        if self._watcher is not None and self._watcher is not asyncio.current_task():
            self._watcher.cancel()
        self._on_lost(self)
        calls, self._calls = self._calls, {}
        for events in calls.values():
            events.push(Outage(GONE))
        answers, self._answers = self._answers, {}
        for future in answers.values():
            if not future.done():
                future.set_exception(Outage(GONE))
