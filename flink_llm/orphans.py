"""A worker ends with its task manager.

Flink ends its Python workers when it ends itself. Killed with -9 it cannot: between the two is a shell that lives
on, and the worker would keep its models' connections, and its memory, beside the one that takes over.
"""

import logging
import os
import threading
import time
from collections.abc import Callable

import psutil

log = logging.getLogger(__name__)
LOOK_S = 1.0
WORKER = "pyflink.fn_execution.beam.beam_boot"
"""The module that Flink starts a worker with."""

_watching = threading.Event()


def end_with_task_manager(
    end: Callable[[], None] = lambda: os._exit(1), look_s: float = LOOK_S
) -> psutil.Process | None:
    """Watches the Java process that this worker descends from, on a thread, from the first call on; `end` is called
    when that is gone. None, and nothing to watch, where this is no worker of its own: in a test, on a mini-cluster
    (which an editor or a build server may have started, and those are Java too)."""
    this = psutil.Process()
    if WORKER not in this.cmdline():
        return None
    java = next((process for process in this.parents() if process.name() == "java"), None)
    if java is not None and not _watching.is_set():
        _watching.set()
        threading.Thread(target=_watch, args=(java, end, look_s), name="flink-llm orphan", daemon=True).start()
    return java


def _watch(java: psutil.Process, end: Callable[[], None], look_s: float) -> None:
    while _lives(java):
        time.sleep(look_s)
    log.error("the task manager (process %d) has ended without ending its Python worker, which ends now", java.pid)
    end()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
