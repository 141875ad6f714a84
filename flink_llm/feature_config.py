"""A feature repository's YAML and a job's settings made into one Feast configuration."""

import contextlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flink_llm.config_file import resolve
from flink_llm.errors import ConfigError
from flink_llm.feature_settings import FeatureSettings, masked
from flink_llm.names import nearest

BUSY_SHARE = 0.8
"""Part of `timeout_s` that a store may wait by itself, so that its own error arrives first."""
_ADDRESS = re.compile(r"[^\s:/@]+:([0-9]{1,5})")


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
    own = _section(raw, "online_store", "type", file, strict=settings.online_store is None)
    raw["registry"] = _registry(_section(raw, "registry", "path", file), folder, state)
    raw["online_store"] = _online_store(own, settings, folder, state)
    if raw["online_store"]["type"] == "redis":
        key = f"{file}: online_store" if settings.online_store is None else "features.online_store"
        _check_redis(raw["online_store"], f"{key}.connection_string")
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


def _section(raw: dict[str, Any], name: str, short: str, file: Path, *, strict: bool = True) -> dict[str, Any]:
    """A section of the YAML; text stands for its setting `short`. `strict` refuses a variable that is not set."""
    section = raw.get(name)
    if not isinstance(section, (str, dict, type(None))):
        kind = type(section).__name__
        raise ConfigError(f"features.repo: {file}: {name} is of type {kind}; write a mapping, or its {short} alone")
    try:
        section = resolve({name: section}, file.parent, os.environ, strict=strict)[name]
    except ConfigError as error:
        raise ConfigError(f"features.repo: {file}: {error}") from error
    return {short: section} if isinstance(section, str) else dict(section or {})


def _registry(given: dict[str, Any], folder: Path, state: Path | None) -> dict[str, Any]:
    registry = given or {"path": "data/registry.db"}
    if registry.get("registry_type", "file") == "file" and "://" not in str(registry.get("path", "")):
        registry["path"] = _placed(str(registry.get("path", "registry.db")), folder, state)
        registry.setdefault("cache_mode", "thread")
    return registry


def _online_store(own: dict[str, Any], settings: FeatureSettings, folder: Path, state: Path | None) -> dict[str, Any]:
    own.setdefault("type", "sqlite")
    chosen = dict(settings.online_store) if settings.online_store is not None else own
    chosen.setdefault("type", "sqlite")
    if chosen["type"] == "sqlite":
        own_path = own.get("path") if own["type"] == "sqlite" else None
        path = str(chosen.get("path") or own_path or "data/online_store.db")
        chosen["path"] = _placed(path, folder, None if Path(path).is_absolute() else state)
    if chosen["type"] == "redis":
        text = str(chosen.get("connection_string", "localhost:6379"))
        for name in ("socket_timeout", "socket_connect_timeout"):
            if f"{name}=" not in text:
                text += f",{name}={settings.timeout_s * BUSY_SHARE:g}"
        chosen["connection_string"] = text
    return chosen


def _check_redis(store: dict[str, Any], key: str) -> None:
    """Raises ConfigError for a connection string that Feast's client would stumble over at each read.

    Shows of a part only what is a slip of some name: the others may be the rest of a password.
    """
    from redis import Redis

    parts = store["connection_string"].split(",")
    known = inspect.signature(Redis).parameters if store.get("redis_type", "redis") == "redis" else None
    parts = parts if known is None else [part for part in parts if part]  # of which Feast makes no address there
    wrong = "it names no HOST:PORT" if all("=" in part for part in parts) else None
    for number, part in enumerate(parts, 1):
        name, is_set, _ = part.partition("=")
        if not is_set and not _is_address(part):
            wrong = f"its part {number} is neither HOST:PORT nor NAME=VALUE"
        elif is_set and known is not None and name not in known:
            near = nearest(name, known)
            hint = f"is {name!r}, perhaps for {near!r}" if near else "is nothing that redis.Redis takes"
            wrong = f"the name of its part {number} {hint}"
    if wrong is not None:
        raise ConfigError(f"{key}: {wrong}; write for example redis.example:6379,db=0,password=...")


def _is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found[1]) < 2**16


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
