"""The standalone cluster: submit, savepoint, restore and a killed worker, on a real job."""

import time

import pytest
from kafka import KafkaConsumer, KafkaProducer

from flink_llm.errors import LocalError
from flink_llm.local.cluster import Cluster

JOB = """
import sys
from pyflink.common import Row
from flink_llm import environment, kafka
from flink_llm.flink_settings import FlinkSettings
from flink_llm.kafka_settings import KafkaSettings

servers, source, sink = sys.argv[1:]
settings = KafkaSettings(bootstrap_servers=servers, group=source)
env = environment.environment()
environment.configure(env, FlinkSettings(delivery="exactly_once", checkpoint_interval_ms=200))
tables = environment.tables(env)
read = kafka.source(tables, settings, [source], uid="read", start="earliest")
out = read.map(lambda row: Row(row.key, row.value.upper(), row.headers, None), kafka.OUTBOUND).uid("upper")
kafka.sink(tables, out, settings, [sink], uid="write", delivery="exactly_once")
env.execute("upper")
"""
PATIENCE_S = 90


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def send(broker, topic, *values):
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    for value in values:
        producer.send(topic, value=value)
    producer.close()


def read(broker, topic, count):
    consumer = KafkaConsumer(
        topic, bootstrap_servers=broker.bootstrap_servers, isolation_level="read_committed",
        auto_offset_reset="earliest", consumer_timeout_ms=1000,
    )  # fmt: skip
    found = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < count and time.monotonic() < deadline:
        found += [record.value for record in consumer]
    found += [record.value for record in consumer]
    consumer.close()
    return found


@pytest.mark.slow
def test_a_job_survives_a_killed_worker_and_a_savepoint(cluster, broker, topics, tmp_path):
    source, sink = topics("in", "out")
    job_file = tmp_path / "upper.py"
    job_file.write_text(JOB)
    job = cluster.submit(job_file, broker.bootstrap_servers, source, sink)
    cluster.wait_running(job)
    send(broker, source, b"a")
    assert read(broker, sink, 1) == [b"A"]
    assert cluster.kill_python_workers() == 1
    send(broker, source, b"b")
    assert read(broker, sink, 2) == [b"A", b"B"]
    savepoint = cluster.stop_with_savepoint(job, tmp_path)
    send(broker, source, b"c")
    job = cluster.submit(job_file, broker.bootstrap_servers, source, sink, savepoint=savepoint)
    cluster.wait_running(job)
    found = read(broker, sink, 3)
    cluster.savepoint(job, tmp_path)
    cluster.cancel(job)
    assert found == [b"A", b"B", b"C"]


@pytest.mark.slow
def test_a_job_that_cannot_be_built_is_refused_with_its_error(cluster, tmp_path):
    job_file = tmp_path / "broken.py"
    job_file.write_text("raise SystemExit('no such topic list')\n")
    with pytest.raises(LocalError, match=r"the job was not submitted: no such topic list"):
        cluster.submit(job_file)


@pytest.mark.slow
def test_down_leaves_no_process(tmp_path):
    cluster = Cluster(tmp_path)
    cluster.up()
    with pytest.raises(LocalError, match=r"runs in .* already"):
        Cluster(tmp_path).up()
    started = cluster._started()
    assert len(started) == 2
    cluster.down()
    assert not [one for one in started if one.process()]
