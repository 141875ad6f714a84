"""Models and features by the names of the configuration: what stands behind `ctx`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from msgspec import Struct

from flink_llm.breakers import Breakers, BreakerSettings, GuardedEngine
from flink_llm.engine.client import open_engine
from flink_llm.engine.generation import Model
from flink_llm.engine.protocol import Engine
from flink_llm.engine.readers import Classifier, Embedder, Reranker, Tagger
from flink_llm.engine.settings import HostSettings
from flink_llm.errors import ConfigError, Outage
from flink_llm.feature_settings import FeatureSettings
from flink_llm.features import FeatureClient, FeatureTable
from flink_llm.handler import Services
from flink_llm.names import unknown

log = logging.getLogger(__name__)
Served = TypeVar("Served", Model, Embedder, Classifier, Tagger, Reranker)
START_RETRY_S = 1.0
TOLD_EVERY = 15
"""Of the failed attempts to reach a part at the start, every how many is a warning in the log."""


class ServiceSettings(Struct, frozen=True, kw_only=True):
    """`models` maps a name to its folder; `features` is None for a job without any. `breaker` is each one's."""

    models: dict[str, str] = {}
    host: HostSettings = HostSettings()
    features: FeatureSettings | None = None
    breaker: BreakerSettings = BreakerSettings()


def open_services(settings: ServiceSettings | Callable[[], Services] | None) -> Services:
    """The services of one subtask; nothing is connected before `start`."""
    if callable(settings):
        return settings()
    return RealServices(settings or ServiceSettings())


class RealServices:
    """The `Services` of a job: an engine for its models, a client for its features."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self.breakers = Breakers(settings.breaker)
        self._engine: Engine | None = None
        self._served: dict[tuple[type, str], Any] = {}
        self._features: FeatureClient | None = None

    def model(self, name: str) -> Model:
        """See `Context.model`."""
        return self._serve(Model, name)

    def embedder(self, name: str) -> Embedder:
        """See `Context.embed`."""
        return self._serve(Embedder, name)

    def classifier(self, name: str) -> Classifier:
        """See `Context.classify`."""
        return self._serve(Classifier, name)

    def tagger(self, name: str) -> Tagger:
        """See `Context.tag`."""
        return self._serve(Tagger, name)

    def reranker(self, name: str) -> Reranker:
        """See `Context.rerank`."""
        return self._serve(Reranker, name)

    def features(self, name: str) -> FeatureTable:
        """See `Context.features`."""
        if self._settings.features is None:
            raise ConfigError(f"features: the handler asks for {name!r}, the configuration names no repository")
        if self._features is None:
            self._features = FeatureClient(self._settings.features, breakers=self.breakers)
        return self._features.table(name)

    def _serve(self, kind: type[Served], name: str) -> Served:
        folder = self._settings.models.get(name)
        if folder is None:
            raise ConfigError(unknown("models", name, self._settings.models))
        if self._engine is None:
            self._engine = open_engine(self._settings.host)
        guarded = GuardedEngine(self._engine, self.breakers.named(f"models.{name}"))
        served: Served = self._served.setdefault((kind, name), kind(guarded, name, folder))
        return served

    @property
    def outage_since(self) -> float | None:
        """Since when the first part that is out has been out, in monotonic seconds."""
        earliest: float | None = None
        for part in (self._engine, self._features, self.breakers):  # asked several times a record: no lists
            since = None if part is None else getattr(part, "outage_since", None)
            if since is not None and (earliest is None or since < earliest):
                earliest = since
        return earliest

    async def start(self) -> None:
        """Opens the feature store and loads every model asked for; waits out an outage of the registry or the host."""
        if self._features is not None:
            await _insist(self._features.start, "features cannot be opened yet")
        for served in self._served.values():
            await _insist(served.load, f"models.{served.name} cannot be loaded yet")

    async def close(self) -> None:
        """Lets go of the engine and the feature store."""
        if self._engine is not None:
            await self._engine.close()
        if self._features is not None:
            await self._features.close()


async def _insist(reach: Callable[[], Awaitable[Any]], otherwise: str) -> None:
    """Tries until there is no outage."""
    attempt = 0
    while True:
        try:
            await reach()
            return
        except Outage as error:
            log.log(logging.DEBUG if attempt % TOLD_EVERY else logging.WARNING, "%s: %s", otherwise, error)
            attempt += 1
            await asyncio.sleep(START_RETRY_S)
