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
from filelock import FileLock, Timeout

from flink_llm.engine.fleet import Fleet
from flink_llm.engine.model import MIXED_MB
from flink_llm.engine.peer import Peer
from flink_llm.engine.place import held_file, socket_path
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.engine.work import LINGER_S, Backend, WorkTable
from flink_llm.errors import ConfigError, FlinkLlmError
from flink_llm.garbage import spare
from flink_llm.logs import shape_logs

log = logging.getLogger(__name__)
PREDECESSOR_S = 20.0
"""How long a new host waits for the one before it to let go of the device."""


class Host:
    """Serves a backend on a Unix socket until it has had no client for `linger_s` seconds.

    Work whose client was lost goes on for `linger_work_s` seconds.
    """

    def __init__(self, backend: Backend, device: str, *, linger_s: float, linger_work_s: float = LINGER_S) -> None:
        self.table = WorkTable(backend, linger_s=linger_work_s)
        self.device = device
        self.peers: set[Peer] = set()
        self._linger_s = linger_s
        self._leave: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._settled: set[str] = set()

    async def run(self, path: Path) -> None:
        """Serves until there is nobody left, or `stop`. A socket that lies at `path` is replaced.

        At the end it is removed, unless it is another host's by then.
        """
        loop = asyncio.get_running_loop()
        _remove(path, _identity(path))
        previous = os.umask(0o077)
        try:
            server = await loop.create_unix_server(self._welcome, str(path), backlog=512)
        finally:
            os.umask(previous)
        bound = _identity(path)
        log.info("serving %s on %s", self.device, path)
        self._wait_for_nobody()
        try:
            await self._over.wait()
        finally:
            _remove(path, bound)
            server.close()
            for peer in tuple(self.peers):
                peer.close()
            await self.table.close()
        log.info("the host of %s is gone", self.device)

    def stop(self) -> None:
        """Ends `run`; clients see an outage."""
        self._over.set()

    def settle(self, sha256: str) -> None:
        """Takes what has come with a model out of the garbage collector's sight, once for each."""
        if sha256 not in self._settled:
            self._settled.add(sha256)
            spare()

    def _welcome(self) -> Peer:
        peer = Peer(self)
        self.peers.add(peer)
        return peer

    def gone(self, peer: Peer) -> None:
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
            log.info("no client for %s s", self._linger_s)
            self._over.set()


def _remove(path: Path, bound: tuple[int, int] | None) -> None:
    """Removes the socket that was bound, and no other that lies there by now."""
    if _identity(path) == bound:
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


async def _run(host: Host, path: Path) -> None:
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, host.stop)
    await host.run(path)


def serve(backend: Callable[[HostSettings], Backend], settings: HostSettings, path: Path) -> None:
    """Runs a host in this process until it is over; errors at start are one line and exit status 1.

    A lock beside the socket is held meanwhile: there is one host per socket, and a new one waits
    `PREDECESSOR_S` for one that is about to end. It works in the socket's folder, away from files that
    somebody else may write.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    shape_logs(settings.logs)
    try:
        device = resolve_device(settings.device)
        path = path.absolute()
        with FileLock(held_file(path), timeout=PREDECESSOR_S):
            host = Host(backend(settings), device, linger_s=settings.linger_s, linger_work_s=settings.linger_work_s)
            os.chdir(path.parent)
            asyncio.run(_run(host, path))
    except Timeout:
        _refuse(f"another host of {path} is alive; stop it first")
    except (FlinkLlmError, OSError) as error:
        _refuse(str(error))


def _refuse(why: str) -> None:
    click.echo(f"flink-llm host: {why}", err=True)
    sys.exit(1)


def _onnx(settings: HostSettings) -> Backend:
    from flink_llm.engine.engine import OnnxBackend  # ONNX Runtime, for the host only
    from flink_llm.engine.metrics import Metrics
    from flink_llm.engine.metrics_endpoint import MetricsEndpoint

    metrics = Metrics()
    engine = OnnxBackend(settings, lambda: os.kill(os.getpid(), signal.SIGTERM), metrics)
    if settings.metrics_port is not None:
        MetricsEndpoint(metrics.registry, settings.metrics_host, settings.metrics_port).start()
    return Fleet(engine, settings.memory_mb)


def command(
    backend: Callable[[HostSettings], Backend] = _onnx, launcher: str = "flink_llm.engine.host"
) -> click.Command:
    """The command line of a host over `backend`, for the module `launcher`."""

    @click.command(name="host")
    @click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
    @click.option("--socket", "path", type=click.Path(path_type=Path), help="Where to listen.")
    @click.option("--threads", default=0, help="CPU threads; 0 leaves it to ONNX Runtime.")
    @click.option("--slots", default=16, show_default=True, help="Generations at once.")
    @click.option("--queue", default=4096, show_default=True, help="Requests that may wait ahead of one.")
    @click.option("--cache-mb", default=64.0, show_default=True, help="Megabytes for answers of encoders; 0: none.")
    @click.option("--memory-mb", type=click.IntRange(1), help="What all models may take together; no bound if absent.")
    @click.option(
        "--mixed-mb",
        type=click.IntRange(0),
        default=MIXED_MB,
        show_default=True,
        help="Megabytes of weights up to which they are held twice, for prompts and tokens in one run; 0: never.",
    )
    @click.option(
        "--speculation",
        type=bool,
        is_flag=False,
        default=True,
        show_default=True,
        help="Guess ahead from the text, where that pays.",
    )
    @click.option("--linger", default=30.0, show_default=True, help="Seconds to stay without a client.")
    @click.option("--linger-work", default=LINGER_S, show_default=True, help="Seconds to work for a lost one.")
    @click.option("--metrics-port", type=click.IntRange(0, 65535), help="Where Prometheus reads; 0 is any free port.")
    @click.option("--metrics-host", default="127.0.0.1", show_default=True, help="The address of that port.")
    @click.option("--logs", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Of the log.")
    @click.argument("extra", nargs=-1)
    def host(path: Path | None, linger: float, linger_work: float, extra: tuple[str, ...], **chosen: Any) -> None:
        """Serve models to jobs on this machine whose `host` settings are these.

        Jobs start it themselves; this runs it in sight.
        """
        settings = HostSettings(
            linger_s=linger, linger_work_s=linger_work, launcher=launcher, launcher_args=list(extra), **chosen
        )
        try:
            where = path or socket_path(settings)
        except ConfigError as error:
            raise click.ClickException(str(error)) from error
        serve(backend, settings, where)

    return host


main = command()

if __name__ == "__main__":
    main()
