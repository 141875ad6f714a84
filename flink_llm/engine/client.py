"""The engine on the other side of a socket: finds the host, starts it if need be, survives its end.

While the host is gone calls in flight end in `Outage`, new ones wait, and `outage_since` says since when,
so that records' clocks can stand still.
"""

import asyncio
import contextlib
import logging
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock

from flink_llm import __version__
from flink_llm.engine.place import socket_path
from flink_llm.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Done,
    Engine,
    Event,
    Fault,
    FrameReader,
    Hello,
    Load,
    Loaded,
    Ping,
    Pong,
    Submit,
    Tokens,
    Welcome,
    frame,
)
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.engine.work import Events
from flink_llm.errors import ConfigError, ModelFolderError, Outage, ProtocolError
from flink_llm.local import processes

log = logging.getLogger(__name__)
BACKOFF_S, BACKOFF_LIMIT_S = 0.1, 2.0
PING_S = 1.0


def open_engine(settings: HostSettings) -> Engine:
    """The engine of the settings; nothing is started or connected before the first call."""
    if settings.engine == "host":
        return HostClient(settings)
    from flink_llm.engine.engine import OnnxBackend  # ONNX Runtime, only when it is to run in this process
    from flink_llm.engine.work import WorkTable

    return WorkTable(OnnxBackend(settings))


class HostClient:
    """An `Engine` over the host's socket. One connection, used from one loop."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._connection: _Connection | None = None
        self._ready = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._loaded: dict[str, Loaded] = {}
        self._next_call = 0
        self._failure: Exception | None = None
        self.outage_since: float | None = None

    async def load(self, folder: str, sha256: str | None = None) -> Loaded:
        """See `Engine.load`. Starts the host if there is none."""
        self._keep()
        await self._until_ready()
        folder = str(Path(folder).absolute())
        loaded = await self._load(self._require(), folder, sha256)
        self._loaded[folder] = loaded
        return loaded

    def submit(self, work: Submit) -> Events:
        """See `Engine.submit`. While the host is gone the work waits for the next one."""
        self._keep()
        self._next_call += 1
        call = self._next_call
        events = Events(lambda _: self._cancel(call))
        work = msgspec.structs.replace(work, call=call)
        if self._ready.is_set() and self._connection is not None:
            self._connection.submit(work, events)
        else:
            asyncio.get_running_loop().create_task(self._submit_later(work, events))
        return events

    async def close(self) -> None:
        """Lets go of the host; what is in flight goes on there for a while."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            self._connection.close()

    async def _submit_later(self, work: Submit, events: Events) -> None:
        try:
            await self._until_ready()
            if not events.closed:
                self._require().submit(work, events)
        except Exception as error:  # told to whoever waits for the events
            events.push(error)

    def _cancel(self, call: int) -> None:
        if self._connection is not None:
            self._connection.cancel(call)

    def _require(self) -> "_Connection":
        if self._connection is None or not self._ready.is_set():
            raise Outage("the model host is gone")
        return self._connection

    async def _until_ready(self) -> None:
        while not self._ready.is_set():
            if self._failure is not None:
                raise self._failure
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), 0.25)

    def _keep(self) -> None:
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep_connected())

    async def _keep_connected(self) -> None:
        attempt = 0
        while True:
            try:
                connection = await self._connect()
                for folder, loaded in list(self._loaded.items()):
                    await self._load(connection, folder, loaded.sha256)
            except (Outage, OSError) as error:
                self._out()
                log.warning("the model host cannot be reached: %s", error)
                limit = min(BACKOFF_LIMIT_S, BACKOFF_S * 2**attempt)
                await asyncio.sleep(random.uniform(0.5, 1) * limit)
                attempt += 1
                continue
            except (ConfigError, ModelFolderError, ProtocolError) as error:
                self._failure = error
                return
            attempt = 0
            self._connection = connection
            self.outage_since = None
            self._ready.set()
            await connection.watch(self._settings.silence_s)
            self._ready.clear()
            self._out()
            log.warning("the model host is gone; its work is tried again when it is back")

    def _out(self) -> None:
        if self.outage_since is None:
            self.outage_since = time.monotonic()

    async def _connect(self) -> "_Connection":
        path = socket_path(self._settings)
        loop = asyncio.get_running_loop()
        for start in (False, True):
            if start:
                await asyncio.to_thread(_start_host, self._settings, path)
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                _, connection = await loop.create_unix_connection(_Connection, str(path))
                await connection.greet(self._settings.silence_s)
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


class _Connection(asyncio.Protocol):
    """One connection to a host: calls by number, frames of one turn of the loop in one write."""

    def __init__(self) -> None:
        self._reader = FrameReader("client")
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, Events] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._unsent: list[bytes] = []
        self._heard = time.monotonic()
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail()

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        try:
            for message in self._reader.feed(data):
                self._handle(message)
        except ProtocolError as error:
            log.error("the model host breaks the protocol: %s", error)
            self.close()

    async def greet(self, patience: float) -> None:
        """The handshake. Raises ProtocolError for another version, Outage for silence."""
        client = f"{os.getpid()}"
        hello = Hello(protocol=PROTOCOL_VERSION, package=__version__, client=client)
        try:
            answer = await asyncio.wait_for(self._ask(0, hello), max(patience, 10.0))
        except TimeoutError as error:
            self.close()
            raise Outage("the model host accepts connections and says nothing") from error
        if not isinstance(answer, Welcome):
            self.close()
            raise ProtocolError(getattr(answer, "message", "the model host does not greet"))

    async def ask(self, load: Load) -> Any:
        """Sends a `Load` and waits for its answer. Raises Outage when the host goes meanwhile."""
        return await self._ask(load.call, load)

    async def _ask(self, call: int, message: Any) -> Any:
        future = self._answers[call] = asyncio.get_running_loop().create_future()
        self._send(message)
        return await future

    def submit(self, work: Submit, events: Events) -> None:
        """Sends work whose answers go to `events`."""
        self._calls[work.call] = events
        self._send(work)

    def cancel(self, call: int) -> None:
        """Stops a call that has not ended."""
        if self._calls.pop(call, None) is not None:
            self._send(Cancel(call=call))

    async def watch(self, silence_s: float) -> None:
        """Returns when the connection is lost, or the host has been silent for `silence_s`."""
        while not self._lost.is_set():
            self._send(Ping(call=0))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), min(PING_S, silence_s / 3))
            if time.monotonic() - self._heard > silence_s:
                log.warning("the model host has said nothing for %s s", silence_s)
                self.close()

    def close(self) -> None:
        """Ends the connection; every call in flight ends in Outage."""
        if self._transport is not None:
            self._transport.abort()
        self._fail()

    def _send(self, message: Any) -> None:
        if self._lost.is_set():
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frame(message))

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self._transport is not None and not self._lost.is_set():
            self._transport.write(data)

    def _handle(self, message: Any) -> None:
        if isinstance(message, (Tokens, Done)) or (isinstance(message, Fault) and message.call in self._calls):
            event: Event = message
            events = self._calls.get(event.call)
            if events is None:
                return
            if not isinstance(event, Tokens):
                del self._calls[event.call]
            events.push(event)
        elif not isinstance(message, Pong):
            call = getattr(message, "call", 0)
            future = self._answers.pop(call, None)
            if future is not None and not future.done():
                future.set_result(message)

    def _fail(self) -> None:
        if self._lost.is_set():
            return
        self._lost.set()
        calls, self._calls = self._calls, {}
        for events in calls.values():
            events.push(Outage("the model host is gone"))
        for future in self._answers.values():
            if not future.done():
                future.set_exception(Outage("the model host is gone"))
        self._answers.clear()


def _start_host(settings: HostSettings, path: Path) -> None:
    """Starts the host unless somebody else just has; waits until it listens. Raises Outage, ConfigError."""
    with FileLock(path.with_suffix(".lock"), timeout=settings.start_timeout_s):
        if _listening(path):
            return
        log_file = path.with_suffix(".log")
        command = [
            sys.executable, "-m", settings.launcher, "--device", resolve_device(settings.device),
            "--socket", str(path), "--threads", str(settings.threads), "--slots", str(settings.slots),
            "--queue", str(settings.queue), "--linger", str(settings.linger_s), *settings.launcher_args,
        ]  # fmt: skip
        log.info("starting the model host (%s), log in %s", resolve_device(settings.device), log_file)
        started = processes.start(command, log_file)
        deadline = time.monotonic() + settings.start_timeout_s
        while not _listening(path):
            if started.process() is None:
                words = log_file.read_text(errors="replace").strip().splitlines()
                last = words[-1] if words else "no output"
                raise ConfigError(f"the model host ended at its start: {last} (log: {log_file})")
            if time.monotonic() > deadline:
                processes.stop(started)
                raise Outage(f"the model host did not start within {settings.start_timeout_s} s (log: {log_file})")
            time.sleep(0.05)


def _listening(path: Path) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
