"""The environment before any Java starts."""

import os
import subprocess
import sys

import pytest

from flink_llm import environment
from flink_llm.errors import LocalError


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("s3://bucket/job", "s3://bucket/job"),
        ("file:///shared/job", "file:///shared/job"),
        ("/shared/job", "file:///shared/job"),
    ],
)
def test_a_checkpoint_folder_may_be_a_url(given, uri):
    assert environment._uri(given) == uri


def test_a_python_that_flinks_script_cannot_start_is_refused(monkeypatch):
    monkeypatch.delenv("PYFLINK_GATEWAY_PORT", raising=False)
    monkeypatch.setattr(environment.sys, "executable", "/home/a b/.venv/bin/python")
    with pytest.raises(LocalError, match="at a path with a space"):
        environment.environment()


def test_a_submission_that_a_mini_clusters_process_starts_is_one(monkeypatch):
    for name in ("FLINK_LLM_LOCAL", "_python_worker_execution_mode"):
        monkeypatch.setenv(name, "")  # back to what it was in the end
    environment.leave_loopback()
    monkeypatch.setenv("PYFLINK_GATEWAY_PORT", "1")
    assert not environment.submitted()
    asked = [sys.executable, "-c", "from flink_llm import environment; print(environment.submitted())"]
    assert subprocess.run(asked, env=os.environ, capture_output=True, text=True).stdout == "True\n"


def test_a_missing_java_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv("PYFLINK_GATEWAY_PORT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalError, match=r"^java is not installed: run `apt-get install"):
        environment.environment()


@pytest.mark.parametrize(
    ("capacity", "rate", "size"),
    [(256, None, 32), (256, 1000.0, 14), (256, 1e6, 32), (256, 1.0, 8), (40, 1.0, 5), (7, None, 1), (1, 1e6, 1)],
)
def test_a_bundle_is_an_eighth_of_the_places_and_14_ms_of_completions_or_a_few(capacity, rate, size):
    assert environment.bundle_size(capacity, rate) == size
