"""A job that cannot run ends `flink-llm run` with one line, on a real mini-cluster and without Kafka."""

import subprocess
import sys

import yaml

from flink_llm.local.broker import Broker
from tests import tiny


def run(config, **sections):
    config.write_text(yaml.safe_dump({"job": "embedding", "name": "start", **sections}))
    ran = subprocess.run([sys.executable, "-m", "flink_llm", "run", str(config)], capture_output=True, text=True)
    return ran.returncode, [line for line in ran.stderr.splitlines() if line.startswith("flink-llm: ")], ran.stderr


def test_a_job_that_fails_tells_the_innermost_cause(tmp_path):
    (tmp_path / "in").write_text("{}\n")
    model = tiny.encoder(tmp_path / "model", "embedding")
    status, lines, said = run(
        tmp_path / "job.yaml",
        models={"tiny": str(model)},
        chat={"model": "tiny"},
        files={"requests": "in", "outcomes": "/proc/nowhere"},
        flink={"properties": {"restart-strategy.type": "none"}},
    )
    assert status == 1
    starts, failed = lines
    assert starts.startswith("flink-llm: start starts on a mini-cluster"), said
    assert failed.startswith("flink-llm: the job failed: "), said
    assert "/proc/nowhere" in failed
    assert "Traceback" not in said


def test_a_topic_that_is_not_there_is_said_before_the_start(tmp_path, broker: Broker, topics):
    [requests] = topics("requests")
    model = tiny.encoder(tmp_path / "model", "embedding")
    status, lines, said = run(
        tmp_path / "job.yaml",
        models={"tiny": str(model)},
        chat={"model": "tiny"},
        kafka={"bootstrap_servers": broker.bootstrap_servers},
        topics={"requests": [requests], "responses": "nowhere.1", "tokens": "nowhere.2", "failures": requests + ".no"},
    )
    assert status == 1, said
    [line] = lines  # it may go on: other tests' topics may have names much like these
    assert line.startswith(
        f"flink-llm: topics: nowhere.1, nowhere.2, {requests}.no not there: make them, locally by "
        f"`flink-llm local up --topic nowhere.1 --topic nowhere.2 --topic {requests}.no`"
    )
