"""The program of docs/pipelines.md, run as its reader would."""

import json
import os
import subprocess
import sys
import time

from kafka import KafkaConsumer, KafkaProducer

from flink_llm.local.broker import Broker, create_topics
from tests.test_readme import ROOT, blocks


def test_the_documented_program_answers_and_reports(tmp_path, broker: Broker):
    [code] = [code for mark, code in blocks(ROOT / "docs" / "pipelines.md") if mark.strip() == "pipeline"]
    program = tmp_path / "pipeline.py"
    program.write_text(code)
    create_topics(broker.bootstrap_servers, ["notes:1", "notes.loud:1", "notes.failures:1"])
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    for value in (b'{"id": "1", "text": "quiet"}', b'{"id": "2", '):
        producer.send("notes", value)
    producer.flush()
    consumer = KafkaConsumer(
        "notes.loud", "notes.failures", bootstrap_servers=broker.bootstrap_servers, auto_offset_reset="earliest",
        group_id=None, isolation_level="read_committed",
    )  # fmt: skip
    environ = {**os.environ, "KAFKA": broker.bootstrap_servers, "FLINK_LOG_DIR": str(tmp_path)}
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen([sys.executable, str(program)], env=environ, stdout=said, stderr=said)
    found: dict[str, list[dict[str, object]]] = {}
    try:
        deadline = time.monotonic() + 90
        while len(found) < 2 and time.monotonic() < deadline and job.poll() is None:
            for records in consumer.poll(timeout_ms=500).values():
                for record in records:
                    found.setdefault(record.topic, []).append(json.loads(record.value))
    finally:
        job.kill()
        job.wait()
        consumer.close()
        producer.close()
    assert found.get("notes.loud") == [{"id": "1", "text": "QUIET"}], (tmp_path / "said").read_text()
    assert [failure["code"] for failure in found["notes.failures"]] == ["malformed"]
