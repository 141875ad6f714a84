"""Two jobs on one standalone cluster: one host, transactions apart, and a change of parallelism while they run."""

import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter

import msgspec
import psutil
import pytest
import yaml
from kafka import KafkaConsumer, KafkaProducer

from flink_llm.errors import LocalError
from flink_llm.local.cluster import Cluster
from flink_llm.local.package import JOB
from flink_llm.testing import Script
from tests.test_readme import ROOT, blocks

PATIENCE_S = 120
PER_S = 50
ADAPTIVE = {
    "jobmanager.scheduler": "adaptive",
    "jobmanager.adaptive-scheduler.submission.resource-stabilization-timeout": "0 s",
    "jobmanager.adaptive-scheduler.executing.cooldown-after-rescaling": "0 s",
    "jobmanager.adaptive-scheduler.executing.resource-stabilization-timeout": "0 s",
}


class Job:
    """The main job under a name, with its configuration, its load and what it has answered."""

    def __init__(self, name, broker, folder, topics):
        self.name = name
        self.requests, self.responses, tokens, failures = topics
        self._servers = broker.bootstrap_servers
        scripts = folder / "scripts.json"
        scripts.write_bytes(msgspec.json.encode({"scripted": Script(first_ms=50)}))
        raw = {
            "job": "llm_inference",
            "name": name,
            "kafka": {"bootstrap_servers": self._servers, "group": "all"},
            "topics": {
                "requests": [self.requests], "responses": self.responses, "tokens": tokens, "failures": failures,
            },
            "flink": {"delivery": "exactly_once", "checkpoint_interval_ms": 500},
            "models": {"support-chat": "scripted"},
            "host": {
                "device": "cpu", "launcher": "flink_llm.testing", "launcher_args": [str(scripts)], "linger_s": 2,
                "socket_dir": str(folder / "s"),
            },
        }  # fmt: skip
        self.config = folder / f"{name}.yaml"
        self.config.write_text(yaml.safe_dump(raw))
        self.file = folder / "job.py"
        self.file.write_text(JOB.format(name="llm_inference"))
        self.sent = 0
        self.answers = Counter()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._send, self._read)]

    @property
    def arguments(self):
        """Of `flink run`."""
        python = ["-pyexec", sys.executable, "-pyclientexec", sys.executable]
        return [*python, "-py", str(self.file), "--config", str(self.config)]

    def load(self):
        for thread in self._threads:
            thread.start()

    def answered(self, more):
        """Waits for so many answers more."""
        wanted, deadline = self.answers.total() + more, time.monotonic() + PATIENCE_S
        while self.answers.total() < wanted:
            assert time.monotonic() < deadline, f"{self.name}: {self.answers.total()} of {self.sent} are answered"
            time.sleep(0.1)

    def judge(self):
        """Ends the load; every request must be answered once."""
        self._over.set()
        self._threads[0].join()
        self.answered(self.sent - self.answers.total())
        time.sleep(2)  # what is doubled may come late
        assert len(self.answers) == self.sent
        assert set(self.answers.values()) == {1}

    def _send(self):
        producer = KafkaProducer(bootstrap_servers=self._servers)
        while not self._over.wait(1 / PER_S):
            value = {"request_id": f"{self.name}-{self.sent}", "session_id": f"s{self.sent % 20}"}
            value["messages"] = [{"role": "user", "content": "hello"}]
            producer.send(self.requests, value=json.dumps(value).encode())
            self.sent += 1
        producer.close()

    def _read(self):
        consumer = KafkaConsumer(
            self.responses, bootstrap_servers=self._servers, isolation_level="read_committed",
            auto_offset_reset="earliest", group_id=None,
        )  # fmt: skip
        for record in consumer:
            self.answers[json.loads(record.value)["request_id"]] += 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), slots=4, properties=ADAPTIVE) as cluster:
        yield cluster


def hosts(folder):
    """The processes that serve models from there."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "flink_llm.testing" in line and any(str(folder) in word for word in line):
            found.append(process.pid)
    return found


def documented(mark):
    """The commands of a block of docs/operating.md."""
    [code] = [code for found, code in blocks(ROOT / "docs" / "operating.md", "sh") if found.strip() == mark]
    return [shlex.split(line) for line in code.splitlines()]


def upgraded(cluster, job, identifier, folder):
    """Stops a job and starts it again as docs/operating.md says; its new id."""
    (_, *stop), (_, _, *start) = documented("upgrade")
    words = {"SAVEPOINTS": str(folder), "JOB_ID": identifier}
    command = ["bash", str(cluster.logs.parent / "bin" / "flink"), *(words.get(word, word) for word in stop)]
    said = subprocess.run(command, capture_output=True, text=True, env=cluster._environ(), check=True).stdout
    words = {"SAVEPOINT": re.search(r"Path: (\S+)", said)[1]}
    assert start.pop() == "..."
    return cluster.run(*(words.get(word, word) for word in start), *job.arguments)


def rescale(cluster, job, parallelism):
    """As docs/operating.md says of the adaptive scheduler."""
    vertices = cluster.rest(f"/jobs/{job}")["vertices"]
    wanted = {each["id"]: {"parallelism": {"lowerBound": 1, "upperBound": parallelism}} for each in vertices}
    words = {"http://JOB_MANAGER": cluster.url, "JOB_ID": job, "REQUIREMENTS": json.dumps(wanted)}
    [command] = documented("rescale")
    for word, value in words.items():
        command = [part.replace(word, value) for part in command]
    subprocess.run([*command, "--fail", "--silent"], check=True)
    deadline = time.monotonic() + PATIENCE_S
    while {each["parallelism"] for each in cluster.rest(f"/jobs/{job}")["vertices"]} != {parallelism}:
        assert time.monotonic() < deadline, f"the job was not rescaled to {parallelism}"
        time.sleep(0.2)
    cluster.wait_running(job)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_jobs_share_a_host_and_nothing_else(cluster, broker, topics, tmp_path):
    kinds = ("requests", "responses", "tokens", "failures")
    first, second = (Job(name, broker, tmp_path, topics(*kinds, partitions=2)) for name in ("first", "second"))
    ids = [cluster.run("-d", *job.arguments) for job in (first, second)]
    for job in (first, second):
        job.load()
    for job in (first, second):
        job.answered(PER_S)
    assert len(hosts(tmp_path)) == 1
    with pytest.raises(LocalError, match=r"name: a job 'first' is on this cluster already \([0-9a-f]{32}, RUNNING\)"):
        cluster.run("-d", *first.arguments)
    rescale(cluster, ids[0], 2)
    ids[1] = upgraded(cluster, second, ids[1], tmp_path / "savepoints")  # while the first goes on
    rescale(cluster, ids[0], 1)
    assert len(hosts(tmp_path)) == 1
    second.judge()
    cluster.cancel(ids[1])
    first.answered(PER_S)
    first.judge()
    cluster.cancel(ids[0])
