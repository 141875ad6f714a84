"""Savepoints up and down the scale while requests stream through the job, counted by a consumer of its own."""

import json
import subprocess
import sys
import time
from collections import Counter

import pytest
from kafka import KafkaConsumer, TopicPartition

from tests.integration.test_savepoint import PATIENCE_S, Job

KEYS = 40
PER_S = 100


class Load:
    """Requests at an even rate, from a process of its own. A context manager."""

    def __init__(self, job):
        self._command = [sys.executable, "-m", "tests.integration.load", job.settings.bootstrap_servers, job.requests]

    def __enter__(self):
        self._process = subprocess.Popen([*self._command, str(KEYS), str(PER_S)], stdin=subprocess.PIPE)
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        assert self._process.wait() == 0


def sent(job):
    """How many requests there are."""
    consumer = KafkaConsumer(bootstrap_servers=job.settings.bootstrap_servers)
    partition = TopicPartition(job.requests, 0)
    [count] = consumer.end_offsets([partition]).values()
    consumer.close()
    return count


class Answers:
    """A read_committed consumer of the job's answers, from the first one on. A context manager."""

    def __init__(self, job):
        self._consumer = KafkaConsumer(
            job.responses, bootstrap_servers=job.settings.bootstrap_servers, isolation_level="read_committed",
            auto_offset_reset="earliest", group_id=None,
        )  # fmt: skip
        self.seen = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._consumer.close()

    def until(self, there):
        deadline = time.monotonic() + PATIENCE_S
        while not there() and time.monotonic() < deadline:
            self.poll(200)

    def poll(self, timeout_ms):
        """How many have come."""
        found = [record for records in self._consumer.poll(timeout_ms=timeout_ms).values() for record in records]
        self.seen += [json.loads(record.value) for record in found]
        return len(found)


def wait_for(job, number):
    """Until the answer to that request is committed."""
    with Answers(job) as answers:
        answers.until(lambda: any(answer["request_id"] == f"r{number}" for answer in answers.seen))


def all_of(job, count):
    """The answers, once there are so many and no more come for two seconds."""
    with Answers(job) as answers:
        answers.until(lambda: len(answers.seen) >= count)
        while answers.poll(2000):
            pass
        return answers.seen


def rescaled(broker, topics, folder, steps):
    job = Job(broker, topics("requests", "responses", "extra"), folder)
    (folder / "gate").touch()
    savepoint = None
    with Load(job):
        for parallelism in steps:
            running = job.start(parallelism=parallelism, savepoint=savepoint)
            wait_for(job, sent(job))  # one that was not in the savepoint
            savepoint = job.stop(running)
    count = sent(job)
    running = job.start(parallelism=1, savepoint=savepoint)
    found = all_of(job, count)
    running.cancel().result()
    ids = Counter(answer["request_id"] for answer in found)
    assert len(ids) == count, f"{count - len(ids)} of {count} are lost"
    assert set(ids.values()) == {1}
    counts = sorted((answer["key"], answer["count"]) for answer in found)
    per_key = Counter(key for key, _ in counts)
    assert counts == sorted((key, n + 1) for key in per_key for n in range(per_key[key]))  # each key's state went along


@pytest.mark.timeout(240)
def test_up_and_down_through_savepoints(broker, topics, tmp_path):
    rescaled(broker, topics, tmp_path, [1, 3])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_ladder_through_savepoints(broker, topics, tmp_path):
    rescaled(broker, topics, tmp_path, [1, 2, 5, 3, 2, 1])
