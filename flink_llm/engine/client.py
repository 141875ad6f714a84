"""The engine on the other side of a socket: finds the host, starts it if need be, survives its end.

While the host is gone calls in flight end in `Outage`, new ones wait, and `outage_since` says since when,
so that records' clocks can stand still.
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from flink_llm import __version__
from flink_llm.engine.launch import start_host
from flink_llm.engine.place import socket_path
from flink_llm.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Done,
    Engine,
    Fault,
    FrameReader,
    Hello,
    Load,
    Loaded,
    Ping,
    Pong,
    Submit,
    ToClient,
    ToHost,
    Tokens,
    Welcome,
    frame,
)
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import Events
from flink_llm.errors import ModelFolderError, Outage, ProtocolError, RecordError

log = logging.getLogger(__name__)
BACKOFF_S, BACKOFF_LIMIT_S = 0.1, 2.0
PING_S = 1.0
GREETING_S = 10.0
FINISH_S = 1.0
TOLD_EVERY = 15
"""Of the failed attempts to reach the host, every how many is a warning in the log."""


def open_engine(settings: HostSettings) -> Engine:
    """The engine of the settings; nothing is started or connected before the first call."""
    if settings.engine == "host":
        return HostClient(settings)
    from flink_llm.engine.engine import OnnxBackend  # ONNX Runtime, only when it is to run in this process
    from flink_llm.engine.work import WorkTable

    return WorkTable(OnnxBackend(settings))


class HostClient:
    """An `Engine` over the host's socket. One connection, used from one loop.

    `outage_since`: monotonic seconds since when the host has been gone or silent, None while it is
    there with all models loaded. The first connection may fail for good (ConfigError, ModelFolderError,
    ProtocolError); once there was one, whatever keeps the next from coming is an outage.
    """

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._connection: _Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._arrival: asyncio.Future[_Connection | Exception] | None = None
        self._waiting: dict[int, tuple[Submit, Events]] = {}
        self._loaded: dict[str, str] = {}
        self._next_call = 0
        self._was_up = False
        self._closed = False
        self.outage_since: float | None = None

    async def load(self, folder: str, sha256: str | None = None) -> Loaded:
        """See `Engine.load`. Starts the host if there is none; waits out an outage."""
        folder = _absolute(folder)
        loaded = await self._load(await self._connected(), folder, sha256)
        self._loaded[folder] = loaded.sha256
        return loaded

    def submit(self, work: Submit) -> Events:
        """See `Engine.submit`. While the host is gone the work waits for the next one."""
        self._next_call += 1
        call = self._next_call
        events = Events(partial(self._cancel, call))
        work = msgspec.structs.replace(work, call=call)
        if self._closed:
            events.push(Outage("the engine is closed"))
        elif self._connection is not None:
            self._connection.submit(work, events)
        else:
            self._waiting[call] = (work, events)
            self._keep()
        return events

    async def close(self) -> None:
        """See `Engine.close`. The host stays for its other clients, or for a while."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            await self._connection.finish()
        self._refuse(Outage("the engine is closed"))

    def _cancel(self, call: int) -> None:
        if self._waiting.pop(call, None) is None and self._connection is not None:
            self._connection.cancel(call)

    async def _connected(self) -> "_Connection":
        """The connection, when there is one. Raises what keeps the first one from coming."""
        if self._closed:
            raise Outage("the engine is closed")
        if self._connection is not None:
            return self._connection
        self._keep()
        if self._arrival is None:
            self._arrival = asyncio.get_running_loop().create_future()
        arrived = await asyncio.shield(self._arrival)
        if isinstance(arrived, Exception):
            raise arrived
        return arrived

    def _keep(self) -> None:
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep_connected())

    async def _keep_connected(self) -> None:
        attempt = 0
        while True:
            try:
                connection = await self._open()
            except Exception as error:  # whatever it is, this task must go on: every call waits for it
                transient = self._was_up or isinstance(error, (Outage, OSError))
                if not transient:
                    return self._refuse(error)
                self._out()
                level = logging.DEBUG if attempt % TOLD_EVERY else logging.WARNING
                log.log(level, "the model host cannot be reached: %s", error)
                limit = min(BACKOFF_LIMIT_S, BACKOFF_S * 2 ** min(attempt, 10))
                await asyncio.sleep(random.uniform(0.5, 1) * limit)
                attempt += 1
            else:
                attempt = 0
                self._up(connection)
                await connection.lost.wait()
                log.warning("the model host is gone; its work is tried again when it is back")

    async def _open(self) -> "_Connection":
        """A new connection, welcomed, with all models loaded that were loaded before."""
        connection = await self._connect()
        try:
            await connection.greet(self._settings.silence_s)
            for folder, sha256 in list(self._loaded.items()):
                await self._load(connection, folder, sha256)
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _connect(self) -> "_Connection":
        path = socket_path(self._settings)
        loop = asyncio.get_running_loop()
        for start in (False, True):
            if start:
                await asyncio.to_thread(start_host, self._settings, path)
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                _, connection = await loop.create_unix_connection(lambda: _Connection(self._down), str(path))
                return connection
        raise Outage(f"the model host does not answer at {path}")

    async def _load(self, connection: "_Connection", folder: str, sha256: str | None) -> Loaded:
        self._next_call += 1
        answer = await connection.ask(Load(call=self._next_call, folder=folder, sha256=sha256))
        if isinstance(answer, Loaded):
            return answer
        if isinstance(answer, Fault) and answer.kind == "model_folder":
            raise ModelFolderError(answer.message)
        raise Outage(getattr(answer, "message", "the host gave no answer"))

    def _up(self, connection: "_Connection") -> None:
        if connection.lost.is_set():
            return self._out()
        self._connection = connection
        self._was_up = True
        self.outage_since = None
        waiting, self._waiting = self._waiting, {}
        for work, events in waiting.values():
            connection.submit(work, events)
        self._arrive(connection)

    def _down(self, connection: "_Connection") -> None:
        if connection is self._connection:
            self._connection = None
            self._out()

    def _out(self) -> None:
        if self.outage_since is None:
            self.outage_since = time.monotonic()

    def _refuse(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, {}
        for _, events in waiting.values():
            events.push(error)
        self._arrive(error)

    def _arrive(self, arrived: "_Connection | Exception") -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.set_result(arrived)


def _absolute(folder: str) -> str:
    return os.path.abspath(folder)


class _Connection(asyncio.Protocol):
    """One connection to a host: calls by number, frames of one turn of the loop in one write.

    `lost` is set once it has ended; `on_lost` is called first, then every call ends in Outage.
    """

    def __init__(self, on_lost: Callable[["_Connection"], None]) -> None:
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
            raise Outage("the model host is gone")
        future = self._answers[call] = asyncio.get_running_loop().create_future()
        self._send(frame(message))
        return await future

    def submit(self, work: Submit, events: Events) -> None:
        """Sends work whose answers go to `events`."""
        if self.lost.is_set():
            return events.push(Outage("the model host is gone"))
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
        """Cancels what is in flight and ends the connection."""
        calls = list(self._calls)
        for call in calls:
            self._calls[call].push(Outage("the engine is closed"))
            self.cancel(call)
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
            events.push(Outage("the model host is gone"))
        answers, self._answers = self._answers, {}
        for future in answers.values():
            if not future.done():
                future.set_exception(Outage("the model host is gone"))
