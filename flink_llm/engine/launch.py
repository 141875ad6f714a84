"""Starting the model host of a device, once, however many clients want it at the same time."""

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from flink_llm.engine.place import held_file
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.errors import ConfigError, Outage
from flink_llm.local import processes

log = logging.getLogger(__name__)
PROGRESS_S = 5.0
POLL_S = 0.05
TUNABLES, LARGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
PROBE_S = 1.0
LOG_BYTES = 10 * 1024 * 1024
"""Of a log that is larger when a host is started, the host begins another; the one before is kept."""


def start_host(settings: HostSettings, path: Path) -> None:
    """Starts the host of the socket `path` unless somebody else just has; waits until it listens.

    It runs in a session of its own with a log of its own, beside the socket. Blocks for up to
    `settings.start_timeout_s`. Raises Outage when that was too short or another host will not let go,
    ConfigError with the last line of the log when the host ends, LocalError when it cannot be run.
    """
    patience = settings.start_timeout_s
    try:
        with FileLock(path.with_suffix(".lock"), timeout=patience):
            if not listening(path):
                _start(settings, path)
    except Timeout as error:
        raise Outage(f"somebody else has been starting the model host for {patience:g} s") from error


def listening(path: Path) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _start(settings: HostSettings, path: Path) -> None:
    log_file = path.with_suffix(".log")
    device = resolve_device(settings.device)
    log.info("starting the model host (%s), log in %s", device, log_file)
    began = told = time.monotonic()
    written = _turn_over(log_file)
    started = processes.start(_command(settings, device, path), log_file, in_large_pages(os.environ))
    while not listening(path):
        now = time.monotonic()
        if started.process() is None:
            if _held(path):
                raise Outage(f"another host of {path} is alive and does not listen")
            last = _last_line(log_file, written)
            raise ConfigError(f"the model host ended at its start: {last} (log: {log_file})")
        if now - began > settings.start_timeout_s:
            processes.stop(started)
            patience = settings.start_timeout_s
            raise Outage(f"the model host did not start within {patience:g} s (log: {log_file})")
        if now - told > PROGRESS_S:
            told = now
            log.info("the model host has been starting for %.0f s", now - began)
        time.sleep(POLL_S)
    log.info("the model host listens after %.1f s", time.monotonic() - began)


def _command(settings: HostSettings, device: str, path: Path) -> list[str]:
    options: dict[str, object] = {
        "device": device,
        "socket": path,
        "threads": settings.threads,
        "slots": settings.slots,
        "queue": settings.queue,
        "cache-mb": settings.cache_mb,
        "mixed-mb": settings.mixed_mb,
        "speculation": settings.speculation,
        "linger": settings.linger_s,
        "linger-work": settings.linger_work_s,
    }
    if settings.metrics_port is not None:
        options |= {"metrics-port": settings.metrics_port, "metrics-host": settings.metrics_host}
    if settings.logs != "text":
        options["logs"] = settings.logs
    if settings.memory_mb is not None:
        options["memory-mb"] = settings.memory_mb
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", settings.launcher, *words, "--", *settings.launcher_args]


def in_large_pages(given: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a process's memory lies in large pages, where the system has them on request.

    A host's is weights and caches that each step reads through: a tenth quicker so (ADR 38). glibc looks for the
    word at the start of a process (its manual, "Memory Allocation Tunables"); one that is there already stays.
    """
    tunables = [each for each in given.get(TUNABLES, "").split(":") if each]
    if not any(each.startswith(f"{LARGE_PAGES}=") for each in tunables):
        tunables.append(f"{LARGE_PAGES}=1")
    return {**given, TUNABLES: ":".join(tunables)}


def _held(path: Path) -> bool:
    """Whether a host of this socket lives."""
    try:
        with FileLock(held_file(path), timeout=0):
            return False
    except Timeout:
        return True


def _turn_over(log_file: Path) -> int:
    """Bounds the log; gives the bytes that are in it."""
    size = log_file.stat().st_size if log_file.exists() else 0
    if size <= LOG_BYTES:
        return size
    log_file.replace(log_file.with_suffix(".log.1"))
    return 0


def _last_line(log_file: Path, start: int) -> str:
    """The last line written after byte `start`."""
    with log_file.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
