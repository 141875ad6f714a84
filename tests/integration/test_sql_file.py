"""docs/sql/enrich.sql, run by Flink's SQL client on a standalone cluster with a real broker."""

import json
import time

import msgspec
from kafka import KafkaConsumer, KafkaProducer

from flink_llm.engine.settings import HostSettings
from flink_llm.local.cluster import Cluster
from flink_llm.testing import Script
from tests.test_readme import ROOT

FILE = ROOT / "docs" / "sql" / "enrich.sql"
SCRIPTS = {"support": Script(), "moods": Script(kind="classifier", labels=["angry", "calm"])}
PATIENCE_S = 120
PROMPT = "Answer in one sentence: "


def configuration(folder):
    """The file that the SQL names, with scripted models."""
    scripts = folder / "scripts.json"
    scripts.write_bytes(msgspec.json.encode(SCRIPTS))
    host = HostSettings(launcher="flink_llm.testing", launcher_args=[str(scripts)], device="cpu", linger_s=5.0,
                        socket_dir=str(folder))  # fmt: skip
    job = {"job": "llm_inference", "name": "sql", "models": {name: name for name in SCRIPTS},
           "chat": {"model": "support"}, "host": msgspec.to_builtins(host)}  # fmt: skip
    file = folder / "job.yaml"
    file.write_bytes(msgspec.json.encode(job))
    return file


def sql(broker, topics, job_file):
    source, sink = topics("tickets", "answers")
    text = FILE.read_text()
    changes = {"'localhost:9092'": f"'{broker.bootstrap_servers}'", "'tickets'": f"'{source}'",
               "'tickets.answers'": f"'{sink}'", "/etc/flink-llm/job.yaml": str(job_file),
               "'enrich-answers'": f"'{sink}'"}  # fmt: skip
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return source, sink, text


def test_the_example_file_answers_kafkas_records(broker, topics, tmp_path):
    source, sink, text = sql(broker, topics, configuration(tmp_path))
    file = tmp_path / "enrich.sql"
    file.write_text(text)
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    sent = int(time.time() * 1000) - 5000
    for value in (b'{"ticket_id": "t1", "text": "Where is it?"}', b"{", b'{"ticket_id": "t2"}'):
        producer.send(source, value=value, timestamp_ms=sent)
    producer.close()
    consumer = KafkaConsumer(sink, bootstrap_servers=broker.bootstrap_servers, auto_offset_reset="earliest",
                             group_id=None, isolation_level="read_committed")  # fmt: skip
    found = []
    with Cluster(tmp_path / "cluster") as cluster:
        [job] = cluster.sql(file)
        cluster.wait_running(job)
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < 2 and time.monotonic() < deadline:
            found += [record for records in consumer.poll(timeout_ms=500).values() for record in records]
        cluster.cancel(job)
    consumer.close()
    answers = {record.key.decode(): json.loads(record.value) for record in found}
    assert {record.timestamp for record in found} == {sent}
    assert answers["t1"]["reply"] == f"{PROMPT}Where is it?" and answers["t1"]["mood"] == "angry"
    assert answers["t1"]["error_code"] is None and answers["t1"]["model_hash"]
    assert [answers["t2"][name] for name in ("reply", "mood", "error_code")] == [None, None, None]
