"""Dead letters over a real broker: listed, found again, sent once, and said where they are gone."""

import hashlib
import json
import random
import time

import pytest
import yaml
from click.testing import CliRunner
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.serializer import Serializer

from flink_llm import codec
from flink_llm.cli import main
from flink_llm.dead_letters import REPLAYED
from flink_llm.records import Failure

NOW = int(time.time() * 1000)


class Job:
    """A job's topics and configuration, and what is in them."""

    def __init__(self, broker, topics, folder):
        self.requests, self.failures = topics("requests", "failures")
        self.servers = broker.bootstrap_servers
        self.producer = KafkaProducer(bootstrap_servers=self.servers)
        raw = {
            "job": "llm_inference", "name": "chat", "models": {"support-chat": "m"},
            "kafka": {"bootstrap_servers": self.servers, "group": "chat"},
            "topics": {"requests": [self.requests], "failures": self.failures},
        }  # fmt: skip
        self.config = folder / "job.yaml"
        self.config.write_text(yaml.safe_dump(raw))

    def ask(self, number, **changes):
        """A request in its topic, and the place where it lies."""
        value = json.dumps({"request_id": f"r{number}"}).encode()
        headers = [("trace", b"\xff"), ("deadline-ms", b"1")]
        sent = self.producer.send(self.requests, key=f"s{number}".encode(), value=value, headers=headers).get(10)
        return {
            "request_id": f"r{number}", "topic": sent.topic, "partition": sent.partition, "offset": sent.offset,
            "payload_sha256": hashlib.sha256(value).hexdigest(), **changes,
        }  # fmt: skip

    def failed(self, value):
        self.producer.send(self.failures, value=value).get(10)

    def fail(self, code, failed_at=NOW, **fields):
        failure = {"key": None, "handler": "Generate", "message": "it\ndid", **fields}
        self.failed(codec.encode(Failure(code=code, failed_at=failed_at, **failure)))

    def run(self, command, *arguments):
        return CliRunner().invoke(main, ["failures", command, str(self.config), *arguments])

    def ask_nothing(self):
        class Nothing(Serializer):  # kafka-python sends no record without key and value that says so
            def serialize(self, topic, headers, data):
                return None

        producer = KafkaProducer(bootstrap_servers=self.servers, value_serializer=Nothing())
        sent = producer.send(self.requests, value="any").get(10)
        producer.close()
        return sent

    def takes(self, size):
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, self.requests, {"max.message.bytes": str(size)})])
        admin.close()

    def asked(self):
        consumer = KafkaConsumer(
            self.requests, bootstrap_servers=self.servers, auto_offset_reset="earliest", consumer_timeout_ms=1500
        )
        found = list(consumer)
        consumer.close()
        return found


@pytest.fixture
def job(broker, topics, tmp_path):
    made = Job(broker, topics, tmp_path)
    yield made
    made.producer.close()


def test_failures_are_chosen_by_code_and_time_and_counted(job):
    job.fail("deadline", NOW - 7_200_000, **job.ask(1))
    job.fail("outage", **job.ask(2))
    job.fail("outage", **job.ask(3))
    job.failed(b"no failure")
    said = job.run("list").output.splitlines()
    assert [line.split()[2:4] for line in said[:3]] == [["deadline", "r1"], ["outage", "r2"], ["outage", "r3"]]
    assert said[1].endswith(f"{job.requests}/0/1  it did")
    assert said[3:] == ["3 failures: outage 2, deadline 1", "1 records of the topic are no failures of this library"]
    assert job.run("list", "--since", "1h", "--limit", "1").output.splitlines()[1:3] == [
        "... and 1 before; --limit shows more",
        "2 failures: outage 2",
    ]
    assert "1 failures: deadline 1" in job.run("list", "--until", "1h").output
    assert "1 failures: outage 1" in job.run("list", "--request", "r3").output
    wrong = job.run("list", "--code", "deadlin")
    assert wrong.exit_code == 1 and "did you mean 'deadline'?" in wrong.output
    assert "write 30m, 2h or 3d" in job.run("list", "--since", "yesterday").output


def test_originals_are_sent_again_once_and_as_they_were(job):
    job.fail("outage", **job.ask(1))
    again = job.ask(1)
    job.fail("outage", NOW + 1, **again)  # it was sent again before, and failed again
    job.fail("deadline", **job.ask(2))
    would = job.run("replay", "--code", "outage").output.splitlines()
    assert would[-2:] == ["1 failed more than once, and count once", "1 would be sent again: add --send"]
    assert len(job.asked()) == 3
    assert job.run("replay", "--code", "outage", "--send").output.splitlines()[-1] == "1 sent again"
    before, sent = job.asked()[1], job.asked()[3:]
    assert [(one.key, one.value) for one in sent] == [(before.key, before.value)]
    assert dict(sent[0].headers) == {"trace": b"\xff", REPLAYED: f"{job.requests}/0/{again['offset']}".encode()}


def test_records_that_are_no_failures_are_counted_and_read_past(job):
    job.failed(b'{"code": "\xff\xfe"}')
    job.failed(b'{"code": "a", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    job.fail("outage", NOW * 1_000_000, **job.ask(1))  # in nanoseconds
    job.fail("outage", **job.ask(2))
    said = job.run("list", "--since", f"{'9' * 400}d").output.splitlines()
    assert said[1:] == ["1 failures: outage 1", "3 records of the topic are no failures of this library"]


def test_what_lies_in_a_topic_that_the_job_does_not_read_is_left_there(job):
    job.fail("outage", **job.ask(1))
    elsewhere = job.producer.send(job.failures, value=b"of another job").get(10)
    job.fail("outage", request_id="r1", topic=job.failures, partition=0, offset=elsewhere.offset)
    said = job.run("replay", "--send").output.splitlines()
    assert said[-2:] == ["1 skipped: of topics that are not in topics.requests", "1 sent again"]


def test_large_and_empty_originals_stop_nobody_behind_them(job):
    job.takes(5_000_000)
    empty = job.ask_nothing()
    large = b'{"text": "' + random.Random(0).randbytes(1_000_000).hex().encode() + b'"}'
    producer = KafkaProducer(bootstrap_servers=job.servers, max_request_size=5_000_000)
    sent = producer.send(job.requests, value=large).get(10)
    producer.close()
    job.fail("null_value", request_id=None, topic=empty.topic, partition=empty.partition, offset=empty.offset)
    job.fail("outage", request_id=None, topic=sent.topic, partition=sent.partition, offset=sent.offset)
    job.fail("outage", **job.ask(3))
    said = job.run("replay", "--send").output.splitlines()
    assert said[-2:] == ["1 skipped: with neither key nor value", "2 sent again"]
    assert [len(one.value or b"") for one in job.asked()] == [0, len(large), 20, len(large), 20]
    job.takes(100_000)
    said = job.run("replay", "--send")
    assert said.exit_code == 1 and "1 sent again" in said.output and "1 could not be sent again" in said.output
    assert f"{sent.topic}/{sent.partition}/{sent.offset}: not sent again" in said.output


def test_another_request_under_the_same_id_takes_nobodys_turn(job):
    job.fail("outage", **job.ask(1))
    sent = job.producer.send(job.requests, value=b"other").get(10)
    place = {"request_id": "r1", "topic": sent.topic, "partition": sent.partition, "offset": sent.offset}
    job.fail("conflicting_request", NOW + 1, **place, payload_sha256=hashlib.sha256(b"other").hexdigest())
    assert job.run("replay").output.splitlines()[-1] == "2 would be sent again: add --send"


def test_what_cannot_be_found_any_more_is_said_counted_and_skipped(job):
    there = job.ask(1)
    job.fail("outage", **there)
    job.fail("outage", **job.ask(2, offset=999))
    job.fail("outage", **job.ask(3, partition=7))
    job.fail("outage", **job.ask(4, payload_sha256="0" * 64))
    job.fail("outage", **job.ask(5, topic=None, partition=None, offset=None))
    ran = job.run("replay", "--send")
    assert ran.exit_code == 0
    assert ran.output.splitlines()[-4:] == [
        "2 skipped: expired or compacted away",
        "1 skipped: another record by now",
        "1 skipped: without a place in Kafka",
        "1 sent again",
    ]
    assert f"{job.requests}/0/999: expired or compacted away, r2 cannot be sent again" in ran.output
    assert [one.value for one in job.asked()[5:]] == [b'{"request_id": "r1"}']


def test_a_compacted_original_is_not_mistaken_for_its_neighbour(job):
    """Offsets of a compacted topic have gaps: here the gap is a transaction's marker."""
    producer = KafkaProducer(bootstrap_servers=job.servers, transactional_id=f"gap-{job.requests}")
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(job.requests, value=b"first")
    producer.commit_transaction()
    producer.close()
    first, second = job.ask(1), job.ask(2)  # the broker writes the marker when it comes to it
    marker = min({1, 2, 3} - {first["offset"], second["offset"]})
    job.fail("outage", **{**first, "offset": marker, "payload_sha256": None})
    assert job.run("replay").output.splitlines()[-2:] == [
        "1 skipped: expired or compacted away",
        "0 would be sent again: add --send",
    ]
