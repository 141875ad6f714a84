"""The engine on the other side of a socket: finds the host, starts it if need be, survives its end.

While the host is gone calls in flight end in `Outage`, new ones wait, and `outage_since` says since when,
so that records' clocks can stand still.
"""

import asyncio
import contextlib
import logging
import os
import time
from contextvars import Context
from functools import partial

import msgspec

from flink_llm.engine.connection import CLOSED, Connection
from flink_llm.engine.launch import start_host
from flink_llm.engine.place import socket_path
from flink_llm.engine.protocol import Engine, Fault, Load, Loaded, Submit
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import Events
from flink_llm.errors import ModelFolderError, Outage
from flink_llm.retries import drawn

log = logging.getLogger(__name__)
BACKOFF_S, BACKOFF_LIMIT_S = 0.1, 2.0
RELOAD_S = 2.0
TOLD_EVERY = 15
"""Of the failed attempts at the same thing, every how many is a warning in the log."""


def open_engine(settings: HostSettings) -> Engine:
    """The engine of the settings; nothing is started or connected before the first call."""
    if settings.engine == "host":
        return HostClient(settings)
    from flink_llm.engine.engine import OnnxBackend  # ONNX Runtime, only when it is to run in this process
    from flink_llm.engine.fleet import Fleet
    from flink_llm.engine.work import WorkTable

    return WorkTable(Fleet(OnnxBackend(settings), settings.memory_mb))


class HostClient:
    """An `Engine` over the host's socket. One connection, used from one loop.

    `outage_since`: monotonic seconds since when the host has been gone or silent, or a model it had loaded
    has been missing, None while it is there with all of them. The first connection may fail for good
    (ConfigError, ModelFolderError, ProtocolError); once there was one, whatever keeps the next from coming
    is an outage.
    """

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._connection: Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._arrival: asyncio.Future[Connection | Exception] | None = None
        self._waiting: dict[int, tuple[Submit, Events]] = {}
        self._loaded: dict[str, str] = {}
        self._missing: dict[str, Exception] = {}
        self._next_call = 0
        self._was_up = False
        self._closed = False
        self.outage_since: float | None = None

    async def load(self, folder: str, sha256: str | None = None) -> Loaded:
        """See `Engine.load`. Starts the host if there is none; waits out an outage."""
        folder = _absolute(folder)
        loaded = await self._load(await self._connected(), folder, sha256)
        self._loaded[folder] = loaded.sha256
        self._found(loaded.sha256)
        return loaded

    def submit(self, work: Submit) -> Events:
        """See `Engine.submit`. While the host is gone the work waits for the next one."""
        self._next_call += 1
        call = self._next_call
        events = Events(partial(self._cancel, call))
        work = msgspec.structs.replace(work, call=call)
        if self._closed:
            events.push(Outage(CLOSED))
        elif self._connection is not None:
            self._send(self._connection, work, events)
        else:
            self._waiting[call] = (work, events)
            self._keep()
        return events

    async def close(self) -> None:
        """See `Engine.close`. The host stays for its other clients, or for a while, and so does the work."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            await self._connection.finish()
        self._refuse(Outage(CLOSED))

    def _cancel(self, call: int) -> None:
        if self._waiting.pop(call, None) is None and self._connection is not None:
            self._connection.cancel(call)

    async def _connected(self) -> "Connection":
        """The connection, when there is one. Raises what keeps the first one from coming."""
        if self._closed:
            raise Outage(CLOSED)
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
            own = Context()  # not that of the call which happens to be the first
            self._keeper = asyncio.get_running_loop().create_task(self._keep_connected(), context=own)

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
                await asyncio.sleep(drawn(0.5, 1) * limit)
                attempt += 1
            else:
                attempt = 0
                self._up(connection)
                await self._until_lost(connection)
                log.warning("the model host is gone; its work is tried again when it is back")

    async def _open(self) -> "Connection":
        """A new connection, welcomed, with all models loaded that were loaded before and can be again."""
        connection = await self._connect()
        try:
            await connection.greet(self._settings.silence_s)
            await self._load_again(connection, told=True)
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _until_lost(self, connection: Connection) -> None:
        """Tries models that are missing again, as their folders may be mended."""
        attempt = 0
        while self._missing and not connection.lost.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(connection.lost.wait(), RELOAD_S)
            attempt += 1
            with contextlib.suppress(Outage):
                await self._load_again(connection, told=attempt % TOLD_EVERY == 0)
        await connection.lost.wait()

    async def _load_again(self, connection: Connection, *, told: bool) -> None:
        """Loads what was loaded and is missing at the host, each by itself. Raises Outage when the host goes."""
        known = connection is self._connection
        for folder, sha256 in list(self._loaded.items()):
            if known and sha256 not in self._missing:
                continue
            try:
                await self._load(connection, folder, sha256)
            except (ModelFolderError, Outage) as error:
                if connection.lost.is_set():
                    raise Outage(str(error)) from error
                self._missing[sha256] = error
                level = logging.WARNING if told else logging.DEBUG
                log.log(level, "%s, model %s, is missing and its work waits: %s", folder, sha256, error)
            else:
                self._found(sha256)

    async def _connect(self) -> "Connection":
        path = socket_path(self._settings)
        loop = asyncio.get_running_loop()
        for start in (False, True):
            if start:
                await asyncio.to_thread(start_host, self._settings, path)
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                _, connection = await loop.create_unix_connection(lambda: Connection(self._down), str(path))
                return connection
        raise Outage(f"the model host does not answer at {path}")

    async def _load(self, connection: "Connection", folder: str, sha256: str | None) -> Loaded:
        self._next_call += 1
        answer = await connection.ask(Load(call=self._next_call, folder=folder, sha256=sha256))
        if isinstance(answer, Loaded):
            return answer
        if isinstance(answer, Fault) and answer.kind == "model_folder":
            raise ModelFolderError(answer.message)
        raise Outage(getattr(answer, "message", "the host gave no answer"))

    def _up(self, connection: "Connection") -> None:
        if connection.lost.is_set():
            return self._out()
        self._connection = connection
        self._was_up = True
        if self._missing:
            self._out()
        else:
            self.outage_since = None
        waiting, self._waiting = self._waiting, {}
        for work, events in waiting.values():
            self._send(connection, work, events)
        self._arrive(connection)

    def _send(self, connection: Connection, work: Submit, events: Events) -> None:
        missing = self._missing.get(work.model)
        if missing is None:
            connection.submit(work, events)
        else:
            events.push(Outage(str(missing)))

    def _found(self, sha256: str) -> None:
        if self._missing.pop(sha256, None) is not None:
            log.warning("the model %s is back", sha256)
        if not self._missing and self._connection is not None:
            self.outage_since = None

    def _down(self, connection: "Connection") -> None:
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

    def _arrive(self, arrived: "Connection | Exception") -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.set_result(arrived)


def _absolute(folder: str) -> str:
    absolute = os.path.abspath(folder)
    try:
        absolute.encode()
    except UnicodeEncodeError as error:
        raise ModelFolderError(f"{folder!a} is no path that can be sent to a host: {error}") from error
    return absolute
