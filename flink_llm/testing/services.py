"""What stands behind `ctx` in a harness: scripted models, tables of features, and outages of both."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from typing import Any, TypeVar

from msgspec import Struct

from flink_llm.breakers import Breaker, Breakers, BreakerSettings, GuardedEngine
from flink_llm.engine.faults import fault_of
from flink_llm.engine.generation import Model
from flink_llm.engine.protocol import Loaded, Submit
from flink_llm.engine.readers import Classifier, Embedder, Reranker, Tagger
from flink_llm.engine.work import Backend, Events, Listener, WorkTable
from flink_llm.errors import ConfigError, Outage
from flink_llm.feature_keys import key_field
from flink_llm.feature_row import FeatureRow
from flink_llm.names import unknown
from flink_llm.testing.scripts import Script, ScriptedBackend
from flink_llm.watching import during

Served = TypeVar("Served", Model, Embedder, Classifier, Tagger, Reranker)
Rows = Mapping[str, Mapping[str, Any]]
START_RETRY_S = 1.0


class FakeFeatures:
    """A view of features whose key is a STRING: the key as text → values, all `age_s` seconds old when the test begins.

    `age_s` may also be one for each key, 0 for those that it leaves out. Rows age with the harness's clock;
    one older than `max_age_s` is `stale`, as with a real view. A read takes `delay_s`. `name` is what
    `FakeServices` serves it as.
    """

    def __init__(
        self,
        rows: Rows,
        join_key: str = "user_id",
        *,
        max_age_s: float | None = None,
        age_s: float | Mapping[str, float] = 0.0,
        delay_s: float = 0.0,
    ) -> None:
        self.name = ""
        self._key = key_field(join_key, "STRING")
        self._services: FakeServices | None = None
        self._probing: asyncio.Task[None] | None = None
        self._rows = {key: dict(values) for key, values in rows.items()}
        ages = age_s if isinstance(age_s, Mapping) else dict.fromkeys(rows, age_s)
        self._at = {key: -ages.get(key, 0.0) for key in rows}  # from the beginning of the clock
        self._max_age_s = max_age_s
        self._delay_s = delay_s
        self._clock: Callable[[], float] = lambda: 0.0
        self._began = 0.0

    @property
    def join_keys(self) -> tuple[str, ...]:
        """As `FeatureTable.join_keys`."""
        if self._services is not None and not self._services.started:
            raise ConfigError(f"the features {self.name} are not open yet: ask for their keys in call()")
        return (self._key.name,)

    def serve(self, name: str, services: "FakeServices") -> None:
        """It is the view of that name, and out when `services` say so."""
        self.name, self._services = name, services

    def bind(self, clock: Callable[[], float]) -> None:
        """Rows age by this clock from now on."""
        age = self._now()
        self._clock = clock
        self._began = clock() - age

    def write(self, key: str, **values: Any) -> None:
        """A newer row for this key, as of now."""
        self._rows[key] = {**self._rows.get(key, {}), **values}
        self._at[key] = self._now()

    async def get(self, **keys: Any) -> FeatureRow:
        """As `FeatureTable.get`, for one key."""
        join_key = self._key.name
        if keys.keys() != {join_key}:
            raise ConfigError(f"these features are read by {join_key}, not by {', '.join(keys) or 'nothing'}")
        key = None if keys[join_key] is None else str(self._key.convert(keys[join_key]))
        if key is not None:
            await self._read()
        names = dict.fromkeys(name for row in self._rows.values() for name in row)
        age = self._now() - self._at[key] if key is not None and key in self._rows else None
        stale = age is not None and self._max_age_s is not None and age > self._max_age_s
        found = age is not None and not stale
        there = self._rows[key] if key is not None and found else {}
        values = {join_key: key, **names, **there}
        return FeatureRow(values, age_s=age if found else None, found=found, stale=stale)

    async def _read(self) -> None:
        """What a read of the store is to a handler: it takes its time, and is refused or fails while that is out."""
        services = self._services
        if services is not None:
            services.check(self.name)
        if self._delay_s:
            with during("features", view=self.name):
                await asyncio.sleep(self._delay_s)
        down = None if services is None else services.report(self.name)
        if services is not None and down is not None:
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(services.probe(self.name), context=Context())  # of no call
            raise Outage(down)

    def _now(self) -> float:
        return self._clock() - self._began


class _Out(Struct, frozen=True):
    """An outage of `name`, of everything if None, between two moments of the clock."""

    name: str | None
    since: float
    until: float


class FakeServices:
    """`Services` of scripts and tables: `features` maps a view to its rows by key, or to `FakeFeatures`.

    `models` maps a name to its script, or to several, which its calls take in turn. `join_key` is what
    views given as rows are read by. `backend` stands for the scripts where a test has its own. `breaker` is
    each one's, as in a job.
    """

    def __init__(
        self,
        models: Mapping[str, Script | Sequence[Script]] | None = None,
        features: Mapping[str, Rows | FakeFeatures] | None = None,
        backend: Backend | None = None,
        join_key: str = "user_id",
        breaker: BreakerSettings = BreakerSettings(),  # noqa: B008 — frozen
    ) -> None:
        self.backend = backend or ScriptedBackend(models or {})
        self._tables = {
            name: rows if isinstance(rows, FakeFeatures) else FakeFeatures(rows, join_key)
            for name, rows in (features or {}).items()
        }
        self._clock: Callable[[], float] = time.monotonic
        self.breakers = self._new_breakers(breaker)
        self.started = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host: WorkTable | None = None
        self._out: list[_Out] = []
        self._connection = _Connection(self)
        self._served: list[Model | Embedder | Classifier | Tagger | Reranker] = []
        self.host_ends = True

    def model(self, name: str) -> Model:
        """See `Context.model`."""
        return self._keep(Model(self._guarded(name), name, name))

    def embedder(self, name: str) -> Embedder:
        """See `Context.embed`."""
        return self._keep(Embedder(self._guarded(name), name, name))

    def classifier(self, name: str) -> Classifier:
        """See `Context.classify`."""
        return self._keep(Classifier(self._guarded(name), name, name))

    def tagger(self, name: str) -> Tagger:
        """See `Context.tag`."""
        return self._keep(Tagger(self._guarded(name), name, name))

    def reranker(self, name: str) -> Reranker:
        """See `Context.rerank`."""
        return self._keep(Reranker(self._guarded(name), name, name))

    def features(self, name: str) -> Any:
        """See `Context.features`; also for a test that writes newer rows."""
        if name not in self._tables:
            raise ConfigError(unknown("features", name, self._tables))
        table = self._tables[name]
        table.serve(name, self)
        return table

    def check(self, view: str) -> None:
        """Raises CircuitOpen while a view is left alone."""
        self._breaker(view).check()

    def report(self, view: str) -> str | None:
        """Why a view does not answer now, None if it does: its breaker hears of it."""
        down = self.down(view)
        self._breaker(view).report(None if down is None else Outage(down))
        return down

    async def probe(self, view: str) -> None:
        """Looks for a view until it answers, as a `FeatureClient` does."""
        while True:
            await asyncio.sleep(self.breakers.settings.reset_s)
            self._breaker(view).probing()
            if self.report(view) is None:
                return

    def _breaker(self, view: str) -> Breaker:
        return self.breakers.named(f"features.{view}")

    def _new_breakers(self, settings: BreakerSettings) -> Breakers:
        return Breakers(settings, lambda: self._clock())  # noqa: PLW0108 — `bind` exchanges it

    def _guarded(self, name: str) -> GuardedEngine:
        return GuardedEngine(self._connection, self.breakers.named(f"models.{name}"))

    def _keep(self, served: Served) -> Served:
        self._served.append(served)
        return served

    @property
    def outage_since(self) -> float | None:
        """See `Services.outage_since`."""
        now = self._clock()
        since = [out.since for out in self._out if out.since <= now < out.until]
        opened = self.breakers.outage_since
        return min(since if opened is None else [*since, opened], default=None)

    def outage(self, seconds: float, of: str | None = None) -> None:
        """From now on, for `seconds`, a model or view, or all of them if None, is out; what it was saying ends."""
        now = self._clock()
        self._out.append(_Out(of, now, now + seconds))
        if self._loop is not None and isinstance(self.backend, ScriptedBackend):
            self._loop.call_soon_threadsafe(self.backend.interrupt, of, _told(of))

    def down(self, name: str) -> str | None:
        """Why a model or view does not answer now, None if it does."""
        now = self._clock()
        out = any(out.name in (None, name) and out.since <= now < out.until for out in self._out)
        return _told(name) if out else None

    def bind(self, clock: Callable[[], float]) -> None:
        """Outages and ages go by this clock. For a harness."""
        self._clock = clock
        for table in self._tables.values():
            table.bind(clock)

    async def start(self) -> None:
        """See `Services.start`."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop or self._host is None:
            self._loop, self._host = loop, WorkTable(self.backend)
        for served in self._served:
            while self.down(served.name) is not None:  # noqa: ASYNC110 — a test says how long
                await asyncio.sleep(START_RETRY_S)
            await served.load()
        self.started = True

    async def close(self) -> None:
        """See `Services.close`. What the models are saying goes on, unless `host_ends`: then it is cancelled."""
        self._connection.lose()
        self._connection = _Connection(self)
        self._served.clear()
        self.started = False
        self.breakers = self._new_breakers(self.breakers.settings)  # another worker's know of nothing that has failed
        if self.host_ends and self._host is not None:
            host, self._host, self._loop = self._host, None, None
            await host.close()


class _Connection:
    """One worker's way to the models: an `Engine`. Losing it leaves their work going, as a killed worker does."""

    def __init__(self, services: FakeServices) -> None:
        self._services = services
        self._listeners: set[Listener] = set()

    @property
    def _host(self) -> WorkTable:
        if self._services._host is None:
            raise Outage("the engine is closed")
        return self._services._host

    async def load(self, folder: str, sha256: str | None = None) -> Loaded:
        """See `Engine.load`."""
        return await self._host.load(folder, sha256)

    def submit(self, work: Submit) -> Events:
        """See `Engine.submit`."""
        events = Events()
        down = self._services.down(self._name(work))
        if down is not None:
            events.push(fault_of(Outage(down)))
            return events
        listener = self._host.join(work, events.push)
        self._listeners.add(listener)
        events.when_closed(lambda: self._leave(listener))
        return events

    async def close(self) -> None:
        """See `Engine.close`."""

    def lose(self) -> None:
        """As `WorkTable.lose`, for all who listen."""
        listeners, self._listeners = self._listeners, set()
        for listener in listeners:
            self._host.lose(listener)

    def _leave(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._listeners.discard(listener)
            self._host.leave(listener)

    def _name(self, work: Submit) -> str:
        return next((each.name for each in self._services._served if each.loaded.sha256 == work.model), "")


def _told(name: str | None) -> str:
    return f"{name or 'everything'} is out, as the test says"
