"""What a submission to a cluster needs, in one folder: connector jar, job file, configuration, models."""

import importlib.metadata
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import Struct
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flink_llm import config_file
from flink_llm.config import JobConfig, load
from flink_llm.engine.deployment import Deployment, Version, is_deployment
from flink_llm.engine.model import MANIFEST, ModelFolder, open_model_folder
from flink_llm.errors import LocalError
from flink_llm.kafka_settings import PATHS
from flink_llm.local import checks, cluster, jars
from flink_llm.local.models import versions
from flink_llm.secrets import literal

DEPLOYMENT = "deployment.yaml"
JOB = """\
# Submitted by `flink run -py`; runs the installed job {name!r}.
from importlib.metadata import entry_points

[job] = entry_points(group="flink_llm.jobs", name={name!r})
job.load().main()
"""


class Packed(Struct, frozen=True):
    """`line` submits the job; `notes` say what is in the folder and what the cluster needs besides."""

    line: str
    notes: list[str]


def pack(config: Path, to: Path, environ: Mapping[str, str] = os.environ, flavour: str | None = None) -> Packed:
    """Makes the folder `to`, whole or not at all. Raises ConfigError, ModelFolderError, LocalError.

    `flavour` is what the task managers run the models on, "cpu" or "gpu"; None is what is installed here.

    `${NAME}` references stay in the configuration, and need not be set: the client of the submission
    replaces them.
    """
    settings = load(config, environ, strict=False)
    _check_known(config, environ)
    checks.job(settings.job)
    models = {name: versions(path) for name, path in checks.served(settings).items()}
    moved = _moved(config, settings)
    more = [] if settings.telemetry.traces is None else ["otel"]
    of_job = checks.distribution_of(settings.job)
    needed = requirements(flavour or checks.FLAVOURS[checks.flavour()], *more, job=of_job)
    jar = jars.connector_jar()
    if to.exists():
        raise LocalError(f"{to} exists already: choose another folder, or remove it")
    try:
        to.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.absolute().parent, prefix=f".{to.name}-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            shutil.copy(jar, made)
            (made / "job.py").write_text(JOB.format(name=settings.job))
            (made / "requirements.txt").write_text("".join(f"{line}\n" for line in needed))
            for name, opened in models.items():
                _copy_versions(opened, made / _packed_path(settings.models[name], name))
            if settings.features is not None and moved["features"]["repo"] == "feature_repo":
                ignored = shutil.ignore_patterns("data", "__pycache__")
                shutil.copytree(settings.features.repo, made / "feature_repo", ignore=ignored)
            secrets = list(literal(moved))
            file = made / "config.yaml"
            file.touch(0o600 if secrets else 0o666)
            file.write_text(yaml.safe_dump(moved, sort_keys=False, allow_unicode=True), encoding="utf-8")
            made.rename(to)
    except OSError as error:
        raise LocalError(f"{to} cannot be written: {error.strerror or error}") from error
    return _described(to.absolute(), jar.name, settings, secrets, needed)


def _described(to: Path, jar: str, settings: JobConfig, secrets: list[str], needed: list[str]) -> Packed:
    script = None if shutil.which("flink") else cluster.flink_script()
    of_job = checks.distribution_of(settings.job)
    yours = [needed[0], *(line for line in needed[1:] if line.startswith(f"{canonicalize_name(of_job)}=="))]
    python = sys.executable
    line = [
        script or "flink", "run", "-d", "-j", str(to / jar),
        "-pyexec", python, "-pyclientexec", python, "-py", str(to / "job.py"), "--config", str(to / "config.yaml"),
    ]  # fmt: skip
    notes = [
        f"{to} holds the connector jar, job.py, config.yaml, requirements.txt{', models' if settings.models else ''}"
        f"{', feature_repo' if (to / 'feature_repo').exists() else ''}; every task manager reads it at this path",
        f"Python must be at {python} on every task manager: python -m venv FOLDER, then FOLDER/bin/pip install -r "
        f"requirements.txt ({' and '.join(yours)} from an index or a wheel of yours); or pack that FOLDER's content "
        f"as venv.zip and submit with `-pyarch venv.zip -pyexec venv.zip/bin/python` instead",
    ]
    [runtime] = [line for line in needed if Requirement(line).name in checks.FLAVOURS]
    kept = "the one that is installed here" if "==" in runtime else "which is not installed here, and not pinned"
    notes.append(f"requirements.txt takes ONNX Runtime as {runtime}, {kept}; --flavour chooses between cpu and gpu")
    if script is None and not shutil.which("flink"):
        notes.append("there is no `flink` here: the one in the line is your cluster's")
    if settings.flink.checkpoint_dir is None:
        notes.append(
            "checkpoints lie where the cluster's execution.checkpointing.dir says, without it in the job manager, that "
            "takes 5 MB of an operator: a few large records in flight are more; flink.checkpoint_dir names a folder"
        )
    if settings.features is not None:
        where = settings.features.state or settings.features.repo
        notes.append(f"features: registry and online store ({where} if they are files) must be reachable everywhere")
    for key in secrets:
        notes.append(f"warning: {key} is written out in config.yaml: put ${{NAME}} there, and the value into $NAME")
    return Packed(shlex.join(line), notes)


def requirements(*extras: str, job: str = "flink-llm") -> list[str]:
    """Pinned lines for flink-llm with these extras, the distribution of the job, and all they need, as installed here.

    The ONNX Runtime of the other flavour cannot be installed beside this one's, and is not pinned.
    """
    pinned: dict[str, str] = {}
    loose: list[str] = []
    own = f"flink-llm[{','.join(extras)}]"
    wanted = [Requirement(own), Requirement(job)]
    seen = set()
    while wanted:
        each = wanted.pop()
        name, chosen = canonicalize_name(each.name), frozenset(each.extras)
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            if name in checks.FLAVOURS:
                loose.append(f"{name}{each.specifier}")
                continue
            raise LocalError(f"{name} is not installed: pip install '{own}'") from error
        pinned.setdefault(name, found.version)
        for line in found.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in chosen or {""}):
                wanted.append(needed)
    version = pinned.pop("flink-llm")
    lines = [*(f"{name}=={pin}" for name, pin in pinned.items()), *loose]
    return [f"{own}=={version}", *sorted(lines)]


def _packed_path(source: str, name: str) -> str:
    """Where a model folder or a deployment file is in the packed folder."""
    return f"models/{name}/{DEPLOYMENT}" if is_deployment(source) else f"models/{name}"


def _copy_versions(opened: list[tuple[Version, ModelFolder]], to: Path) -> None:
    """A model folder, or a deployment file with its folders beside it, numbered as their names may be the same."""
    if to.name != DEPLOYMENT:
        [(version, folder)] = opened
        return _copy_model(folder, Path(version.folder), to)
    placed = []
    for number, (version, folder) in enumerate(opened):
        name = f"{number}-{Path(version.folder).name}"
        _copy_model(folder, Path(version.folder), to.parent / name)
        placed.append(msgspec.structs.replace(version, folder=name))
    to.write_text(yaml.safe_dump(msgspec.to_builtins(Deployment(versions=placed)), sort_keys=False))


def _copy_model(opened: ModelFolder, source: Path, to: Path) -> None:
    """Writes the bytes that were checked, and checks what was written."""
    to.mkdir(parents=True)
    for name, data in opened.files.items():
        (to / name).write_bytes(data)
    (to / MANIFEST).write_bytes((source / MANIFEST).read_bytes())
    open_model_folder(to, opened.sha256)


def _check_known(config: Path, environ: Mapping[str, str]) -> None:
    """Raises ConfigError where a folder that is to be packed depends on a variable that is not set."""
    raw = config_file.read(config)
    packed = {"models": raw.get("models") or {}, "features": {"repo": (raw.get("features") or {}).get("repo")}}
    config_file.resolve(packed, config.absolute().parent, environ)


def _moved(config: Path, settings: JobConfig) -> dict[str, Any]:
    """The file as it was written, references unresolved since secrets are among them, with new paths.

    A path that holds a reference stays: where it leads is known on the cluster only. Without
    `features.state` a repository keeps its registry in itself, and is used where it is.
    """
    raw = config_file.moved(config_file.read(config), config.absolute().parent)
    for name in checks.served(settings):
        raw["models"][name] = _packed_path(settings.models[name], name)
    places: list[tuple[str, Any, tuple[str, ...]]] = [
        ("flink", settings.flink, ("checkpoint_dir",)),
        ("host", settings.host, ("socket_dir",)),
        ("files", settings.files, ("requests", "outcomes")),
        ("features", settings.features, ("repo", "state")),
    ]
    for section, values, names in places:
        for name in names:
            if "${" not in str((raw.get(section) or {}).get(name) or "${"):
                raw[section][name] = getattr(values, name)
    properties = raw.get("kafka", {}).get("properties", {})
    for name in [name for name in properties if name in PATHS and "${" not in str(properties[name])]:
        properties[name] = settings.kafka.properties[name]
    if settings.features is not None:
        raw["features"]["repo"] = "feature_repo" if raw["features"].get("state") else settings.features.repo
    return raw
