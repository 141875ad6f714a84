"""A feature repository's YAML and a job's settings made into one Feast configuration."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flink_llm.errors import ConfigError
from flink_llm.feature_settings import FeatureSettings, masked

BUSY_SHARE = 0.8
"""Part of `timeout_s` that a store may wait by itself, so that its own error arrives first."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Feast's warnings out of the log, and its change of the warning filters to itself.

    Feast 0.67 logs a line at INFO for each look into its registry; WARNING is set unless the user has
    chosen a level. It sends no usage statistics any more.
    """
    feast_log = logging.getLogger("feast")
    if feast_log.level == logging.NOTSET:
        feast_log.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def repo_config(settings: FeatureSettings) -> Any:
    """Feast's RepoConfig: the repository's YAML with the settings' changes. Raises ConfigError."""
    folder = Path(settings.repo).expanduser().absolute()
    file = folder / "feature_store.yaml"
    try:
        raw = yaml.safe_load(os.path.expandvars(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"features.repo: {file} cannot be read: {reason}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"features.repo: {file} holds no settings")
    state = Path(settings.state).expanduser().absolute() if settings.state is not None else None
    raw["registry"] = _registry(raw.get("registry"), folder, state)
    raw["online_store"] = _online_store(raw.get("online_store"), settings, folder, state)
    with quiet():
        from feast.repo_config import RepoConfig

        try:
            config = RepoConfig(**raw)
            config.repo_path = folder
            _ = config.online_store
        except Exception as error:  # Feast and pydantic raise many kinds for a bad file
            reason = masked(" ".join(str(error).split()))
            raise ConfigError(f"features.repo: Feast refuses {file}: {reason}") from error
    return config


def _placed(path: str, folder: Path, state: Path | None) -> str:
    return str(state / Path(path).name) if state is not None else str(folder / path)


def _registry(raw: Any, folder: Path, state: Path | None) -> dict[str, Any]:
    registry = {"path": raw} if isinstance(raw, str) else dict(raw or {"path": "data/registry.db"})
    if registry.get("registry_type", "file") == "file" and "://" not in str(registry.get("path", "")):
        registry["path"] = _placed(str(registry.get("path", "registry.db")), folder, state)
        registry.setdefault("cache_mode", "thread")
    return registry


def _online_store(raw: Any, settings: FeatureSettings, folder: Path, state: Path | None) -> dict[str, Any]:
    own = {"type": raw} if isinstance(raw, str) else dict(raw or {})
    own.setdefault("type", "sqlite")
    chosen = dict(settings.online_store) if settings.online_store is not None else own
    if chosen.get("type") == "sqlite":
        own_path = own.get("path") if own["type"] == "sqlite" else None
        path = str(chosen.get("path") or own_path or "data/online_store.db")
        chosen["path"] = _placed(path, folder, None if Path(path).is_absolute() else state)
    if chosen.get("type") == "redis":
        text = str(chosen.get("connection_string", "localhost:6379"))
        for name in ("socket_timeout", "socket_connect_timeout"):
            if f"{name}=" not in text:
                text += f",{name}={settings.timeout_s * BUSY_SHARE:g}"
        chosen["connection_string"] = text
    return chosen


def registry_file(config: Any) -> Path | None:
    """The registry's file, None for a registry that is a service or a bucket."""
    registry = config.registry
    local = registry.registry_type == "file" and "://" not in registry.path
    return Path(registry.path) if local else None


def describe_store(config: Any) -> str:
    """The online store in a few words, without secrets."""
    store = config.online_store
    where = getattr(store, "path", None) or getattr(store, "connection_string", "")
    where = ",".join(part for part in str(where).split(",") if not part.startswith("socket_"))
    return masked(f"{store.type} {where}".strip())
