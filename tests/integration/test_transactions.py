"""A job that was down for longer than its transactions: refused with one line, and resumed when told so."""

import json
import time

import pytest
from kafka import KafkaConsumer, KafkaProducer

from flink_llm import environment, kafka
from flink_llm.errors import ConfigError
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf
from flink_llm.kafka_settings import KafkaSettings
from flink_llm.udfs.async_operator import apply

TIMEOUT_MS = 6_000
PATIENCE_S = 60


def echo() -> AsyncUdf:
    class Echo(AsyncUdf):  # inside: the worker cannot import the tests
        async def call(self, request: dict, ctx):
            return request

    return Echo()


def built(broker, topics, folder, *, checkpoint=None, resume=False, tolerable=0):
    """The environment of a job, ready to run."""
    source, sink = topics
    properties = {
        "restart-strategy.type": "none",
        "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
        "execution.checkpointing.tolerable-failed-checkpoints": str(tolerable),
        **({"execution.state-recovery.path": checkpoint} if checkpoint else {}),
    }
    env = environment.environment(properties)
    flink = FlinkSettings(checkpoint_interval_ms=200, checkpoint_dir=str(folder), properties=properties)
    environment.configure(env, flink, capacity=8)
    tables = environment.tables(env)
    settings = KafkaSettings(
        bootstrap_servers=broker.bootstrap_servers, group=source, transaction_timeout_ms=TIMEOUT_MS,
        resume_after_timeout=resume,
    )  # fmt: skip
    stream = kafka.source(tables, settings, [source], uid="requests", start="earliest")
    out = apply(stream, echo(), key="session_id", uid="echo")
    kafka.sink(tables, out.results, settings, [sink], uid="responses", delivery="exactly_once")
    return env


def send(broker, topic, number):
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    producer.send(topic, value=json.dumps({"request_id": f"r{number}", "session_id": "s"}).encode())
    producer.close()


def answers(broker, topic, count):
    consumer = KafkaConsumer(
        topic, bootstrap_servers=broker.bootstrap_servers, isolation_level="read_committed",
        auto_offset_reset="earliest", consumer_timeout_ms=500,
    )  # fmt: skip
    found = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < count and time.monotonic() < deadline:
        found += [json.loads(record.value)["request_id"] for record in consumer]
    consumer.close()
    return found


@pytest.mark.timeout(240)
def test_a_checkpoint_older_than_its_transactions_is_refused_unless_told_otherwise(broker, topics, tmp_path):
    names = topics("requests", "responses")
    send(broker, names[0], 0)
    running = built(broker, names, tmp_path).execute_async("echo")
    assert answers(broker, names[1], 1) == ["r0"]
    time.sleep(1)  # for a checkpoint
    running.cancel().result()
    (checkpoint,) = [str(path) for path in tmp_path.rglob("chk-*") if (path / "_metadata").exists()]

    time.sleep(TIMEOUT_MS / 1000)
    send(broker, names[0], 1)
    refused = built(broker, names, tmp_path, checkpoint=checkpoint).execute_async("echo")
    with pytest.raises(Exception, match=r"s old, longer than kafka\.transaction_timeout_ms=6000"):
        refused.get_job_execution_result().result()

    running = built(broker, names, tmp_path, checkpoint=checkpoint, resume=True).execute_async("echo")
    assert answers(broker, names[1], 2) == ["r0", "r1"]
    running.cancel().result()


def test_checkpoints_that_may_fail_for_longer_than_a_transaction_lasts_are_refused(broker, topics, tmp_path):
    with pytest.raises(ConfigError, match=r"kafka\.transaction_timeout_ms is 6000, and 10 failed checkpoints"):
        built(broker, topics("requests", "responses"), tmp_path, tolerable=10)
