"""`flink-llm package` without Flink: what is in the folder, and what is said beside the line."""

import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from flink_llm import cli
from flink_llm.config import load
from flink_llm.engine.deployment import read_deployment
from flink_llm.engine.model import open_model_folder, write_manifest
from flink_llm.errors import FlinkLlmError, LocalError, ModelFolderError
from flink_llm.local import checks, jars
from flink_llm.local.package import pack, requirements

JOB = """
job: llm_inference
name: ${NAME}
kafka:
  bootstrap_servers: ${KAFKA}
  properties: {ssl.truststore.location: ca.pem, sasl.jaas.config: '${file:jaas}', ssl.key.password: '${PASSWORD}'}
models: {support-chat: model}
features: {repo: repo, state: '${STATE}'}
flink: {checkpoint_dir: checkpoints, parallelism: '${PARALLELISM}'}
host: {socket_dir: run}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    jar = tmp_path / "connector-2.2.jar"
    jar.touch()
    monkeypatch.setattr(jars, "connector_jar", lambda: jar)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.onnx", "tokenizer.json"):
        (model / name).write_text(name)
    fields = {"architecture": "x", "precision": "fp32", "context_length": 8, "vocab_size": 8}
    write_manifest(model, name="m", kind="decoder", **fields)
    for name in ("repo", "repo/data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    return file


def test_a_submission_is_packed_without_its_secrets(job, tmp_path):
    to = tmp_path / "packed"
    packed = pack(job, to, {})
    assert sorted(each.name for each in to.iterdir()) == [
        "config.yaml", "connector-2.2.jar", "feature_repo", "job.py", "models", "requirements.txt",
    ]  # fmt: skip
    assert [each.name for each in (to / "feature_repo").iterdir()] == ["file"]
    assert open_model_folder(to / "models" / "support-chat") == open_model_folder(tmp_path / "model")
    line = shlex.split(packed.line)
    assert line[0].endswith("flink") and line[1:3] == ["run", "-d"]
    assert all(Path(word).exists() for word in line if word.startswith("/"))
    assert not [note for note in packed.notes if "warning" in note]
    assert any("-pyarch venv.zip -pyexec venv.zip/bin/python" in note for note in packed.notes)


def test_paths_of_the_moved_configuration_lead_where_they_led(job, tmp_path):
    pack(job, tmp_path / "packed", {})
    (tmp_path / "jaas").write_text("x password='y';")
    environ = {"NAME": "n", "KAFKA": "k:1", "PASSWORD": "p", "STATE": "/state", "PARALLELISM": "2"}
    before, after = load(job, environ), load(tmp_path / "packed" / "config.yaml", environ)
    assert (after.kafka, after.flink, after.host, after.name) == (before.kafka, before.flink, before.host, "n")
    assert after.features.repo == str(tmp_path / "packed" / "feature_repo")
    assert after.models == {"support-chat": str(tmp_path / "packed" / "models" / "support-chat")}


def test_a_deployment_is_packed_with_the_folders_of_its_versions(job, tmp_path):
    other = tmp_path / "elsewhere" / "model"
    shutil.copytree(tmp_path / "model", other)
    (other / "model.onnx").write_text("another")
    write_manifest(other, name="m2", kind="decoder", architecture="x", precision="fp32", context_length=8, vocab_size=8)
    versions = "[{folder: model, weight: 9}, {folder: elsewhere/model, weight: 1, canary: {window: 20}}]"
    (tmp_path / "chat.yaml").write_text(f"versions: {versions}")
    job.write_text(JOB.replace("support-chat: model", "support-chat: chat.yaml"))
    pack(job, tmp_path / "packed", {})
    before = read_deployment(tmp_path / "chat.yaml").versions
    environ = {"NAME": "n", "KAFKA": "k:1", "PASSWORD": "p", "STATE": "/state", "PARALLELISM": "2"}
    (tmp_path / "jaas").write_text("x password='y';")
    moved = load(tmp_path / "packed" / "config.yaml", environ).models["support-chat"]
    assert Path(moved).parent == tmp_path / "packed" / "models" / "support-chat"
    after = read_deployment(moved).versions
    assert [(each.weight, each.canary) for each in after] == [(each.weight, each.canary) for each in before]
    for old, new in zip(before, after, strict=True):
        assert Path(new.folder).parent == Path(moved).parent
        assert open_model_folder(new.folder) == open_model_folder(old.folder)


def test_a_repository_that_holds_its_own_state_is_used_where_it_is(job, tmp_path):
    job.write_text(JOB.replace(", state: '${STATE}'", ""))
    packed = pack(job, tmp_path / "packed", {})
    raw = yaml.safe_load((tmp_path / "packed" / "config.yaml").read_text())
    assert raw["features"] == {"repo": str(tmp_path / "repo")}
    assert any(str(tmp_path / "repo") in note for note in packed.notes)


@pytest.mark.parametrize(("given", "told"), [("checkpoint_dir: checkpoints, ", 0), ("", 1)])
def test_checkpoints_without_a_folder_of_the_jobs_are_told_of(given, told, job, tmp_path):
    job.write_text(JOB.replace("checkpoint_dir: checkpoints, ", given))
    notes = pack(job, tmp_path / "packed", {}).notes
    assert len([note for note in notes if "flink.checkpoint_dir names a folder" in note]) == told


def test_a_secret_that_is_written_out_is_kept_private_and_named(job, tmp_path):
    job.write_text(JOB.replace("${PASSWORD}", "hunter"))
    packed = pack(job, tmp_path / "packed", {})
    assert stat.S_IMODE((tmp_path / "packed" / "config.yaml").stat().st_mode) == 0o600
    [warning] = [note for note in packed.notes if note.startswith("warning")]
    assert "kafka.properties.ssl.key.password" in warning and "${NAME}" in warning and "hunter" not in warning


def no_maven():
    raise LocalError("mvn is not installed")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda folder, monkeypatch: (folder / "model" / "extra").touch(), "is not named by the manifest"),
        (lambda folder, monkeypatch: monkeypatch.setattr(jars, "connector_jar", no_maven), "mvn is not installed"),
        (lambda folder, monkeypatch: monkeypatch.setattr(checks, "_installed", lambda name: False), "not installed"),
        (lambda folder, monkeypatch: (folder / "connector-2.2.jar").unlink(), "cannot be written"),
        (lambda folder, monkeypatch: (folder / "packed").mkdir(), "exists already"),
    ],
)
def test_what_cannot_be_packed_leaves_no_half_folder(job, tmp_path, monkeypatch, spoil, text):
    spoil(tmp_path, monkeypatch)
    with pytest.raises(FlinkLlmError, match=text):
        pack(job, tmp_path / "packed", {})
    assert not [each for each in tmp_path.glob("*packed*/*")]
    assert not list(tmp_path.glob(".packed*"))


def test_a_model_whose_place_is_not_known_is_refused(job, tmp_path):
    job.write_text(JOB.replace("support-chat: model", "support-chat: '${MODELS}/model'"))
    with pytest.raises(FlinkLlmError, match=r"MODELS"):
        pack(job, tmp_path / "packed", {})
    with pytest.raises(ModelFolderError):
        pack(job, tmp_path / "packed", {"MODELS": "/nowhere"})


def test_the_line_alone_goes_to_standard_output(job, tmp_path):
    result = CliRunner().invoke(cli.main, ["package", "--config", str(job), "--to", str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    assert str(tmp_path / "packed") in result.stderr


def test_the_flavour_is_chosen_on_the_command_line(job, tmp_path):
    line = ["package", "--config", str(job), "--to", str(tmp_path / "packed"), "--flavour", "gpu"]
    assert CliRunner().invoke(cli.main, line).exit_code == 0
    assert (tmp_path / "packed" / "requirements.txt").read_text().startswith("flink-llm[gpu]==")


@pytest.mark.parametrize(
    ("flavour", "own", "runtime"),
    [
        (None, "cpu", r"onnxruntime==[\d.]+, the one"),
        ("gpu", "gpu", r"onnxruntime-gpu>=[\d.]+, which is not installed"),
    ],
)
def test_a_cluster_with_gpus_may_be_packed_for_from_a_machine_without(job, tmp_path, flavour, own, runtime):
    packed = pack(job, tmp_path / "packed", {}, flavour)
    lines = (tmp_path / "packed" / "requirements.txt").read_text().splitlines()
    assert lines[0].startswith(f"flink-llm[{own}]==")
    [line] = [line for line in lines if line.startswith("onnxruntime")]
    [note] = [note for note in packed.notes if f"takes ONNX Runtime as {line}," in note]
    assert re.search(runtime, note)


def test_a_job_that_is_traced_takes_opentelemetry_along(job, tmp_path):
    job.write_text(f"{job.read_text().rstrip()}\ntelemetry: {{traces: 'http://c:4318/v1/traces'}}\n")
    pack(job, tmp_path / "packed", {})
    lines = (tmp_path / "packed" / "requirements.txt").read_text().splitlines()
    assert lines[0].startswith("flink-llm[cpu,otel]==")


def test_requirements_pin_all_that_runs_here():
    lines = requirements("cpu")
    assert lines[0].startswith("flink-llm[cpu]==")
    names = [line.split("==")[0] for line in lines]
    assert {"apache-flink", "apache-flink-libraries", "feast", "onnxruntime", "redis", "numpy"} <= set(names)
    assert not {"torch", "pytest", "onnxruntime-gpu"} & set(names)
    frozen = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    installed = dict(line.split("==") for line in frozen.lower().splitlines() if "==" in line)
    installed = {re.sub("[._]", "-", name): version for name, version in installed.items()}
    found = dict(line.split("==") for line in lines[1:])
    assert found == {name: installed[name] for name in found}
