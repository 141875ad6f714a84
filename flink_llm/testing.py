"""For tests of your own handlers and jobs: no Flink, no Kafka, no model and no store needed.

`Harness` runs a handler through the library's own runner and state, over scripted models and tables of
features, and can crash and restore. `python -m flink_llm.testing SCRIPT.json` is a real model host, on a
real socket, whose models say what a script tells them to: the benchmarks are measured with it.
"""

import asyncio
import hashlib
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from flink_llm import codec
from flink_llm.arrivals import Arrival, Keyer, KeySpec
from flink_llm.call import OperatorSettings
from flink_llm.engine import host
from flink_llm.engine.fleet import Fleet
from flink_llm.engine.generation import Model
from flink_llm.engine.protocol import Done, Entity, Event, Fault, Loaded, Submit, Tokens
from flink_llm.engine.readers import Classifier, Embedder, Reranker, Tagger
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import Backend, WorkTable
from flink_llm.errors import ConfigError
from flink_llm.feature_row import FeatureRow
from flink_llm.handler import AsyncUdf, signature_of
from flink_llm.kept import Kept
from flink_llm.names import unknown
from flink_llm.runner import Runner
from flink_llm.shard import Output, Shard

Served = TypeVar("Served", Model, Embedder, Classifier, Tagger, Reranker)


class Script(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a scripted model does.

    A decoder says `text` (`{last}` stands for the last message, `{adapter}` for the one that was asked for;
    it has every adapter; `{now}` for the epoch seconds at which its piece is said, by a script that takes time)
    in `tokens` pieces: the first after `first_ms`, the others `gap_ms` apart; `delay`
    "exponential" draws `first_ms` from that distribution, decided by the request id. `rate_per_s` bounds
    how many pieces of work the model completes a second. `fault` ends every piece of work with that code
    instead; "overloaded" and "hang" are not codes but what they say. An embedding has `dimension` numbers
    that depend on the text; a classifier finds all `labels` equally likely; a token classifier finds the
    words of `entities`, each with its label, wherever they stand; a reranker's score is the share of the
    query's words that a document has.
    """

    kind: Literal["decoder", "embedding", "classifier", "token_classifier", "reranker"] = "decoder"
    text: str = "{last}"
    tokens: int = 1
    first_ms: float = 0.0
    gap_ms: float = 0.0
    delay: Literal["fixed", "exponential"] = "fixed"
    rate_per_s: float | None = None
    fault: str | None = None
    labels: list[str] = []
    dimension: int = 8
    entities: dict[str, str] = {}


class ScriptedBackend:
    """A backend whose models are scripts, by the last part of the folder they are loaded from."""

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self._scripts = dict(scripts)
        self._by_hash: dict[str, Script] = {}
        self._free_at: dict[str, float] = {}
        self.started = 0
        self.cancelled = 0

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        """See `Backend.load`."""
        loaded, _ = await self.look(folder, sha256)
        self._by_hash[loaded.sha256] = self._scripts[loaded.name]
        return loaded

    async def look(self, folder: str, sha256: str | None) -> tuple[Loaded, int]:
        """See `Shelf.look`. A script takes no memory."""
        name = Path(folder).name
        if name not in self._scripts:
            raise ConfigError(
                f"no script for the model {name!r}, only for {', '.join(sorted(self._scripts)) or 'none'}"
            )
        script, digest = self._scripts[name], hashlib.sha256(name.encode()).hexdigest()
        plain = Loaded(call=0, name=name, sha256=digest, kind=script.kind, context_length=2048, labels=script.labels)
        return plain, 0

    async def unload(self, sha256: str) -> None:
        """See `Shelf.unload`."""
        del self._by_hash[sha256]

    def start(self, work: Submit, generation: str, emit: Callable[[Event], None]) -> Callable[[], None]:
        """See `Backend.start`."""
        self.started += 1
        script = self._by_hash[work.model]
        if script.fault is None and script.first_ms == 0 and script.gap_ms == 0 and script.rate_per_s is None:
            for event in _events(script, work, generation):
                emit(event)
            return lambda: None
        task = asyncio.get_running_loop().create_task(self._play(script, work, generation, emit))

        def cancel() -> None:
            self.cancelled += 1
            task.cancel()

        return cancel

    async def close(self) -> None:
        """See `Backend.close`."""

    async def _play(self, script: Script, work: Submit, generation: str, emit: Callable[[Event], None]) -> None:
        loop = asyncio.get_running_loop()
        if script.fault == "hang":
            await asyncio.Event().wait()
        if script.fault == "overloaded":
            return emit(Fault(call=0, kind="overloaded", code="overloaded", message="full", retry_after=0.05))
        if script.fault is not None:
            return emit(Fault(call=0, kind="record", code=script.fault, message="scripted"))
        due = loop.time() + self._delay(script, work)
        if script.rate_per_s is not None:
            due = max(due, self._free_at.get(work.model, 0.0) + 1 / script.rate_per_s)
            self._free_at[work.model] = due
        for event in _events(script, work, generation):
            await asyncio.sleep(due - loop.time())
            if isinstance(event, Tokens) and "{now}" in event.text:
                event = msgspec.structs.replace(event, text=event.text.replace("{now}", f"{time.time():.6f}"))
            emit(event)
            if isinstance(event, Tokens) and event.sequence < script.tokens - 1:
                due += script.gap_ms / 1000

    @staticmethod
    def _delay(script: Script, work: Submit) -> float:
        if script.delay == "fixed" or script.first_ms == 0:
            return script.first_ms / 1000
        return random.Random(work.request_id).expovariate(1000 / script.first_ms)


def _events(script: Script, work: Submit, generation: str) -> Iterator[Event]:
    if script.kind == "embedding":
        seed = int.from_bytes(hashlib.sha256((work.text or "").encode()).digest()[:4], "big")
        vector = np.random.default_rng(seed).standard_normal(script.dimension).astype("<f4")
        if work.dimensions is not None and not 1 <= work.dimensions <= script.dimension:
            yield Fault(call=0, kind="record", code="bad_option", message=f"dimensions is {work.dimensions}")
        else:
            yield Done(call=0, generation=generation, vector=vector[: work.dimensions].tobytes())
        return
    if script.kind == "classifier":
        shares = [1 / len(script.labels)] * len(script.labels)
        yield Done(call=0, generation=generation, scores=shares)
        return
    if script.kind == "token_classifier":
        yield Done(call=0, generation=generation, entities=_found(script, work.text or ""))
        return
    if script.kind == "reranker":
        asked = set((work.text or "").lower().split())
        scores = [len(asked & set(each.lower().split())) / max(1, len(asked)) for each in work.documents]
        yield Done(call=0, generation=generation, scores=scores)
        return
    last = work.messages[-1]["content"] if work.messages else work.prompt or ""
    text = script.text.replace("{adapter}", work.adapter).replace("{last}", last)
    size = max(1, -(-len(text) // script.tokens))
    pieces = [text[i * size : (i + 1) * size] for i in range(script.tokens)]
    for sequence, piece in enumerate(pieces):
        yield Tokens(call=0, generation=generation, sequence=sequence, text=piece)
    yield Done(call=0, generation=generation, text=text, completion_tokens=len(pieces))


def _found(script: Script, text: str) -> list[Entity]:
    found = [
        Entity(label, 1.0, match.start(), match.end())
        for words, label in script.entities.items()
        for match in re.finditer(re.escape(words), text)
    ]
    return sorted(found, key=lambda entity: entity.start)


class FakeFeatures:
    """A table of features: the key as text → values."""

    def __init__(self, rows: Mapping[str, Mapping[str, Any]], join_key: str) -> None:
        self._rows = rows
        self.join_keys = (join_key,)

    async def get(self, **keys: Any) -> Any:
        """As `FeatureTable.get`, for one key."""
        row = self._rows.get(str(next(iter(keys.values()))))
        return FeatureRow(row or {}, age_s=0.0 if row is not None else None, found=row is not None)


class FakeServices:
    """`Services` of scripts and tables: `features` maps a view to its rows by key.

    `join_key` is what those views are read by; `outage_since` may be set by a test.
    """

    def __init__(
        self,
        models: Mapping[str, Script] | None = None,
        features: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
        backend: Backend | None = None,
        join_key: str = "user_id",
    ) -> None:
        self._join_key = join_key
        self.backend = backend or ScriptedBackend(models or {})
        self.outage_since: float | None = None
        self._features = features or {}
        self._table = WorkTable(self.backend)
        self._served: list[Model | Embedder | Classifier | Tagger | Reranker] = []

    def model(self, name: str) -> Model:
        """See `Context.model`."""
        return self._keep(Model(self._table, name, name))

    def embedder(self, name: str) -> Embedder:
        """See `Context.embed`."""
        return self._keep(Embedder(self._table, name, name))

    def classifier(self, name: str) -> Classifier:
        """See `Context.classify`."""
        return self._keep(Classifier(self._table, name, name))

    def tagger(self, name: str) -> Tagger:
        """See `Context.tag`."""
        return self._keep(Tagger(self._table, name, name))

    def reranker(self, name: str) -> Reranker:
        """See `Context.rerank`."""
        return self._keep(Reranker(self._table, name, name))

    def features(self, name: str) -> Any:
        """See `Context.features`."""
        if name not in self._features:
            raise ConfigError(unknown("features", name, self._features))
        return FakeFeatures(self._features[name], self._join_key)

    def _keep(self, served: Served) -> Served:
        self._served.append(served)
        return served

    async def start(self) -> None:
        """See `Services.start`."""
        for served in self._served:
            await served.load()

    async def close(self) -> None:
        """See `Services.close`."""
        await self._table.close()


class MemoryMap:
    """A map of Flink state, in memory; `checkpoint` copies it."""

    def __init__(self) -> None:
        self.data: dict[Any, bytes] = {}

    def get(self, key: Any) -> bytes | None:
        """The value, None where there is none."""
        return self.data.get(key)

    def put(self, key: Any, value: bytes) -> None:
        """Sets a value."""
        self.data[key] = value

    def remove(self, key: Any) -> None:
        """Removes a value that may not exist."""
        self.data.pop(key, None)

    def keys(self) -> Iterable[Any]:
        """All keys."""
        return list(self.data)


def copy_state(state: Kept) -> Kept:
    """What a checkpoint would hold."""
    copy = MemoryMap()
    copy.data = dict(state.entries.data)  # type: ignore[attr-defined]
    return Kept(copy)


class Harness:
    """One shard of an operator without Flink. Use as a context manager.

    `send` takes a request (a record, or anything JSON), as Kafka would bring it; `outputs` collects
    `Output`s; `checkpoint` gives state that another Harness can be made from, as after a crash.
    """

    def __init__(
        self,
        udf: AsyncUdf,
        services: Any = None,
        *,
        key: KeySpec = "session_id",
        settings: OperatorSettings | None = None,
        state: Kept | None = None,
    ) -> None:
        self._keyer = Keyer(key, signature_of(udf)[0])
        self.services = services or FakeServices()
        self.runner = Runner(udf, self.services, settings or OperatorSettings())
        self.state = state or Kept(MemoryMap())
        self.outputs: list[Output] = []
        self._offset = 0

    def __enter__(self) -> "Harness":
        self.runner.start()
        self.shard = Shard(0, self.state, self.runner)
        self.outputs += self.shard.resume()
        return self

    def __exit__(self, *error: object) -> None:
        self.runner.close()

    def send(self, request: Any, *, headers: Mapping[str, bytes] | None = None) -> None:
        """One arrival; bytes and None go as they are."""
        value = request if request is None or isinstance(request, bytes) else codec.encode(request)
        arrival = Arrival(
            value=value,
            from_kafka=True,
            headers=headers or {},
            topic="test",
            partition=0,
            offset=self._offset,
            timestamp=int(time.time() * 1000),
        )
        self._offset += 1
        _, arrival = self._keyer.arrive(arrival)
        self.outputs += self.shard.receive(arrival.to_bytes())
        self.outputs += self.shard.drain()

    def finish(self, timeout: float = 10.0) -> list[Output]:
        """Waits until nothing is in flight. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while self.shard.in_flight or self.shard.events:
            self.outputs += self.shard.drain()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.shard.in_flight} records are still in flight")
            time.sleep(0.002)
        return self.outputs

    def checkpoint(self) -> Kept:
        """The state as a checkpoint taken now would hold it."""
        return copy_state(self.state)

    def results(self) -> list[Any]:
        """The decoded values of all results so far."""
        return self._values("result")

    def partials(self) -> list[Any]:
        """The decoded values of all partials so far."""
        return self._values("partial")

    def failures(self) -> list[Any]:
        """The decoded failure records so far."""
        return self._values("failure")

    def _values(self, kind: str) -> list[Any]:
        return [codec.decode(output.value) for output in self.outputs if output.kind == kind]


def _scripted(settings: HostSettings) -> Backend:
    if not settings.launcher_args:
        raise ConfigError("host.launcher_args: name the JSON file of scripts")
    scripts = msgspec.json.decode(Path(settings.launcher_args[0]).read_bytes(), type=dict[str, Script])
    return Fleet(ScriptedBackend(scripts), settings.memory_mb)


if __name__ == "__main__":
    host.command(_scripted, "flink_llm.testing")()
