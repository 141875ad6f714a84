"""Whole records through a real broker and a job whose Python runs in a process of its own."""

import time

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic
from pyflink.common import Row
from pyflink.datastream.functions import ProcessFunction

from flink_llm import environment, kafka
from flink_llm.errors import ConfigError
from flink_llm.flink_settings import FlinkSettings
from flink_llm.kafka_settings import KafkaSettings

NOW = int(time.time() * 1000)
YEAR_MS = 365 * 24 * 3600 * 1000
NO_LIMIT = str(2**63 - 1)


def sent(broker, topic):
    """What the job reads, a kind of record on each line."""
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    headers = [("trace", b"\xff\x00"), ("é", b"")]
    for key, value, stamp, kept in [
        (b"whole", b"{}", NOW - 5000, headers),
        (b"tombstone", None, NOW - 4000, []),
        (None, b"\xff\xfe", NOW - 3000, []),  # no UTF-8, no key
        (b"", b"", NOW - 2000, []),
        (b"routed", b"r", NOW - 1000, []),
        (b"future", b"f", NOW + YEAR_MS, []),
    ]:
        producer.send(topic, key=key, value=value, timestamp_ms=stamp, headers=kept)
    producer.close()


def committed(broker, topic):
    consumer = KafkaConsumer(
        topic, bootstrap_servers=broker.bootstrap_servers, isolation_level="read_committed",
        auto_offset_reset="earliest", consumer_timeout_ms=1000,
    )  # fmt: skip
    found = list(consumer)
    consumer.close()
    return found


def seeing():
    """A process function that writes what Python saw into the header `seen`."""

    class Seeing(ProcessFunction):  # inside: the worker cannot import the tests
        def process_element(self, row, ctx):
            place = (row.topic, row.partition, row.offset, row.time.to_epoch_milli(), ctx.timestamp())
            headers = {**row.headers, "seen": repr((row.key, row.value, place)).encode()}
            yield Row(row.key, row.value, headers, row.headers.get("to", b"").decode() or None)

    return Seeing()


@pytest.fixture(scope="module", params=["at_least_once", "exactly_once"])
def outcome(request, broker):
    """The committed records of (default topic, other topic, topic of unstamped rows), and the input's name."""
    delivery = request.param
    source, *sinks = names = [f"{name}.{delivery}" for name in ("in", "out", "other", "plain")]
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    lenient = {"message.timestamp.after.max.ms": NO_LIMIT}
    admin.create_topics([NewTopic(name, 1, 1, topic_configs=lenient * (name == source)) for name in names])
    admin.close()
