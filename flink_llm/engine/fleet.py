"""All models of a host: folders and deployments, loaded, exchanged and let go of while others are served.

A `Backend` in front of another one, which computes. Work begins on one model and ends on it, whatever a
deployment's file says by then; a version that is no longer named is let go when its last work has ended.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flink_llm.engine.canary import Sample
from flink_llm.engine.deployment import Deployment, Traits, check_alike, deployment_id, is_deployment, read_deployment
from flink_llm.engine.faults import fault_of
from flink_llm.engine.protocol import Done, Event, Fault, Loaded, Submit, Tokens
from flink_llm.engine.routing import Routes
from flink_llm.engine.stock import Held, Shelf, Stock
from flink_llm.engine.work import nothing
from flink_llm.errors import FlinkLlmError, ModelFolderError

log = logging.getLogger(__name__)
WATCH_S = 0.5
"""How often a deployment's file is read. New content is taken when it stands still from one look to the next."""
RETRY_S = 10.0
"""After how long a file that could not be taken is tried again: its folders may have been on their way."""


class _Live:
    """A deployment as it is served. `content` is what its file held, `seen` what it holds since the last look."""

    def __init__(self, path: str) -> None:
        self.id = deployment_id(path)
        self.path = path
        self.loaded: Loaded | None = None
        self.models: list[Held] = []
        self.coming: list[Held] = []  # of a file that is being taken in
        self.routes = Routes(self.id, [])
        self.content: bytes | None = None
        self.seen: bytes | None = None
        self.retry_at = 0.0
        self.told = ""


class _Run:
    """One piece of work, from its start to its end on one model. Times are monotonic seconds."""

    def __init__(self, fleet: "Fleet", work: Submit, held: Held, emit: Callable[[Event], None]) -> None:
        self._fleet = fleet
        self._emit = emit
        self._began = time.monotonic()
        self._first: float | None = None
        self.work = work
        self.held = held
        self.live: _Live | None = None
        self.routes: Routes | None = None
        self.number = 0
        self.over = False
        self._stop: Callable[[], None] = nothing
        held.running += 1

    def begin(self, shelf: Shelf, generation: str) -> None:
        """Starts the work on its model."""
        stop = shelf.start(self.work, generation, self.hear)
        if not self.over:  # what stops it knows it: the two would be garbage that only a collection frees
            self._stop = stop

    def hear(self, event: Event) -> None:
        """An event of the work, for whoever asked for it."""
        if self._first is None:
            self._first = time.monotonic()
        if not isinstance(event, Tokens):
            if isinstance(event, Done):
                event = msgspec.structs.replace(event, model=self.held.sha256)
            self._end(self._sample(event))
        elif event.sequence == 0 and self.live is not None:
            event = msgspec.structs.replace(event, model=self.held.sha256)
        self._emit(event)

    def cancel(self) -> None:
        """Nobody wants it any more. What it said until then counts, and so does a long silence."""
        self._stop()
        self._end(None if self._first is None else Sample(first_ms=self._first_ms))

    @property
    def silent_ms(self) -> float:
        """For how long it has said nothing; 0 once it has."""
        return (time.monotonic() - self._began) * 1000 if self._first is None else 0.0

    @property
    def _first_ms(self) -> float:
        return 0.0 if self._first is None else (self._first - self._began) * 1000

    def _end(self, sample: Sample | None) -> None:
        if not self.over:
            self.over, self._stop = True, nothing
            self._fleet.ended(self, sample)

    def _sample(self, last: Done | Fault) -> Sample | None:
        """What it came to, None for what is no matter of the version: the record's fault, a full queue."""
        if isinstance(last, Fault):
            return Sample(failed=True) if last.kind == "outage" or last.code == "model_error" else None
        further, since = last.completion_tokens - 1, time.monotonic() - (self._first or 0.0)
        return Sample(first_ms=self._first_ms, per_token_ms=since * 1000 / further if further > 0 else None)


class Fleet:
    """A `Backend` over a `Shelf`; `memory_mb` bounds what its models take together, None does not.

    A model's path may be a folder or a deployment file, see `flink_llm.engine.deployment`.
    """

    def __init__(self, shelf: Shelf, memory_mb: int | None = None) -> None:
        self._shelf = shelf
        self._stock = Stock(shelf, memory_mb)
        self._live: dict[str, _Live] = {}
        self._deploying = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        """See `Backend.load`. Of a deployment all versions are loaded when this returns."""
        if is_deployment(folder):
            return await self._load_deployment(folder, sha256)
        held = await self._stock.look(folder, sha256)
        held.by_folder = True
        return await self._stock.ready(held)

    def start(self, work: Submit, generation: str, emit: Callable[[Event], None]) -> Callable[[], None]:
        """See `Backend.start`. A model that had to make room for another is loaded again first."""
        live = self._live.get(work.model)
        number = 0 if live is None else live.routes.choose(work.request_id)
        held = self._stock.get(work.model) if live is None else live.models[number]
        if held is None:
            return self._shelf.start(work, generation, emit)  # which knows what to say of an unknown model
        run = _Run(self, msgspec.structs.replace(work, model=held.sha256), held, emit)
        if live is not None:
            run.live, run.routes, run.number = live, live.routes, number
        if not held.ready:
            self._spawn(self._begin_later(run, generation))
            return run.cancel
        try:
            run.begin(self._shelf, generation)
        except BaseException:
            run.cancel()
            raise
        return run.cancel

    async def close(self) -> None:
        """Ends the watch over the files, and the shelf."""
        tasks = [*self._tasks, *([self._watcher] if self._watcher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._shelf.close()

    def ended(self, run: _Run, sample: Sample | None) -> None:
        """A piece of work is over, with what it came to; None when that says nothing of its version."""
        held, live = run.held, run.live
        held.running -= 1
        held.used = time.monotonic()
        if run.routes is not None and live is not None and run.routes is live.routes:
            if sample is not None:
                failed = run.routes.ended(run.number, sample)
            else:
                failed = run.routes.abandoned(run.number, run.silent_ms)
            for number, why in failed:
                canary = live.models[number]
                if canary not in live.coming:
                    canary.deployments.discard(live.id)
                log.error("%s: the canary %s, %s, is rolled back: %s", live.path, canary.folder, _short(canary), why)
                self._spawn(self._stock.sweep())
        if not held.wanted:
            self._spawn(self._stock.sweep())

    async def _begin_later(self, run: _Run, generation: str) -> None:
        try:
            await self._stock.ready(run.held)
            if not run.over:
                run.begin(self._shelf, generation)
        except Exception as error:  # whatever it is, it is the end of this work
            log.error("%s could not be loaded again: %s", run.held.folder, error)
            if not run.over:
                run.hear(fault_of(error))

    async def _load_deployment(self, path: str, expected: str | None) -> Loaded:
        live = self._live.get(deployment_id(path)) or _Live(path)
        if expected not in (None, live.id):
            raise ModelFolderError(f"{path} is a deployment, no model {str(expected)[:12]}")
        if live.loaded is not None:  # and it waits for no other's load
            return live.loaded
        async with self._deploying:
            live = self._live.get(live.id, live)
            loaded = live.loaded
            if loaded is None:
                live.content = await asyncio.to_thread(_content, path)
                loaded = await self._deploy(live)
                self._live[live.id] = live
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return loaded

    async def _deploy(self, live: _Live) -> Loaded:
        """Makes a deployment what its file says now, whole or not at all."""
        deployment = await asyncio.to_thread(read_deployment, live.path)
        models = [await self._stock.look(version.folder) for version in deployment.versions]
        like = None if live.loaded is None else _traits(live.loaded)
        check_alike(live.path, [_traits(held.loaded) for held in models], like)
        self._stock.check_together(models, live.path)
        joining = [held for held in models if live.id not in held.deployments]
        for held in joining:
            held.deployments.add(live.id)
        live.coming = models
        try:
            versions = [await self._stock.ready(held) for held in models]
        except BaseException:
            self._leave(live, [*joining, *(live.models[number] for number in live.routes.rolled_back)])
            raise
        finally:
            live.coming = []
        left = [held for held in live.models if held not in models]
        live.routes, live.models = Routes(live.id, deployment.versions), models
        live.loaded = _as_one(live, versions)
        log.info("%s serves %s", live.path, _described(deployment, models))
        self._leave(live, left)
        return live.loaded

    def _leave(self, live: _Live, models: list[Held]) -> None:
        """These are not the deployment's any more."""
        for held in models:
            held.deployments.discard(live.id)
        self._spawn(self._stock.sweep())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for live in list(self._live.values()):
                try:
                    await self._look_again(live)
                except Exception:  # the other deployments, and this one's next file, have to be seen
                    log.exception("%s could not be looked at", live.path)

    async def _look_again(self, live: _Live) -> None:
        content, seen = await asyncio.to_thread(_content, live.path), live.seen
        live.seen = content
        if content == live.content:
            live.told = ""
        elif content != seen:
            live.retry_at = 0.0
        elif time.monotonic() >= live.retry_at:
            live.retry_at = time.monotonic() + RETRY_S
            try:
                async with self._deploying:
                    await self._deploy(live)
                live.content, live.told = content, ""
            except FlinkLlmError as error:
                if live.told != str(error):
                    live.told = str(error)
                    log.error("%s; what %s said before goes on serving", error, Path(live.path).name)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a model could not be let go of", exc_info=task.exception())


def _content(path: str) -> bytes | None:
    """What a file holds, None where it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(path).read_bytes()
    return None


def _as_one(live: _Live, versions: Sequence[Loaded]) -> Loaded:
    shortest = min(version.context_length for version in versions)
    return msgspec.structs.replace(versions[0], name=Path(live.path).stem, sha256=live.id, context_length=shortest)


def _traits(loaded: Loaded) -> Traits:
    return Traits(loaded.sha256, loaded.kind, loaded.labels)


def _short(held: Held) -> str:
    return held.sha256[:12]


def _described(deployment: Deployment, models: Sequence[Held]) -> str:
    return ", ".join(
        f"{Path(version.folder).name} ({_short(held)}) with weight {version.weight}"
        + (" as a canary" if version.canary else "")
        for version, held in zip(deployment.versions, models, strict=True)
    )
