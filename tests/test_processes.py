import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flink_llm.errors import LocalError
from flink_llm.local import processes

STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.1; done"


def wait_for(condition, patience=20.0):
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def group(pid):
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (OSError, psutil.Error):
            continue
    return found


@pytest.mark.parametrize("leader_leaves_first", [False, True])
def test_stop_leaves_nobody_of_the_group(tmp_path, leader_leaves_first):
    log = tmp_path / "log"
    script = f'sh -c "{STUBBORN}" & {"exit 0" if leader_leaves_first else "wait"}'
    started = processes.start(["sh", "-c", script], log)
    wait_for(lambda: "ready" in log.read_text())
    if leader_leaves_first:
        wait_for(lambda: started.process() is None)
    processes.stop(started, patience=0.5)
    assert group(started.pid) == []


def test_a_process_is_remembered_before_a_signal_arrives(tmp_path):
    program = """
import os, signal
from pathlib import Path
from flink_llm.local import processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may ignore it
plain = processes.subprocess.Popen

def popen(*args, **kwargs):
    child = plain(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGINT)
    return child

processes.subprocess.Popen = popen
processes.start(["sleep", "60"], Path("log"), file=Path("file.json"))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert "KeyboardInterrupt" in ran.stderr
    started = processes.recall(tmp_path / "file.json")
    assert started is not None
    processes.stop(started)
    assert processes.recall(tmp_path / "file.json") is None


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_clean_up_is_not_cut_by_a_second_signal(tmp_path, signum, status):
    program = """
import signal, sys, time
from flink_llm.local import processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and the like hand on that they are ignored
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def clean():
    print("cleaning", flush=True)
    time.sleep(1)
    print("clean", flush=True)

try:
    with processes.cleaned_up(clean):
        print("working", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signum)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signum)
    assert process.stdout.readline() == "clean\n"
    assert process.wait(20) == status


def test_a_file_that_cannot_be_written_leaves_no_process(tmp_path: Path):
    with pytest.raises(processes.LocalError, match="cannot be written"):
        processes.start(["sleep", "61"], tmp_path / "log", file=tmp_path / "no" / "file.json")
    left = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
    assert not [one for one in left if one.cmdline()[:1] == ["sleep"]]


def test_a_free_port_is_none_that_a_connection_could_be_given():
    ports = {processes.free_port() for _ in range(50)}
    assert len(ports) > 40, "drawn, so that two who ask at once hardly get the same"
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if given.exists():
        lowest, _ = map(int, given.read_text().split())
        assert max(ports) < lowest


def test_without_a_free_port_there_is_an_error(monkeypatch):
    monkeypatch.setattr(processes, "port_is_free", lambda port: False)
    with pytest.raises(LocalError, match="no loopback port between"):
        processes.free_port()


@pytest.mark.parametrize(("told", "lives"), [(0.0, True), (1.0, True), (-1.0, True), (3.0, False)])
def test_a_start_that_is_told_a_second_apart_is_the_same(told, lives):
    own = psutil.Process()
    assert (processes.Started(own.pid, own.create_time() + told).process() is not None) is lives
