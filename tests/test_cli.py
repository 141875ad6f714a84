"""The command line: what goes wrong is one line and an exit status, never a trace."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner

from flink_llm import cli
from flink_llm.engine.model import open_model_folder
from flink_llm.local import broker, demo, trial
from tests import tiny

ROOT = Path(__file__).parents[1]


def invoke(*arguments, **environ):
    return CliRunner(env=environ).invoke(cli.main, [str(each) for each in arguments])


def one_line(result):
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("flink-llm: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr.removeprefix("flink-llm: ").strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ("local", "down", "--state", "/dev/null"),
        ("local", "down", "--wipe", "--state", "/dev/null"),
        ("local", "up", "--state", "/proc/x"),
        ("local", "up", "--state", "a,b"),
        ("local", "up", "--topic", "a b"),
        ("local", "up", "--topic", "a:0"),
        ("local", "up", "--topic", ".."),
        ("local", "up", "--topic", "a.b", "--topic", "a_b"),
        ("run", "/nowhere.yaml"),
        ("package", "--config", "/nowhere.yaml", "--to", "x"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(broker.processes, "start", lambda *args, **kwargs: pytest.fail("something was started"))
    one_line(invoke(*arguments))


@pytest.mark.parametrize("command", ["apply", "fill"])
def test_features_that_cannot_be_written_are_one_line(command):
    config = ROOT / "jobs" / "llm_inference.yaml"
    assert "/proc/x" in one_line(invoke("features", command, config, KAFKA="k:1", FLINK_LLM_STATE="/proc/x"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "/full/x"), "/full/x: No space left on device"),
        (sqlite3.OperationalError("database is locked"), "sqlite: database is locked"),
        (KeyError("x"), "unexpected KeyError: 'x'; run again with -v for the trace"),
        (
            RuntimeError(
                "o1.execute.\n: java.lang.A: a\n\tat b.C(D.java:1)\nCaused by: java.lang.E: e\n\tat b.C(D.java:1)\n"
            ),
            "unexpected RuntimeError: java.lang.E: e; run again with -v for the trace",
        ),
        (
            ValueError("redis://me:hush@h:1\nsecret=hush"),
            "unexpected ValueError: redis://********@h:1 secret=********; run again with -v for the trace",
        ),
        (ConnectionError("token: hush"), "token: ********"),
    ],
)
def test_a_foreign_error_is_one_line(error, text, monkeypatch):
    def ask(*args):
        raise error

    monkeypatch.setattr(trial, "ask", ask)
    assert one_line(invoke("try", "x")) == text


def test_the_trace_is_shown_when_asked_for(monkeypatch, caplog):
    def ask(*args):
        raise KeyError("x")

    monkeypatch.setattr(trial, "ask", ask)
    caplog.set_level("INFO")
    assert invoke("-v", "try", "x").exit_code == 1
    assert "Traceback" in caplog.text


def test_an_unknown_job_is_named_with_its_nearest(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("job: llm_inferenze\nname: n\n")
    assert one_line(invoke("run", config)) == "job: unknown name 'llm_inferenze'; did you mean 'llm_inference'?"


def test_wiping_says_so_and_takes_the_demos_features_too(tmp_path):
    for name in ("kafka", "features"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    result = invoke("local", "down", "--wipe", "--state", tmp_path)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "it was not running")
    assert f"in {tmp_path}" in result.stdout
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == []


def test_a_wipe_that_fails_says_so(tmp_path, monkeypatch):
    (tmp_path / "kafka").mkdir()

    def rmtree(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(broker.shutil, "rmtree", rmtree)
    assert "Permission denied" in one_line(invoke("local", "down", "--wipe", "--state", tmp_path))


@pytest.mark.parametrize(("good", "status"), [(True, 0), (False, 1)])
def test_the_demos_status_tells_whether_all_was_answered(good, status, monkeypatch, tmp_path):
    monkeypatch.setattr(demo.Demo, "run", lambda self: good)
    assert invoke("demo", "--state", tmp_path).exit_code == status


def test_the_models_of_a_deployment_are_shown_in_a_table(tmp_path):
    tiny.encoder(tmp_path / "v1", "embedding")
    shutil.copytree(tmp_path / "v1", tmp_path / "v2")
    tiny.changed(tmp_path / "v2", name="second")
    (tmp_path / "e.yaml").write_text("versions: [{folder: v1, weight: 3}, {folder: v2, weight: 1, canary: {}}]")
    result = invoke("models", tmp_path / "e.yaml")
    head, first, second, last = result.stdout.splitlines()
    digest = open_model_folder(tmp_path / "v2").sha256[:12]
    assert head.split() == ["folder", "weight", "model", "hash", "kind", "precision", "context", "MB"]
    assert first.split()[:3] == ["v1", "3", "embedding"]
    assert second.split() == ["v2", "1", "canary", "second", digest, "embedding", "fp32", "64", "1"]
    assert last == "1 MB together, for 16 generations at once"
    assert invoke("models", tmp_path / "v1").stdout.splitlines()[1].split()[2:] == first.split()[2:]


def test_a_deployment_that_no_host_would_take_is_one_line(tmp_path):
    tiny.encoder(tmp_path / "v1", "embedding")
    tiny.encoder(tmp_path / "v2", "classifier")
    file = tmp_path / "e.yaml"
    file.write_text("versions: [{folder: v1}, {folder: v2}]")
    assert "versions[1].folder is of kind 'classifier'" in one_line(invoke("models", file))
    file.write_text("versions: [{folder: v1}, {folder: v3}]")
    said = one_line(invoke("models", file))
    assert said.startswith(f"{tmp_path}/v3 is not a model folder: No such file or directory; correct the path")
    assert (
        one_line(invoke("models", tmp_path / "f.yaml"))
        == f"{tmp_path}/f.yaml: No such file or directory; correct the path"
    )


def test_ctrl_c_is_status_130(monkeypatch, tmp_path):
    def run(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Demo, "run", run)
    assert invoke("demo", "--state", tmp_path).exit_code == 130


def test_every_command_says_what_it_does():
    def summaries(group):
        for command in group.commands.values():
            yield command.get_short_help_str(80)
            if hasattr(command, "commands"):
                yield from summaries(command)

    assert [text for text in summaries(cli.main) if not text or text.endswith("...")] == []
