"""Jobs over files, for a first look: no broker, and nothing that only Kafka needs."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from flink_llm.local import demo_job
from tests import tiny

MODEL = demo_job.shipped("models") / "support-chat"


def run(cache, *arguments):
    """A command with an empty cache of jars; its standard output."""
    environ = {**os.environ, "FLINK_LLM_CACHE": str(cache)}
    command = [sys.executable, "-m", "flink_llm", *map(str, arguments)]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert not cache.exists()  # the connector was not fetched
    return ran.stdout


def test_texts_of_a_file_become_vectors(tmp_path):
    requests = [{"request_id": name, "text": text} for name, text in (("a", "one"), ("b", "one"), ("c", "two"))]
    lines = [*map(json.dumps, requests), '{"request_id": "d"}']
    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    config = {
        "job": "embedding",
        "name": "files",
        "files": {"requests": "in.jsonl", "outcomes": "out"},
        "models": {"tiny": str(tiny.encoder(tmp_path / "model", "embedding"))},
        "chat": {"model": "tiny"},
        "topics": {"tokens": None},
        "operator": {"key": "request_id"},
        "host": {"linger_s": 1},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    run(tmp_path / "cache", "run", tmp_path / "job.yaml")
    written = {"responses": [], "failures": []}
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        written[file.name.split("-")[0]] += map(json.loads, file.read_text().splitlines())
    vectors = {response["request_id"]: response["vector"] for response in written["responses"]}
    assert sorted(vectors) == ["a", "b", "c"] and len(vectors["a"]) == 16
    assert vectors["a"] == vectors["b"] != vectors["c"]
    assert [failure["code"] for failure in written["failures"]] == ["invalid"]


@pytest.mark.skipif(not (MODEL / "manifest.json").exists(), reason="the demo's model is not trained")
def test_one_question_is_answered(tmp_path):
    said = run(tmp_path / "cache", "try", "Where is order 1042?", "--state", tmp_path / "state")
    assert "1042" in said and len(said.splitlines()) == 1
