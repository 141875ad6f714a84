"""One client of the host: its greeting, its calls, and what is said to it."""

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Any, Protocol

import msgspec

from flink_llm import __version__
from flink_llm.engine.faults import fault_of
from flink_llm.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Event,
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
from flink_llm.engine.work import Listener, WorkTable
from flink_llm.errors import ConfigError, ModelFolderError, Outage, ProtocolError

log = logging.getLogger(__name__)
UNSENT_LIMIT_BYTES = 64 * 1024 * 1024
GREETING_S = 10.0


class Home(Protocol):
    """What a peer knows of its host."""

    table: WorkTable
    device: str

    def settle(self, sha256: str) -> None: ...

    def gone(self, peer: "Peer") -> None: ...


class Peer(asyncio.Protocol):
    """One client's connection. Frames of one turn of the loop leave in one write."""

    def __init__(self, host: Home) -> None:
        self._host = host
        self._reader = FrameReader("host")
        self._calls: dict[int, Listener] = {}
        self._unsent: list[bytes] = []
        self._name = "a client"
        self._welcome = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        asyncio.get_running_loop().call_later(GREETING_S, self._expect_greeting)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._handle(message)
        except ProtocolError as error:
            self._drop(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._welcome:
            log.info("%s is gone, %d calls in flight", self._name, len(self._calls))
        for listener in self._calls.values():
            self._host.table.lose(listener)
        self._calls.clear()
        self._host.gone(self)

    def send(self, message: ToClient) -> None:
        """Queues a message; all of this turn of the loop leave together."""
        if self._transport is None:
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frame(message))

    def close(self) -> None:
        """Ends the connection once what was said has left."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self._transport is None:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > UNSENT_LIMIT_BYTES:
            self._drop(f"{UNSENT_LIMIT_BYTES} bytes wait for it to read")

    def _drop(self, why: str) -> None:
        if self._transport is not None:
            log.warning("%s is dropped: %s", self._name, why)
            self._transport.abort()

    def _expect_greeting(self) -> None:
        if not self._welcome:
            self._drop(f"no Hello within {GREETING_S} s")

    def _handle(self, message: ToHost) -> None:
        if isinstance(message, Hello):
            self._greet(message)
        elif not self._welcome:
            raise ProtocolError(f"{type(message).__name__} came before Hello")
        elif isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            listener = self._calls.pop(message.call, None)
            if listener is not None:
                self._host.table.leave(listener)
        elif isinstance(message, Load):
            self._spawn(self._load(message))
        elif isinstance(message, Ping):
            self.send(Pong(call=message.call))

    def _submit(self, work: Submit) -> None:
        if work.call in self._calls:
            raise ProtocolError(f"call {work.call} was submitted twice")
        listener = self._host.table.join(work, self._hear)
        if not listener.ended:
            self._calls[work.call] = listener

    def _hear(self, event: Event) -> None:
        try:
            self.send(event)
        except ProtocolError as error:  # or its client would wait for ever, and who hears it after this one too
            event = Fault(call=event.call, kind="record", code="result_too_large", message=str(error))
            self.send(event)
        if not isinstance(event, Tokens):
            self._calls.pop(event.call, None)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _greet(self, hello: Hello) -> None:
        if (hello.protocol, hello.package) != (PROTOCOL_VERSION, __version__):
            text = (
                f"the client speaks protocol {hello.protocol} of {hello.package}, "
                f"this host protocol {PROTOCOL_VERSION} of {__version__}"
            )
            log.warning("refused: %s", text)
            self.send(Fault(call=0, kind="protocol", code="version", message=text))
            return self.close()
        self._welcome = True
        self._name = f"client {hello.client[:64]!r}"
        log.info("%s connected", self._name)
        device = self._host.device
        self.send(Welcome(protocol=PROTOCOL_VERSION, package=__version__, pid=os.getpid(), device=device))

    async def _load(self, load: Load) -> None:
        try:
            loaded = await self._host.table.load(load.folder, load.sha256)
        except (ModelFolderError, ConfigError, Outage) as error:
            fault = fault_of(error, load.call)
            log.warning("a model is not loaded: %s", fault.message)
            self.send(fault)
        except Exception as error:  # whatever loading raises is told to the client, the host lives on
            log.exception("%s could not be loaded", load.folder)
            text = f"{load.folder} could not be loaded: {type(error).__name__}: {error}"
            self.send(fault_of(Outage(text), load.call))
        else:
            self.send(msgspec.structs.replace(loaded, call=load.call))
            self._host.settle(loaded.sha256)
