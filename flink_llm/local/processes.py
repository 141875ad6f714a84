"""Processes that outlive the command that started them, and are never mistaken for another's."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from flink_llm.errors import LocalError


class Started(Struct, frozen=True):
    """A process by id and start time: an id alone may belong to somebody else by now."""

    pid: int
    created: float

    def process(self) -> psutil.Process | None:
        """The process if it is still that one, else None."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if alive else None


def start(command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> Started:
    """Starts a command in a session of its own, its output in `log`. Raises LocalError."""
    try:
        with log.open("ab") as output:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, close_fds=True, env=environ,
            )  # fmt: skip
    except OSError as error:
        raise LocalError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    return Started(child.pid, psutil.Process(child.pid).create_time())


def stop(started: Started, patience: float = 15.0) -> None:
    """Ends a process and its session: politely, then after `patience` seconds by force."""
    process = started.process()
    if process is None:
        return
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(psutil.Error):
            process.wait(patience)
            return


def remember(started: Started, file: Path) -> None:
    """Writes a process down for a later command."""
    file.write_bytes(msgspec.json.encode(started))


def recall(file: Path) -> Started | None:
    """The process of a file if it still runs, else None."""
    try:
        started = msgspec.json.decode(file.read_bytes(), type=Started)
    except (OSError, msgspec.MsgspecError):
        return None
    return started if started.process() else None


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """Whether a loopback port can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answers(port: int) -> bool:
    """Whether somebody accepts connections on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_answers(port: int, started: Started, log: Path, patience: float, what: str) -> None:
    """Waits for a started server's port. Raises LocalError with the log's last words when it dies."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if answers(port):
            return
        if started.process() is None:
            words = log.read_text(errors="replace").strip().splitlines()
            raise LocalError(f"{what} ended at its start: {words[-1] if words else 'no output'} (log: {log})")
        time.sleep(0.1)
    stop(started)
    raise LocalError(f"{what} did not answer on port {port} within {patience:.0f} s (log: {log})")
