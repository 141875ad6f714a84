"""Processes that outlive the command that started them, and are never mistaken for another's."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from flink_llm.errors import LocalError

PORTS, PORTS_TRIED = (18_000, 32_000), 100
"""Below those that a system gives to connections that are opened (Linux: from 32768, others from 49152): one of those
may be taken between the moment it was found free and the moment somebody listens there."""
SAME_START_S = 2.0
"""Start times are whole seconds since a system's start, plus that: the same one may be told a second apart."""
_drawn = random.SystemRandom()  # whatever seed a test has set
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Started(Struct, frozen=True):
    """A process by id and start time: an id alone may belong to somebody else by now."""

    pid: int
    created: float

    def process(self) -> psutil.Process | None:
        """The process if it is still that one, else None."""
        try:
            process = psutil.Process(self.pid)
            alive = self.began_as(process) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if alive else None

    def began_as(self, process: psutil.Process) -> bool:
        """Whether that one was started when this one was. Raises psutil.NoSuchProcess."""
        return bool(abs(process.create_time() - self.created) < SAME_START_S)


def own_start() -> float:
    """When this process was started, in seconds since the epoch."""
    created: float = psutil.Process().create_time()
    return created


def start(
    command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None, *, file: Path | None = None
) -> Started:
    """Starts a command in a session of its own, its output in `log`. Raises LocalError.

    `file` remembers it for a later command: a signal that arrives meanwhile waits until it is written.
    """
    with _signals_later():
        try:
            with log.open("ab") as output:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    start_new_session=True, close_fds=True, env=environ,
                )  # fmt: skip
        except OSError as error:
            raise LocalError(f"{command[0]} cannot be started: {error.strerror or error}") from error
        started = Started(child.pid, psutil.Process(child.pid).create_time())
        if file is not None:
            try:
                file.write_bytes(msgspec.json.encode(started))
            except OSError as error:
                stop(started)
                raise LocalError(f"{file} cannot be written: {error.strerror or error}") from error
    return started


def stop(started: Started, patience: float = 15.0) -> None:
    """Ends a process and its group: politely, then whoever is left after `patience` seconds by force."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        members = _group(started)
        if members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(started.pid, signum)
            psutil.wait_procs(members, patience)


def _group(started: Started) -> list[psutil.Process]:
    """Who is left of its group; nobody when its id is another process's by now."""
    with contextlib.suppress(psutil.Error):
        if not started.began_as(psutil.Process(started.pid)):
            return []
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == started.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _handled() -> dict[int, Any]:
    """The signals that end a command and their handlers; those that are ignored stay so."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {signum: signal.getsignal(signum) for signum in ENDING}
    return {signum: handler for signum, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    caught: list[int] = []
    before = _handled()
    for signum in before:
        signal.signal(signum, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum in caught:
            signal.raise_signal(signum)


@contextlib.contextmanager
def cleaned_up(clean: Callable[[], None]) -> Iterator[None]:
    """Calls `clean` at the end, whatever the end is; no further signal cuts it.

    SIGINT is a KeyboardInterrupt within, SIGTERM and SIGHUP a SystemExit of 128 and their number.
    """
    before = _handled()

    def ignore() -> None:
        for signum in before:
            signal.signal(signum, signal.SIG_IGN)

    def end(signum: int, frame: object) -> None:
        ignore()
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    for signum in before:
        signal.signal(signum, end)
    try:
        try:
            yield
        finally:
            ignore()
    finally:  # a signal that arrived before `ignore` was through ends up here too, and ignores the next
        try:
            clean()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def recall(file: Path) -> Started | None:
    """The process of a file if it still runs, else None."""
    try:
        started = msgspec.json.decode(file.read_bytes(), type=Started)
    except (OSError, msgspec.MsgspecError):
        return None
    return started if started.process() else None


def free_port() -> int:
    """A loopback port that nobody listens on now, and that no connection is given by the system meanwhile.

    Raises LocalError where there is none.
    """
    for _ in range(PORTS_TRIED):
        port = _drawn.randrange(*PORTS)
        if port_is_free(port):
            return port
    raise LocalError(f"no loopback port between {PORTS[0]} and {PORTS[1]} is free: end what listens there")


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
