"""Savepoints up and down the scale while requests stream through the job, counted by a consumer of its own."""

import json
import threading
import time
from collections import Counter

import pytest
from kafka import KafkaConsumer

from tests.integration.test_savepoint import PATIENCE_S, Job, request

KEYS = 40
PER_S = 100


class Load:
    """Requests at an even rate, until it is told to stop. A context manager."""

    def __init__(self, job):
        self._job = job
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self.sent = 0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()

    def _send(self):
        while not self._over.wait(0.1):
            batch = range(self.sent, self.sent + PER_S // 10)
            self._job.send(*(request(number, f"s{number % KEYS}") for number in batch))
            self.sent = batch.stop


class Answers:
    """What a read_committed consumer has seen of the job's answers."""

    def __init__(self, job):
        self._consumer = KafkaConsumer(
            job.responses, bootstrap_servers=job.settings.bootstrap_servers, isolation_level="read_committed",
            auto_offset_reset="earliest", group_id=None,
        )  # fmt: skip
        self.seen = []

    def of(self, number):
        """Waits for the answer to that request."""
        self._until(lambda: any(answer["request_id"] == f"r{number}" for answer in self.seen))

    def until(self, count):
        """Waits until there are so many."""
        self._until(lambda: len(self.seen) >= count)

    def _until(self, there):
        deadline = time.monotonic() + PATIENCE_S
        while not there() and time.monotonic() < deadline:
            self._poll(200)

    def rest(self):
        """All there are, once no more come for two seconds."""
        while self._poll(2000):
            pass
        self._consumer.close()
        return self.seen

    def _poll(self, timeout_ms):
        found = [record for records in self._consumer.poll(timeout_ms=timeout_ms).values() for record in records]
        self.seen += [json.loads(record.value) for record in found]
        return found


def rescaled(broker, topics, folder, steps):
    job = Job(broker, topics("requests", "responses", "extra"), folder)
    (folder / "gate").touch()
    answers, savepoint = Answers(job), None
    with Load(job) as load:
        for parallelism in steps:
            running = job.start(parallelism=parallelism, savepoint=savepoint)
            answers.of(load.sent)  # and not of what was in the savepoint
            savepoint = job.stop(running)
    running = job.start(parallelism=1, savepoint=savepoint)
    answers.until(load.sent)
    found = answers.rest()
    running.cancel().result()
    ids = Counter(answer["request_id"] for answer in found)
    assert len(ids) == load.sent, f"{load.sent - len(ids)} of {load.sent} are lost"
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
