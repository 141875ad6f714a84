"""Work on a feature repository that is no reading: apply its definitions, fill it, describe it.

All of it blocks and is meant for a command line; Feast is imported inside functions.
"""

import contextlib
import importlib
import io
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from flink_llm.errors import ConfigError, FlinkLlmError, Outage
from flink_llm.feature_config import describe_store, quiet, registry_file, repo_config
from flink_llm.feature_settings import FeatureSettings, masked
from flink_llm.feature_store import APPLY, Store, disconnect
from flink_llm.local import demo_data


class ViewReport(Struct, frozen=True, kw_only=True):
    """A view as it stands. `ttl_s` is the greatest age in seconds, None for any.

    `rows` counts what a sqlite store holds, None for other stores; `error` is why it cannot be read.
    """

    name: str
    keys: list[str]
    features: list[str]
    ttl_s: float | None
    rows: int | None = None
    error: str | None = None


class RepoReport(Struct, frozen=True, kw_only=True):
    """A repository as a job would see it; secrets are masked."""

    online_store: str
    registry: str
    views: list[ViewReport]
    services: dict[str, list[str]]
    problems: list[str] = []
    """One line for each view that cannot be read and each service that no table can be made of."""


def apply_repo(settings: FeatureSettings) -> None:
    """Brings registry and online store to what the repository's definitions say; may be repeated.

    Views and services that are defined no more are removed, with their rows. A sqlite store is put in
    WAL mode, so that one process can write while others read. Raises ConfigError.
    """
    config = repo_config(settings)
    for file in _files(config):
        file.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        from feast import FeatureStore

        with _imported(config.repo_path) as modules:
            objects = _definitions(modules)
        store = FeatureStore(config=config)
        try:
            names = {(type(each), each.name) for each in objects}
            held = [*store.list_all_feature_views(), *store.list_feature_services()]
            gone = [each for each in held if (type(each), each.name) not in names]
            store.apply(objects, objects_to_delete=gone, partial=False)
        except Exception as error:  # Feast raises many kinds for definitions that do not fit
            reason = masked(" ".join(str(error).split()))
            raise ConfigError(f"features.repo: Feast refuses the definitions: {reason}") from error
        finally:
            disconnect(store)
    if config.online_store.type == "sqlite":
        with contextlib.closing(sqlite3.connect(config.online_store.path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")


def fill_demo(settings: FeatureSettings, *, seed: int = demo_data.DEFAULT_SEED) -> dict[str, int]:
    """Writes the demo shop's rows, valid from now, into an applied repository: view → rows written.

    Raises ConfigError, Outage.
    """
    config = repo_config(settings)
    file = registry_file(config)
    if file is not None and not file.is_file():
        raise ConfigError(f"features: there is no registry at {file}; {APPLY} makes it")
    with quiet():
        from feast import FeatureStore

        store = FeatureStore(config=config)
        frames = demo_data.frames(seed)
        try:
            lacking = frames.keys() - {view.name for view in store.list_feature_views()}
            if lacking:
                raise ConfigError(
                    f"features.repo: {settings.repo} lacks the demo's views {', '.join(sorted(lacking))}; "
                    "name the feature_repo that comes with flink-llm, or fill yours by Feast's FeatureStore.push"
                )
            for view, frame in frames.items():
                store.write_to_online_store(view, frame)
        except ConfigError:
            raise
        except Exception as error:
            where = describe_store(config)
            raise Outage(f"the feature store ({where}) cannot be written: {masked(str(error))}") from error
        finally:
            disconnect(store)
    return {view: len(frame) for view, frame in frames.items()}


def describe(settings: FeatureSettings) -> RepoReport:
    """Views, services and whether rows can be read. Raises ConfigError; Outage for a remote registry."""
    config = repo_config(settings)
    store = Store(settings)
    store.open()
    try:
        views = [_report(store, name, config) for name in store.views]
    finally:
        store.close()
    problems = [view.error for view in views if view.error is not None]
    for name in store.services:
        try:
            store.table(name)
        except ConfigError as error:
            problems.append(str(error))
    return RepoReport(
        online_store=describe_store(config),
        registry=str(registry_file(config) or config.registry.registry_type),
        views=views,
        services={name: store.views_of(name) for name in store.services},
        problems=problems,
    )


def _report(store: Store, name: str, config: Any) -> ViewReport:
    error, rows = None, None
    keys, features, ttl_s = [], [], None
    try:
        part = store.table(name).parts[0]
        keys, features, ttl_s = [given for given, _ in part.keys], list(part.features), part.max_age_s
        store.check(name)
        if config.online_store.type == "sqlite":
            rows = _count(config, name)
    except FlinkLlmError as refused:
        error = str(refused)
    return ViewReport(name=name, keys=keys, features=features, ttl_s=ttl_s, rows=rows, error=error)


def _count(config: Any, view: str) -> int | None:
    table = f"{config.project}_{view}".replace('"', '""')
    with contextlib.closing(sqlite3.connect(f"file:{config.online_store.path}?mode=ro", uri=True)) as connection:
        try:
            rows = connection.execute(f'SELECT COUNT(DISTINCT entity_key) FROM "{table}"').fetchone()
        except sqlite3.OperationalError:  # an on-demand view has no table
            return None
    return int(rows[0])


def _files(config: Any) -> list[Path]:
    file = registry_file(config)
    files = [file] if file is not None else []
    return [*files, Path(config.online_store.path)] if config.online_store.type == "sqlite" else files


@contextlib.contextmanager
def _imported(folder: Path) -> Iterator[list[Any]]:
    """The folder's modules, which may import each other by name; out of `sys.modules` afterwards."""
    names = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield [importlib.import_module(name) for name in names]
    except Exception as error:
        raise ConfigError(f"features.repo: the definitions in {folder} cannot be loaded: {error}") from error
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = bytecode
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _definitions(modules: list[Any]) -> list[Any]:
    from feast import Entity, FeatureService
    from feast.base_feature_view import BaseFeatureView
    from feast.data_source import DataSource

    kinds = (Entity, FeatureService, BaseFeatureView, DataSource)
    found = [each for module in modules for each in vars(module).values() if isinstance(each, kinds)]
    if not found:
        raise ConfigError("features.repo: the repository defines no entity, view or service")
    return list({id(each): each for each in found}.values())
