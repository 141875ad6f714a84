"""The main job as demo, first look and benchmarks run it: folders, features, configuration."""

import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from flink_llm.errors import LocalError
from flink_llm.feature_settings import FeatureSettings

CONFIG = "llm_inference.yaml"
LINGER_S = 3.0
"""The model host leaves soon after the demo; a job's own default lets it wait for a restart."""


def shipped(name: str) -> Path:
    """A folder that comes with the library: `models`, `feature_repo`, `jobs`. Raises LocalError."""
    package = Path(__file__).parents[1]
    folders = [package / "shipped" / name, package / name]
    if (package.parent / "pyproject.toml").exists():  # a clone; in site-packages it would be anybody's
        folders.append(package.parent / name)
    for folder in folders:
        if folder.is_dir():
            return folder
    raise LocalError(f"this installation has no {name}/ folder: use a clone of the repository")


def demo_model() -> Path:
    """The demo model's folder. Raises LocalError with the command that makes it."""
    folder = shipped("models") / "support-chat"
    if not (folder / "manifest.json").exists():
        raise LocalError(f"{folder} holds no model yet: `make train-demo` trains it, about an hour on two cores")
    return folder


def prepare(state: Path) -> FeatureSettings:
    """Applies and fills the demo's feature repository below `state`, once."""
    settings = FeatureSettings(repo=str(shipped("feature_repo")), state=str(state / "features"))
    done = state / "features" / ".filled"
    if not done.exists() or time.time() - done.stat().st_mtime > 86_400:  # dates lie around today
        from flink_llm.feature_admin import apply_repo, fill_demo  # Feast is slow to import

        apply_repo(settings)
        fill_demo(settings)
        done.touch()
    return settings


def configuration(state: Path, **changes: Any) -> dict[str, Any]:
    """The main job's configuration for this machine, as plain values."""
    raw: dict[str, Any] = yaml.safe_load((shipped("jobs") / CONFIG).read_text())
    raw["models"] = changes.pop("models", None) or {"support-chat": str(demo_model())}
    raw["features"] = {"repo": str(shipped("feature_repo")), "state": str(state / "features")}
    raw.pop("kafka")
    raw["host"] = {"linger_s": LINGER_S}
    return {**raw, **changes}


def identifier() -> str:
    """A new id, of a request or of a session."""
    return uuid.uuid4().hex


def request(question: str, user: str, session: str) -> dict[str, Any]:
    """A new request of the main job, as plain values."""
    return {
        "request_id": identifier(),
        "session_id": session,
        "user_id": user,
        "messages": [{"role": "user", "content": question}],
    }


def forget(state: Path) -> None:
    """Deletes the demo's features below `state`. Raises OSError."""
    if (state / "features").exists():
        shutil.rmtree(state / "features")
