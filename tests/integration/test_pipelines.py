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


def test_the_documented_embedding_runs_and_is_refused_without_its_settings(tmp_path):
    [code] = [code for mark, code in blocks(ROOT / "docs" / "pipelines.md") if mark.strip() == "embed"]
    program = tmp_path / "embed.py"
    settings = ("configuration.set_string", "env.set_buffer_timeout")
    untouched = "\n".join(line for line in code.splitlines() if not line.startswith(settings))
    for text, status in ((code, 0), (untouched, 1)):
        program.write_text(text)
        ran = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
        assert ran.returncode == status, ran.stderr[-2000:]
        if status == 0:
            assert '{"order":"o1","said":"12 is a fair price"}' in ran.stdout
        else:
            last = ran.stderr.strip().splitlines()[-1]
            assert "python.fn-execution.bundle.size is 1000, more than an eighth of capacity=256" in last
            assert last.endswith("or set it to 32 at most")


def test_the_documented_tables_are_written(tmp_path):
    [code] = [code for mark, code in blocks(ROOT / "docs" / "pipelines.md") if mark.strip() == "table"]
    program = tmp_path / "tables.py"
    program.write_text(code)
    ran = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert sorted(line for line in ran.stdout.splitlines() if line.startswith("+I")) == [
        "+I[1, 12 is a fair price]",
        "+I[2, 30 is a fair price]",
        "+I[3, handler_error: ValueError: a total is not negative]",
    ]
