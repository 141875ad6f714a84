"""The pytest plugin, in test suites of its own: the pages about testing, and a machine without Java."""

import os
import subprocess
import sys

import pytest

from tests.test_readme import ROOT, blocks

SUITE = """
def test_needs_flink(flink_llm_env):
    pass

def test_needs_a_broker(flink_llm_topics):
    pass

def test_needs_neither(harness):
    pass
"""


def run(folder, *arguments, **environ):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rsE", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environ})


@pytest.mark.timeout(400)
def test_the_files_of_the_pages_pass_their_own_tests(tmp_path):
    files = set()
    for page in ("handlers.md", "testing.md"):
        for mark, part in blocks(ROOT / "docs" / page):
            files.add(mark.strip())
            with open(tmp_path / mark.strip(), "a") as file:
                file.write(part)
    assert files == {"triage.py", "test_triage.py", "pipeline.py", "test_pipeline.py", "test_kit.py", "test_flink.py"}
    (tmp_path / "pytest.ini").write_text("[pytest]\nflink_llm_without_java = fail\n")
    ran = run(tmp_path)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]


def test_the_degrading_handler_passes_its_own_tests(tmp_path):
    for mark, part in blocks(ROOT / "docs" / "degradation.md"):
        (tmp_path / mark.strip()).write_text(part)
    ran = run(tmp_path)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    assert "6 passed" in ran.stdout


@pytest.mark.parametrize(("choice", "said"), [("skip", "1 passed, 2 skipped"), ("fail", "1 passed, 2 errors")])
def test_without_java_a_test_is_skipped_or_fails_as_it_was_told(choice, said, tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nflink_llm_without_java = {choice}\n")
    ran = run(tmp_path, JAVA_HOME="/nowhere", PATH=str(tmp_path), FLINK_LLM_CACHE=str(tmp_path / "cache"))
    assert said in ran.stdout, ran.stdout
    assert "is not installed: run `apt-get install" in ran.stdout


def test_a_foreign_suite_pays_nothing_for_it(tmp_path):
    (tmp_path / "test_suite.py").write_text(
        "import sys\n\ndef test_it():\n"
        "    heavy = {'numpy', 'pyflink', 'kafka', 'feast', 'onnxruntime', 'flink_llm.testing'}\n"
        "    assert 'flink_llm.pytest_plugin' in sys.modules\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    ran = run(tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_PLUGINS="flink_llm.pytest_plugin")
    assert ran.returncode == 0, ran.stdout
