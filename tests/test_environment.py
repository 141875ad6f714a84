"""The environment before any Java starts."""

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


def test_a_missing_java_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv("PYFLINK_GATEWAY_PORT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalError, match=r"^java is not installed: run `apt-get install"):
        environment.environment()
