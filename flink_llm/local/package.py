"""What a submission to a cluster needs, in one folder: connector jar, job file, configuration, models."""

import importlib.metadata
import shlex
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from flink_llm.config import JobConfig, load
from flink_llm.errors import ConfigError, LocalError
from flink_llm.local import jars
from flink_llm.names import unknown

JOB = """\
# Submitted by `flink run -py`; runs the installed job {name!r}.
from importlib.metadata import entry_points

[job] = entry_points(group="flink_llm.jobs", name={name!r})
job.load().main()
"""


def pack(config: Path, to: Path) -> str:
    """Makes the folder `to`; gives the line that submits it. Raises ConfigError, LocalError."""
    settings = load(config)
    known = {entry.name for entry in entry_points(group="flink_llm.jobs")}
    if settings.job not in known:
        raise ConfigError(unknown("job", settings.job, known))
    if to.exists():
        raise LocalError(f"{to} exists already: choose another folder, or remove it")
    try:
        to.mkdir(parents=True)
        jar = Path(shutil.copy(jars.connector_jar(), to)).absolute()
        (to / "job.py").write_text(JOB.format(name=settings.job))
        for name, folder in settings.models.items():
            shutil.copytree(folder, to / "models" / name)
        if settings.features is not None:
            ignored = shutil.ignore_patterns("data", "__pycache__")
            shutil.copytree(settings.features.repo, to / "feature_repo", ignore=ignored)
        (to / "config.yaml").write_text(yaml.safe_dump(_moved(config, settings), sort_keys=False))
        version = importlib.metadata.version("flink-llm")
        (to / "requirements.txt").write_text(f"flink-llm[cpu]=={version}\n")
    except OSError as error:
        raise LocalError(f"{to} cannot be written: {error.strerror or error}") from error
    python = sys.executable
    line = [
        "flink", "run", "-d", "-j", str(jar), "-pyexec", python, "-pyclientexec", python,
        "-py", str((to / "job.py").absolute()), "--config", str((to / "config.yaml").absolute()),
    ]  # fmt: skip
    return shlex.join(line)


def _moved(config: Path, settings: JobConfig) -> dict[str, Any]:
    """The file as it was written, `${NAME}`s unresolved since secrets are among them, with new paths."""
    raw: dict[str, Any] = yaml.safe_load(config.read_text())
    if settings.models:
        raw["models"] = {name: f"models/{name}" for name in settings.models}
    if settings.features is not None:
        raw["features"]["repo"] = "feature_repo"
        if settings.features.state is not None and "${" not in raw["features"]["state"]:
            raw["features"]["state"] = settings.features.state
    if settings.files is not None:
        raw["files"] = {"requests": settings.files.requests, "outcomes": settings.files.outcomes}
    return raw
