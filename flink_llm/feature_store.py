"""Feast's side of reading features: configuration, views, one batched read, errors.

Nothing here knows of asyncio. A `Store` belongs to the thread that opens it; all others may call
`table`, which reads only what `open` has left behind. Feast is imported inside
functions, as that takes seconds.
"""

import logging
import os
import sqlite3
from collections.abc import Sequence
from typing import Any

from flink_llm.errors import ConfigError, Outage, RecordError
from flink_llm.feature_config import BUSY_SHARE, describe_store, quiet, registry_file, repo_config
from flink_llm.feature_keys import Key, KeyField, Part, StoredRow, TableSpec, absent_key, key_field
from flink_llm.feature_settings import FeatureSettings, masked
from flink_llm.names import unknown

log = logging.getLogger(__name__)

APPLY = "`flink-llm features apply CONFIG`"
FEW = 8
"""Rows among which a bad one is looked for one by one: halving them further reads more, where many are bad."""
_NO_ENTITY = "__dummy_id"
_PLAIN_VALUES = frozenset({"string_val", "int64_val", "int32_val", "double_val", "float_val", "bool_val"})


class _Stored:
    """A view whose rows are read as they lie in the store, with their event timestamps."""

    def __init__(self, view: Any, fresh_s: float | None) -> None:
        self.view = view
        self.features = [field.name for field in view.features]
        ttl_s = view.ttl.total_seconds() if view.ttl else None
        self.max_age_s = ttl_s if fresh_s is None else fresh_s
        columns = [column for column in view.entity_columns if column.name != _NO_ENTITY]
        self.keys = [key_field(column.name, column.dtype.to_value_type().name) for column in columns]
        self._entity = self.keys or [KeyField(_NO_ENTITY, "string_val")]

    def read(self, store: Any, keys: Sequence[Key]) -> list[StoredRow]:
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        names = [field.name for field in self._entity]
        kinds = [field.kind for field in self._entity]
        entities = []
        for key in keys:
            filled: list[dict[str, Any]] = [{kind: v} for kind, v in zip(kinds, key or ("",), strict=True)]
            entities.append(EntityKey(join_keys=names, entity_values=[Value(**each) for each in filled]))
        rows = store.provider.online_read(store.config, self.view, entities)
        if len(rows) != len(keys):
            raise OSError(f"{len(rows)} rows came back for {len(keys)} keys")
        return [self._row(at, values) for at, values in rows]

    def check(self, store: Any) -> None:
        """Reads what is not there: whatever that raises is of the store, and of no row."""
        self.read(store, [absent_key(self._entity)])

    def _row(self, at: Any, values: Any) -> StoredRow:
        if not values or at is None:
            return StoredRow(None, None)
        plain = {name: plain_value(values.get(name)) for name in self.features}
        seconds = at.timestamp()
        # Redis answers an absent row with unset values and a timestamp of 0.
        absent = seconds == 0 and all(value is None for value in plain.values())
        if absent:
            return StoredRow(None, None)
        return StoredRow(plain, seconds, None if self.max_age_s is None else seconds + self.max_age_s)


class _NotComputed(Exception):
    """A transformation's error, the cause of this one: that of some row."""


class _Computed:
    """An on-demand view: Feast's own get_online_features computes it from rows that are there.

    Its source rows are read beforehand: absent ones must not reach the transformation, which may not
    expect them, and their event timestamps are not in Feast's answer. A row expires with the first of
    its sources, or `fresh_s` after the oldest.
    """

    def __init__(self, view: Any, stored: dict[str, _Stored], fresh_s: float | None) -> None:
        self.name = view.name
        self.features = [field.name for field in view.features]
        self._refs = [f"{view.name}:{name}" for name in self.features]
        self._sources: list[tuple[_Stored, list[str]]] = []
        keys: dict[str, KeyField] = {}
        for projection in view.source_feature_view_projections.values():
            if projection.name not in stored:
                raise ConfigError(_lacking(f"the on-demand view {view.name}", projection.name))
            source = stored[projection.name]
            names = [projection.join_key_map.get(field.name, field.name) for field in source.keys]
            self._sources.append((source, names))
            keys.update((name, KeyField(name, f.kind)) for name, f in zip(names, source.keys, strict=True))
        for request in view.source_request_sources.values():
            keys.update((f.name, key_field(f.name, f.dtype.to_value_type().name)) for f in request.schema)
        self.keys = list(keys.values())
        ages = [source.max_age_s for source, _ in self._sources if source.max_age_s is not None]
        self.max_age_s = min(ages, default=None) if fresh_s is None else fresh_s
        self._fresh_s = fresh_s

    def read(self, store: Any, keys: Sequence[Key]) -> list[StoredRow]:
        names = [field.name for field in self.keys]
        sources: list[list[StoredRow]] = [[] for _ in keys]
        for source, wanted in self._sources:
            places = [names.index(name) for name in wanted]
            parts = [tuple(key[place] for place in places) for key in keys]
            for held, row in zip(sources, source.read(store, parts), strict=True):
                held.append(row)
        ready = [i for i, held in enumerate(sources) if all(row.at is not None for row in held)]
        rows = [StoredRow(None, None)] * len(keys)
        if ready:
            columns = {name: [keys[i][place] for i in ready] for place, name in enumerate(names)}
            for i, values in zip(ready, self._computed(store, columns, len(ready)), strict=True):
                rows[i] = self._row(values, sources[i])
        return rows

    def check(self, store: Any) -> None:
        """See `_Stored.check`; the registry is looked into, as Feast does before it computes. Computes nothing."""
        store.registry.get_on_demand_feature_view(self.name, store.project, allow_cache=True)
        for source, _ in self._sources:
            source.check(store)

    def _computed(self, store: Any, columns: dict[str, list[Any]], count: int) -> list[dict[str, Any]]:
        try:
            answer = store.get_online_features(features=self._refs, entity_rows=columns).proto
            found = dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))
            held = {name: found[name].values for name in self.features if name in found}
            return [{name: plain_value(values[n]) for name, values in held.items()} for n in range(count)]
        except Exception as error:
            if _is_of_the_store(error):
                raise
            raise _NotComputed from error

    def _row(self, values: dict[str, Any], sources: list[StoredRow]) -> StoredRow:
        at = min((row.at for row in sources if row.at is not None), default=None)
        if self._fresh_s is None:
            expires = min((row.expires for row in sources if row.expires is not None), default=None)
        else:
            expires = None if at is None else at + self._fresh_s
        return StoredRow(values, at, expires)


def plain_value(value: Any) -> Any:
    """A Feast value as Python's own; None where it is unset."""
    kind = value.WhichOneof("val") if value is not None else None
    if kind is None:
        return None
    if kind in _PLAIN_VALUES:
        return getattr(value, kind)
    from feast.type_map import feast_value_type_to_python_type

    return feast_value_type_to_python_type(value)


def disconnect(store: Any) -> None:
    """Closes the connection of a Feast store; the next use opens another.

    Feast's own `close` does nothing for sqlite and is a coroutine for Redis, of the asyncio client only.
    """
    online = store.provider.online_store
    for name in ("_conn", "_client"):
        connection = getattr(online, name, None)
        if connection is not None:
            setattr(online, name, None)
            connection.close()


def _is_of_a_row(error: Exception) -> bool:
    """Whether a row's content may have raised this: decoding and on-demand transformations do, stores do not."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    kinds = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, DecodeError, _NotComputed)
    return isinstance(error, kinds) and not isinstance(error, OSError)


def _is_of_the_store(error: Exception) -> bool:
    """Whether this comes from the store, whatever else was done with its rows."""
    from redis.exceptions import RedisError

    return isinstance(error, (OSError, MemoryError, sqlite3.Error, RedisError, Outage))


def _lacking(who: str, view: str) -> str:
    return f"{who} takes the view {view!r}, which the registry does not hold: define it in features.repo, and {APPLY}"


class Store:
    """One opened feature repository. `open` first, on the thread that will read."""

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings
        self.description = "not opened"
        self._sources: dict[str, _Stored | _Computed] = {}
        self._services: dict[str, Any] = {}
        self._store: Any = None
        self._inode: int | None = None

    def open(self) -> None:
        """Reads the registry; the online store is first met by `read`. Raises ConfigError, Outage."""
        config = repo_config(self.settings)
        file = registry_file(config)
        if file is not None and not file.is_file():
            raise ConfigError(f"features: there is no registry at {file}; {APPLY} makes it")
        with quiet():
            from feast import FeatureStore
            from feast.on_demand_feature_view import OnDemandFeatureView
            from google.protobuf.message import DecodeError

            try:
                store = FeatureStore(config=config)
                views = store.list_all_feature_views()
                services = store.list_feature_services()
            except Exception as error:
                if file is not None and isinstance(error, DecodeError):
                    raise ConfigError(f"features: {file} is no registry: delete it, and {APPLY} makes it") from error
                where, reason = masked(str(config.registry.path)), masked(" ".join(str(error).split()))
                raise Outage(f"the feature registry {where} cannot be read: {reason}") from error
        fresh = self.settings.freshness
        on_demand = [view for view in views if isinstance(view, OnDemandFeatureView)]
        stored = {v.name: _Stored(v, fresh.get(v.name)) for v in views if not isinstance(v, OnDemandFeatureView)}
        computed = {view.name: _Computed(view, stored, fresh.get(view.name)) for view in on_demand}
        self._sources = {**stored, **computed}
        self._services = {service.name: service for service in services}
        self._store = store
        self.description = describe_store(config)
        for name in fresh.keys() - self._sources.keys():
            raise ConfigError(unknown("features.freshness", name, self._sources))

    @property
    def views(self) -> list[str]:
        """Names of all views, on-demand ones too."""
        return sorted(self._sources)

    @property
    def services(self) -> list[str]:
        """Names of all feature services."""
        return sorted(self._services)

    def views_of(self, service: str) -> list[str]:
        """Names of a service's views, as the service calls them."""
        return [projection.name_to_use() for projection in self._services[service].feature_view_projections]

    def table(self, name: str) -> TableSpec:
        """What a view or a feature service of that name holds. Raises ConfigError."""
        if name in self._sources:
            source = self._sources[name]
            keys = tuple((field.name, field) for field in source.keys)
            return TableSpec.of(name, [Part(name, name, keys, tuple(source.features), source.max_age_s)])
        if name not in self._services:
            raise ConfigError(unknown("features", name, self.views + self.services))
        parts = []
        for projection in self._services[name].feature_view_projections:
            if projection.name not in self._sources:
                raise ConfigError(_lacking(f"the service {name}", projection.name))
            source = self._sources[projection.name]
            keys = tuple((projection.join_key_map.get(f.name, f.name), f) for f in source.keys)
            features = tuple(field.name for field in projection.features)
            parts.append(Part(projection.name_to_use(), projection.name, keys, features, source.max_age_s))
        return TableSpec.of(name, parts)

    def check(self, source: str) -> None:
        """Looks whether a view's rows could be read now. Raises Outage."""
        try:
            self._meet()
            self._sources[source].check(self._store)
        except Exception as error:
            raise self._outage(error) from error

    def read(self, source: str, keys: Sequence[Key], *, checked: bool = False) -> list[StoredRow | RecordError]:
        """One read of the store: a row for each key, in order.

        A row that cannot be decoded or computed is a RecordError in its place, and no other's: it is found
        by halving, once `check` has said that it is not the store. Raises Outage for whatever else the store
        raises.
        """
        try:
            self._meet()
        except Exception as error:  # of no row: none has been read
            raise self._outage(error) from error
        try:
            return list(self._sources[source].read(self._store, keys))
        except Exception as error:
            if not _is_of_a_row(error):
                raise self._outage(error) from error
            if not checked:
                self.check(source)
            if len(keys) > 1:
                size = (len(keys) + 1) // 2 if len(keys) > FEW else 1
                parts = (keys[at : at + size] for at in range(0, len(keys), size))
                return [row for part in parts for row in self.read(source, part, checked=True)]
            log.warning("a row of %s cannot be read", source, exc_info=True)
            cause = error.__cause__ if isinstance(error, _NotComputed) else error
            text = f"the row of {source} cannot be read: {type(cause).__name__}"
            return [RecordError("missing_features", text)]

    def _outage(self, error: Exception) -> Outage:
        self._inode = None
        reason = masked(" ".join(str(error).split()))
        return Outage(f"the feature store ({self.description}) cannot be read: {type(error).__name__}: {reason}")

    def _meet(self) -> None:
        """Connects to a sqlite file again when it is another one than before.

        Feast's store keeps its connection for ever, also to a deleted file, and makes a missing one.
        """
        config = self._store.config
        if config.online_store.type != "sqlite":
            return
        inode = os.stat(config.online_store.path).st_ino
        if inode == self._inode:
            return
        disconnect(self._store)
        connection = self._store.provider.online_store._get_conn(config)
        connection.execute(f"PRAGMA busy_timeout = {int(self.settings.timeout_s * BUSY_SHARE * 1000)}")
        connection.execute("PRAGMA query_only = ON")
        self._inode = inode

    def close(self) -> None:
        """Closes what the store keeps open, on the thread that read."""
        if self._store is not None:
            disconnect(self._store)
