"""A worker whose task manager was killed ends by itself."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flink_llm.orphans import CONTROL
from flink_llm.orphans import WORKER as MODULE

WORKER = """
import os, sys, time
from flink_llm.orphans import end_with_task_manager
assert end_with_task_manager(look_s=0.05) is not None
print(os.getpid(), flush=True)
time.sleep(60)
"""
JAVA = """
import subprocess, sys
subprocess.run(["bash", "-c", f"{sys.argv[1]} -c '{sys.argv[2]}' {sys.argv[4]} | tee {sys.argv[3]}"])
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a process's name is its program's on Linux")
def test_a_worker_ends_when_its_java_process_was_killed(tmp_path):
    worker = _orphaned(tmp_path, WORKER)
    _until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_a_process_that_is_no_worker_does_not_end_with_the_java_that_started_it(tmp_path):
    java, told = tmp_path / "java", tmp_path / "told"
    java.symlink_to(os.path.realpath(sys.executable))
    code = "from flink_llm.orphans import end_with_task_manager; print(end_with_task_manager())"
    command = [str(java), "-c", JAVA, sys.executable, code, str(told), "a_build"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert told.read_text().strip() == "None"


HELD = """
import logging, os, sys, time
from flink_llm.orphans import end_with_task_manager
handler = logging.StreamHandler(); logging.getLogger().addHandler(handler); handler.acquire()
assert end_with_task_manager(look_s=0.05) is not None
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a process's name is its program's on Linux")
def test_it_ends_even_where_logging_hangs(tmp_path):
    worker = _orphaned(tmp_path, HELD)
    _until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("listens", [True, False])
def test_a_worker_whose_task_manager_was_gone_before_it_could_look_ends_at_once(listens):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        if listens:
            listening.listen()
        code = "from flink_llm.orphans import end_with_task_manager; end_with_task_manager(); print('goes on')"
        ran = subprocess.run(
            [sys.executable, "-c", code, MODULE], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd(), CONTROL: f'url: "127.0.0.1:{port}"\n'},
        )  # fmt: skip
    if listens:  # a task manager under a program of another name
        assert (ran.returncode, ran.stdout.strip()) == (0, "goes on")
    else:
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "its task manager has ended" in ran.stderr


def _orphaned(folder, code):
    """The worker of a killed Java that runs `code`, which prints its process id."""
    java, told = folder / "java", folder / "pid"
    java.symlink_to(os.path.realpath(sys.executable))
    command = [str(java), "-c", JAVA, sys.executable, code, str(told), MODULE]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()})
    _until(lambda: told.exists() and told.read_text().strip())
    worker = psutil.Process(int(told.read_text()))
    time.sleep(0.3)
    assert worker.is_running(), "it lives as long as its Java does"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    return worker


def _until(reached):
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
