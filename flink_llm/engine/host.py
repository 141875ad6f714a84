"""The model host: one process per device, all its models in it, shared by every worker on the machine.

Started by the first client that needs it, gone `linger` seconds after its last. A client that breaks the
protocol is dropped, alone; one whose connection is lost leaves its work running for a while, so that a
restarted worker finds it again.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flink_llm import __version__
from flink_llm.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Fault,
    FrameReader,
    Hello,
    Load,
    Ping,
    Pong,
    Submit,
    Welcome,
    frame,
)
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.engine.work import Backend, Events, WorkTable
from flink_llm.errors import ConfigError, FlinkLlmError, ModelFolderError, ProtocolError

log = logging.getLogger(__name__)
UNSENT_LIMIT_BYTES = 64 * 1024 * 1024


class _Peer(asyncio.Protocol):
    """One client's connection. Frames of one turn of the loop leave in one write."""

    def __init__(self, host: "Host") -> None:
        self._host = host
        self._reader = FrameReader("host")
        self._calls: dict[int, tuple[Events, str]] = {}
        self._unsent: list[bytes] = []
        self._welcome = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._host.peers.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._handle(message)
        except ProtocolError as error:
            log.warning("a client is dropped: %s", error)
            self._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for events, work in self._calls.values():
            self._host.table.detach(events, work)
            events.end()
        self._calls.clear()
        self._host.gone(self)

    def send(self, message: Any) -> None:
        """Queues a message; all of this turn of the loop leave together."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frame(message))

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self._transport is None:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > UNSENT_LIMIT_BYTES:
            log.warning("a client that reads too slowly is dropped")
            self._drop()

    def _drop(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _handle(self, message: Any) -> None:
        if isinstance(message, Hello):
            self._greet(message)
        elif not self._welcome:
            raise ProtocolError(f"{type(message).__name__} came before Hello")
        elif isinstance(message, Submit):
            events = self._host.table.submit(message)
            self._calls[message.call] = (events, message.work)
            self._spawn(self._forward(message.call, events))
        elif isinstance(message, Cancel):
            known = self._calls.pop(message.call, None)
            if known is not None:
                known[0].end()
                known[0].close()
        elif isinstance(message, Load):
            self._spawn(self._load(message))
        elif isinstance(message, Ping):
            self.send(Pong(call=message.call))

    def _spawn(self, coroutine: Any) -> None:
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
            asyncio.get_running_loop().call_later(0.1, self._drop)
            return
        self._welcome = True
        log.info("client %s connected", hello.client)
        device = self._host.device
        self.send(Welcome(protocol=PROTOCOL_VERSION, package=__version__, pid=os.getpid(), device=device))

    async def _load(self, load: Load) -> None:
        try:
            loaded = await self._host.table.load(load.folder, load.sha256)
        except (ModelFolderError, ConfigError) as error:
            self.send(Fault(call=load.call, kind="model_folder", code="model_folder", message=str(error)))
        except Exception as error:  # whatever loading raises is told to the client, the host lives on
            log.exception("%s could not be loaded", load.folder)
            self.send(Fault(call=load.call, kind="outage", code="outage", message=str(error)))
        else:
            self.send(_with_call(loaded, load.call))

    async def _forward(self, call: int, events: Events) -> None:
        async for event in events:
            self.send(event)
        self._calls.pop(call, None)


class Host:
    """Serves a backend on a Unix socket until it has had no client for `linger_s` seconds."""

    def __init__(self, backend: Backend, device: str, linger_s: float) -> None:
        self.table = WorkTable(backend)
        self.device = device
        self.peers: set[_Peer] = set()
        self._linger_s = linger_s
        self._leave: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()

    async def run(self, path: Path) -> None:
        """Serves until there is nobody left, or SIGTERM."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._over.set)
        path.unlink(missing_ok=True)
        previous = os.umask(0o077)
        try:
            server = await loop.create_unix_server(lambda: _Peer(self), str(path))
        finally:
            os.umask(previous)
        log.info("serving %s on %s", self.device, path)
        self._wait_for_nobody()
        await self._over.wait()
        path.unlink(missing_ok=True)
        server.close()
        await self.table.close()
        log.info("the last client is gone, so is the host")

    def gone(self, peer: _Peer) -> None:
        """A client's connection has ended."""
        self.peers.discard(peer)
        if not self.peers:
            self._wait_for_nobody()

    def _wait_for_nobody(self) -> None:
        if self._leave is not None:
            self._leave.cancel()
        self._leave = asyncio.get_running_loop().call_later(self._linger_s, self._check)

    def _check(self) -> None:
        if not self.peers:
            self._over.set()


def _with_call(loaded: Any, call: int) -> Any:
    import msgspec

    return msgspec.structs.replace(loaded, call=call)


def serve(backend: Callable[[HostSettings], Backend], settings: HostSettings, path: Path) -> None:
    """Runs a host in this process until it is over; errors at start are one line and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        device = resolve_device(settings.device)
        asyncio.run(Host(backend(settings), device, settings.linger_s).run(path))
    except (FlinkLlmError, OSError) as error:
        print(f"flink-llm host: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _onnx(settings: HostSettings) -> Backend:
    from flink_llm.engine.engine import OnnxBackend  # ONNX Runtime, for the host only

    return OnnxBackend(settings)


def command(backend: Callable[[HostSettings], Backend] = _onnx) -> click.Command:
    """The command line of a host over another backend."""

    @click.command(name="host")
    @click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
    @click.option("--socket", "path", type=click.Path(path_type=Path), help="Where to listen.")
    @click.option("--threads", default=0, help="CPU threads; 0 leaves it to ONNX Runtime.")
    @click.option("--slots", default=16, show_default=True, help="Generations at once.")
    @click.option("--queue", default=4096, show_default=True, help="Requests that may wait.")
    @click.option("--linger", default=30.0, show_default=True, help="Seconds to stay without a client.")
    @click.argument("extra", nargs=-1)
    def host(path: Path | None, linger: float, extra: tuple[str, ...], **chosen: Any) -> None:
        """Serve models to every job on this machine. Jobs start it themselves; this runs it in sight."""
        from flink_llm.engine.place import socket_path

        settings = HostSettings(linger_s=linger, launcher_args=list(extra), **chosen)
        with contextlib.suppress(KeyboardInterrupt):
            serve(backend, settings, path or socket_path(settings))

    return host


main = command()

if __name__ == "__main__":
    main()
