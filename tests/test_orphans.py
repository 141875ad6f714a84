"""A worker whose task manager was killed ends by itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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
    java, told = tmp_path / "java", tmp_path / "pid"
    java.symlink_to(os.path.realpath(sys.executable))
    command = [str(java), "-c", JAVA, sys.executable, WORKER, str(told), MODULE]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()})
    _until(lambda: told.exists() and told.read_text().strip())
    worker = psutil.Process(int(told.read_text()))
    time.sleep(0.3)
    assert worker.is_running(), "it lives as long as its Java does"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    _until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_a_process_that_is_no_worker_does_not_end_with_the_java_that_started_it(tmp_path):
    java, told = tmp_path / "java", tmp_path / "told"
    java.symlink_to(os.path.realpath(sys.executable))
    code = "from flink_llm.orphans import end_with_task_manager; print(end_with_task_manager())"
    command = [str(java), "-c", JAVA, sys.executable, code, str(told), "a_build"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert told.read_text().strip() == "None"


def _until(reached):
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
