"""A savepoint is found again although the planner's own names for the table edges have moved."""

import time

import pytest
from kafka import KafkaConsumer, KafkaProducer
from pyflink.java_gateway import get_gateway

from flink_llm import environment, kafka
from flink_llm.config import load
from flink_llm.flink_settings import FlinkSettings
from flink_llm.jobs import llm_inference
from flink_llm.kafka_settings import KafkaSettings
from tests.test_readme import ROOT

PATIENCE_S = 60


class Copier:
    """Copies one topic to others, exactly once. Each start is one more job of this client process."""

    def __init__(self, broker, topics, folder):
        self.settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, group=topics[0])
        self.source, self.sink, self.extra = topics
        self.folder = str(folder)

    def start(self, *, extra=False, savepoint=None):
        # No restarts: state that is not found again is then an error and not a loop.
        properties = {"restart-strategy.type": "none"}
        if savepoint:
            properties["execution.state-recovery.path"] = savepoint
        env = environment.environment(properties)
        flink = FlinkSettings(checkpoint_interval_ms=200, properties=properties)
        environment.configure(env, flink)
        tables = environment.tables(env)
        # Always from the earliest: only the savepoint's offsets keep a record from being read again.
        read = kafka.source(tables, self.settings, [self.source], uid="read", start="earliest")
        if extra:  # before the other one, so that all numbers after it move
            kafka.sink(tables, read, self.settings, [self.extra], uid="extra", delivery="exactly_once")
        kafka.sink(tables, read, self.settings, [self.sink], uid="write", delivery="exactly_once")
        return env.execute_async("copy")

    def stop(self, job):
        # PyFlink's own stop_with_savepoint calls a Java method that Flink 2 no longer has.
        canonical = get_gateway().jvm.org.apache.flink.core.execution.SavepointFormatType.CANONICAL
        return job._j_job_client.stopWithSavepoint(False, self.folder, canonical).get()

    def send(self, *values):
        producer = KafkaProducer(bootstrap_servers=self.settings.bootstrap_servers)
        for value in values:
            producer.send(self.source, value=value)
        producer.close()

    def wait(self, topic, count):
        """The values of a topic, once there are `count` and nothing more comes for a second."""
        consumer = KafkaConsumer(
            topic, bootstrap_servers=self.settings.bootstrap_servers, isolation_level="read_committed",
            auto_offset_reset="earliest", consumer_timeout_ms=1000,
        )  # fmt: skip
        found = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count and time.monotonic() < deadline:
            found += [record.value for record in consumer]
        found += [record.value for record in consumer]
        consumer.close()
        return found


@pytest.fixture
def copier(broker, topics, tmp_path):
    return Copier(broker, topics("in", "out", "extra"), tmp_path)


def test_a_savepoint_restores_in_a_second_job_of_one_client(copier):
    copier.send(b"1", b"2")
    job = copier.start()
    assert copier.wait(copier.sink, 2) == [b"1", b"2"]
    savepoint = copier.stop(job)
    copier.send(b"3")
    job = copier.start(savepoint=savepoint)
    found = copier.wait(copier.sink, 3)
    job.cancel().result()
    assert found == [b"1", b"2", b"3"]


def test_a_savepoint_restores_after_a_sink_was_added(copier):
    copier.send(b"1", b"2")
    job = copier.start()
    assert copier.wait(copier.sink, 2) == [b"1", b"2"]
    savepoint = copier.stop(job)
    copier.send(b"3")
    job = copier.start(savepoint=savepoint, extra=True)
    found = copier.wait(copier.sink, 3), copier.wait(copier.extra, 1)
    job.cancel().result()
    assert found == ([b"1", b"2", b"3"], [b"3"])


TO_STREAM = "{}_stream-exec-sink_external-datastream"
FROM_STREAM = "{}_stream-exec-table-source-scan_external-datastream"
CALC, SINK = "{}_stream-exec-calc_calc", "{}_stream-exec-sink_sink"
CHECKED = "{}_stream-exec-sink_constraint-validator"
MARKS = "{}_stream-exec-watermark-assigner_watermark-assigner"
EMITTED = ["{}", "{}-time", FROM_STREAM, CALC, MARKS, TO_STREAM]
WRITTEN = ["{}_time", FROM_STREAM, CALC, SINK, f"Sink Committer: {SINK}"]
OPERATORS = {
    "requests": ["{}_stream-exec-table-source-scan_kafka", CALC, CHECKED, TO_STREAM],
    "generate-key": [FROM_STREAM, CALC, CHECKED, TO_STREAM],
    "generate": ["{}"],
    **{f"generate-{name}": EMITTED for name in ("results", "partials", "failures")},
    **{name: WRITTEN for name in ("responses", "tokens", "failures")},
}


def test_the_main_jobs_operators_keep_their_names():
    """A savepoint finds its state by these: a name that changes here loses it."""
    env = environment.environment()
    settings = load(ROOT / "jobs" / "llm_inference.yaml", {"KAFKA": "127.0.0.1:1", "FLINK_LLM_STATE": "state"})
    llm_inference.build(env, settings)
    nodes = env._generate_stream_graph(clear_transformations=True).getStreamNodes().toArray()
    wanted = [name.format(uid) for uid, names in OPERATORS.items() for name in names]
    assert sorted(node.getTransformationUID() for node in nodes) == sorted(wanted)
