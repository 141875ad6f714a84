"""A worker ends with its task manager.

Flink ends its Python workers when it ends itself. Killed with -9 it cannot: between the two is a shell that lives
on, and the worker would keep its models' connections, and its memory, beside the one that takes over.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable

import psutil

LOOK_S = 1.0
CONTROL = "CONTROL_API_SERVICE_DESCRIPTOR"
"""Where Flink's worker keeps the address of its task manager, in protobuf's text form."""
WORKER = "pyflink.fn_execution.beam.beam_boot"
"""The module that Flink starts a worker with."""

_watching = threading.Event()


def end_with_task_manager(
    end: Callable[[], None] = lambda: os._exit(1), look_s: float = LOOK_S
) -> psutil.Process | None:
    """Watches the Java process that this worker descends from, on a thread, from the first call on; `end` is called
    when that is gone, and at once when it was gone before. None, and nothing to watch, where this is no worker of
    its own: in a test, on a mini-cluster (which an editor or a build server may have started, and those are Java
    too)."""
    this = psutil.Process()
    if WORKER not in this.cmdline():
        return None
    java = task_manager_of(this)
    if java is None:
        if _refused(os.environ.get(CONTROL, "")):  # killed while this worker was starting
            _end("its task manager", end)
    elif not _watching.is_set():
        _watching.set()
        threading.Thread(target=_watch, args=(java, end, look_s), name="flink-llm orphan", daemon=True).start()
    return java


def _watch(java: psutil.Process, end: Callable[[], None], look_s: float) -> None:
    while _lives(java):
        time.sleep(look_s)
    _end(f"its task manager (process {java.pid})", end)


def _end(whose: str, end: Callable[[], None]) -> None:
    # Not by `logging`: Beam's handler, whose channel has broken, may hold its lock for ever.
    with contextlib.suppress(OSError):  # nobody may read it any more
        os.write(2, f"flink-llm: this Python worker ends, {whose} has ended without ending it\n".encode())
    end()


def task_manager_of(worker: psutil.Process) -> psutil.Process | None:
    """The Java process that a worker descends from, None where there is none."""
    for process in worker.parents():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            if process.name() == "java":
                return process
    return None


def _refused(control: str) -> bool:
    """Whether nobody listens at this address any more."""
    found = re.search(r'"(.+):(\d+)"', control)
    if found is None:
        return False
    try:
        socket.create_connection((found[1], int(found[2])), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
