"""Features for a handler: each call awaits its own row, the client reads them in batches.

    client = FeatureClient(settings)
    orders = client.table("order_status")
    row = await orders.get(order_id="1042")     # row["carrier"], row.found, row.age_s

Whatever waits at the same moment becomes one read of each view, on one thread of its own: the
asyncio loop never waits for the store. Feast itself is behind `flink_llm.feature_store`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from flink_llm.breakers import Breaker, Breakers, BreakerSettings
from flink_llm.errors import ConfigError, Outage
from flink_llm.feature_batches import Batch, ReaderThread, Waiter, Waiters, Waiting, answer, cancel
from flink_llm.feature_keys import Key, Part, StoredRow, TableSpec
from flink_llm.feature_row import FeatureRow
from flink_llm.feature_settings import FeatureSettings
from flink_llm.feature_store import Store
from flink_llm.names import unknown
from flink_llm.watching import during

log = logging.getLogger(__name__)

T = TypeVar("T")
CLOSE_S = 5.0
FUTURE_S = 60.0
"""How far ahead of this clock a row may be dated before that is worth a warning."""


class FeatureTable:
    """A feature view or a feature service, to be read row by row."""

    def __init__(self, client: "FeatureClient", name: str) -> None:
        self.name = name
        self._client = client
        self._spec: TableSpec | None = None
        self._warned = False

    @property
    def join_keys(self) -> tuple[str, ...]:
        """The keys that `get` is to be given. Raises ConfigError before the client has started."""
        if self._spec is None:
            raise ConfigError(f"the features {self.name} are not open yet: ask for their keys in call()")
        return self._spec.keys

    def resolve(self, store: Store) -> TableSpec:
        """Looks the table up in an opened store, once. Raises ConfigError."""
        if self._spec is None:
            self._spec = store.table(self.name)
        return self._spec

    async def get(self, **keys: str | int | bytes | None) -> FeatureRow:
        """The row of these join keys; the keys are in it too. A key given as None leaves its views absent.

        For a service, `found` says that all its views have a row, `stale` that one was too old, and
        `age_s` is that of the oldest row used.

        Raises RecordError `invalid` for a key of the wrong type, `missing_features` for a row that
        cannot be decoded or computed; ConfigError for an unknown or forgotten key; Outage while the
        store is down or slower than `timeout_s`, CircuitOpen where it has been so several times in a row.
        """
        if self._spec is None:
            await self._client.start()
        spec = self.resolve(self._client.store)
        if keys.keys() != set(spec.keys):
            raise _wrong_keys(spec, list(keys))
        asked = [(part, _key_of(part, keys)) for part in spec.parts]
        for part, key in asked:
            if key is not None:
                self._client.breaker(part.source).check()
        waiters = [self._client.enqueue(part.source, key) for part, key in asked if key is not None]
        with during("features", view=self.name):
            rows = iter(await asyncio.gather(*waiters))
        merged = [(part, key, next(rows) if key is not None else None) for part, key in asked]
        now = self._client.now()
        newest = max((row.at or 0.0 for _, _, row in merged if row is not None), default=0.0)
        if newest > now + FUTURE_S and not self._warned:
            self._warned = True
            log.warning("%s: rows are dated in the future; do clocks or time zones (TZ) differ?", self.name)
        return _merged(keys, merged, now)


def _wrong_keys(spec: TableSpec, given: list[str]) -> ConfigError:
    extra = [name for name in given if name not in spec.keys]
    if extra:
        return ConfigError(unknown(spec.name, extra[0], spec.keys))
    absent = [name for name in spec.keys if name not in given]
    return ConfigError(f"{spec.name} is read by {', '.join(spec.keys)}; {', '.join(absent)} was not given")


def _key_of(part: Part, given: Mapping[str, Any]) -> Key | None:
    if any(given[name] is None for name, _ in part.keys):
        return None
    return tuple(field.convert(given[name]) for name, field in part.keys)


def _merged(given: Mapping[str, Any], parts: list[tuple[Part, Key | None, StoredRow | None]], now: float) -> FeatureRow:
    values = dict(given)
    ages: list[float] = []
    found, stale = True, False
    for part, key, row in parts:
        if key is not None:
            values.update(zip((name for name, _ in part.keys), key, strict=True))
        age = max(0.0, now - row.at) if row is not None and row.at is not None else None
        old = row is not None and row.expires is not None and now > row.expires
        stale = stale or old
        held = row.values if row is not None and not old else None
        if held is None:
            found = False
        elif age is not None:
            ages.append(age)
        values.update((name, held.get(name) if held is not None else None) for name in part.features)
    return FeatureRow(values, age_s=max(ages, default=None), found=found, stale=stale)


def _of_nobody(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task for all, which does not pass for a part of the call that happens to start it."""
    return asyncio.create_task(work, context=Context())


class FeatureClient:
    """Reads one feature repository for one asyncio loop.

    `clock` is monotonic and dates outages, `now` gives epoch seconds and ages of rows. What has failed is probed
    every `reset_s` of the `breakers`, and what they close for is no longer read by anybody else.
    """

    def __init__(
        self,
        settings: FeatureSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        breakers: Breakers | None = None,
    ) -> None:
        self.settings = settings
        self.store = Store(settings)
        self.now = now
        self._clock = clock
        self._breakers = Breakers(BreakerSettings(), clock) if breakers is None else breakers
        self._closed = False
        self._reader = ReaderThread()
        self._tables: dict[str, FeatureTable] = {}
        self._opening: asyncio.Task[None] | None = None
        self._waiting = Waiting()
        self._serving: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._out: dict[str, float] = {}

    @property
    def outage_since(self) -> float | None:
        """`clock` when the first of those views failed that have not been read since; None while all is well."""
        return min(list(self._out.values()), default=None)  # a copy: the loop's thread may add one meanwhile

    def breaker(self, view: str) -> Breaker:
        """That of a view."""
        return self._breakers.named(f"features.{view}")

    def table(self, name: str) -> FeatureTable:
        """The view or service of that name. An unknown one is a ConfigError here, or in `start` if that
        is still to come."""
        table = self._tables.get(name) or FeatureTable(self, name)
        if self._opened():
            table.resolve(self.store)
        self._tables[name] = table
        return table

    async def start(self) -> None:
        """Loads Feast (seconds, once) and looks up the tables asked for. Raises ConfigError, Outage.

        The online store may be down: the first read will say so.
        """
        if self._opening is None or (self._opening.done() and not self._opened()):
            self._opening = _of_nobody(self._open())
        await asyncio.shield(self._opening)
        for table in self._tables.values():
            table.resolve(self.store)

    async def close(self) -> None:
        """Ends what runs, waiters included, and closes the store."""
        self._closed = True
        for task in (self._serving, self._probing, self._opening):
            if task is not None:
                task.cancel()
        cancel(self._waiting.take(1 << 30))
        closed = asyncio.wrap_future(self._reader.submit(self.store.close))
        with contextlib.suppress(Exception):
            await asyncio.wait_for(closed, CLOSE_S)
        self._reader.stop()

    def enqueue(self, source: str, key: Key) -> Waiter:
        """A future of that row; equal keys share one place in the read. RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("the feature client is closed")
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(source, key, waiter)
        if self._serving is None or self._serving.done():
            self._serving = _of_nobody(self._serve())
        return waiter

    def _opened(self) -> bool:
        done = self._opening
        return done is not None and done.done() and not done.cancelled() and done.exception() is None

    async def _open(self) -> None:
        await asyncio.wrap_future(self._reader.submit(self.store.open))

    async def _serve(self) -> None:
        await asyncio.sleep(self.settings.batch_window_ms / 1000)
        while batch := self._waiting.take(self.settings.batch_limit):
            try:
                await self._read(batch)
            finally:
                cancel(batch)

    async def _read(self, batch: Batch) -> None:
        """Reads the views one after another; each is answered by itself, whatever becomes of the others."""
        await asyncio.gather(*(self._read_view(view, keys) for view, keys in batch))

    async def _read_view(self, view: str, keys: Waiters) -> None:
        wanted = list(keys)
        rows = await self._asked(view, lambda: self.store.read(view, wanted), keys)
        for waiters, row in zip(keys.values(), rows or (), strict=rows is not None):
            answer(waiters, row)

    async def _asked(self, view: str, ask: Callable[[], T], keys: Waiters) -> T | None:
        """What the store says of a view; None where it does not, which those who wait for `keys` are told."""
        asking = self._reader.submit(ask)
        try:
            found: T = await asyncio.wait_for(asyncio.wrap_future(asking), self.settings.timeout_s)
        except TimeoutError:
            silence = f"gave no answer in {self.settings.timeout_s:g} s"
            self._failed(view, keys, Outage(f"the feature store ({self.store.description}) {silence}"))
            return None
        except Outage as error:
            self._failed(view, keys, error)
            return None
        self._recovered(view)
        return found

    def _failed(self, view: str, keys: Waiters, error: Outage) -> None:
        if view not in self._out:
            self._out[view] = self._clock()
            log.warning("%s: %s; its reads wait until it is back", view, error)
            if self._probing is None or self._probing.done():
                self._probing = _of_nobody(self._probe())
        self.breaker(view).report(error)
        for waiters in keys.values():
            answer(waiters, error)

    def _recovered(self, view: str) -> None:
        self.breaker(view).report(None)
        if view in self._out:
            log.warning("the features %s are back after %.1f s", view, self._clock() - self._out.pop(view))

    async def _probe(self) -> None:
        """Looks for what has failed until it is back, as those who were waiting may have given up.

        It reads no row of theirs: one that fails for a reason of its own would hold up all others.
        """
        while self._out:
            await asyncio.sleep(self._breakers.settings.reset_s)
            for view in self._out:
                self.breaker(view).probing()
            await asyncio.gather(*(self._asked(view, partial(self.store.check, view), {}) for view in list(self._out)))
