"""Which models are in memory: loaded when they are needed, let go when nobody does or another needs the room."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flink_llm.engine.model import MB, MIXED_MB, Manifest, adapter_file, held_twice
from flink_llm.engine.protocol import Loaded
from flink_llm.engine.work import Backend
from flink_llm.errors import ModelFolderError, Outage

log = logging.getLogger(__name__)


FOLDERS = 4
"""Places of one model that are remembered."""


class Shelf(Backend, Protocol):
    """A backend that can look at a model before it is loaded, and let go of one."""

    async def look(self, folder: str, sha256: str | None) -> tuple[Loaded, int]:
        """What `load` would answer, and how many bytes of memory it would take. Raises ModelFolderError."""

    async def unload(self, sha256: str) -> None:
        """Lets go of a model that has no work; returns once its memory is free."""


@dataclass(eq=False)
class Held:
    """A model that was named to the host. It is wanted as long as somebody may send work for it.

    `folders` are where it was said to be, the latest first.
    """

    folders: list[str]
    loaded: Loaded
    need: int
    ready: bool = False
    by_folder: bool = False
    """Whether a client loaded it as a folder: then it stays, unless another model needs the room."""
    deployments: set[str] = field(default_factory=set)
    running: int = 0
    used: float = 0.0

    @property
    def sha256(self) -> str:
        """Of its manifest."""
        return self.loaded.sha256

    @property
    def folder(self) -> str:
        """Where it was last said to be."""
        return self.folders[0]

    @property
    def idle(self) -> bool:
        """Whether it may be let go for another's sake."""
        return self.ready and not self.running and not self.deployments

    @property
    def wanted(self) -> bool:
        """Whether it is to stay as long as there is room."""
        return bool(self.running or self.deployments or self.by_folder)


class Stock:
    """The models of one backend, within `memory_mb` MB (None: no bound). Lives on one loop.

    What a model needs is reckoned before it is loaded, see `needed_bytes`.
    """

    def __init__(self, shelf: Shelf, memory_mb: int | None = None) -> None:
        self._shelf = shelf
        self._budget = None if memory_mb is None else memory_mb * MB
        self._held: dict[str, Held] = {}
        self._changing = asyncio.Lock()

    def get(self, sha256: str) -> Held | None:
        """A model by its manifest's hash, None if nobody has named it."""
        return self._held.get(sha256)

    async def look(self, folder: str, sha256: str | None = None) -> Held:
        """A model by its folder; nothing is loaded. Raises ModelFolderError."""
        loaded, need = await self._shelf.look(folder, sha256)
        held = self._held.setdefault(loaded.sha256, Held([], loaded, need))
        held.folders = [folder, *(other for other in held.folders if other != folder)][:FOLDERS]
        return held

    async def ready(self, held: Held) -> Loaded:
        """Loads a model unless it is there, after idle ones, the longest unused first, have made room for it.

        Raises ModelFolderError when it can never fit, Outage while others hold the room, and what
        `Backend.load` raises.
        """
        async with self._changing:
            if not held.ready:
                await self._make_room(held)
                await self._load(held)
            held.used = time.monotonic()
            return held.loaded

    async def _load(self, held: Held) -> None:
        """From the first of its folders that has it: of a copy only the manifest was looked at."""
        for folder in held.folders:
            try:
                held.loaded = await self._shelf.load(folder, held.sha256)
            except ModelFolderError:
                if folder == held.folders[-1]:
                    raise
            else:
                held.ready = True
                return

    async def sweep(self) -> None:
        """Lets go of every model that nobody wants any more."""
        async with self._changing:
            for held in list(self._held.values()):
                if held.ready and not held.wanted:  # asked now: while another was let go of, it may have got work
                    await self._unload(held)

    def check_together(self, models: Sequence[Held], what: str) -> None:
        """Raises ModelFolderError when these models can never be loaded at once."""
        need = sum(held.need for held in models)
        if self._budget is not None and need > self._budget:
            raise ModelFolderError(f"{what} needs {_mb(need)} MB, host.memory_mb is {_mb(self._budget)}")

    async def _make_room(self, held: Held) -> None:
        if self._budget is None:
            return
        self.check_together([held], held.folder)
        while True:  # one at a time: the next may get work meanwhile
            there = [other for other in self._held.values() if other.ready]
            taken = sum(other.need for other in there)
            idle = sorted((other for other in there if other.idle), key=lambda other: other.used)
            leaving = to_leave([other.need for other in idle], taken + held.need - self._budget)
            if leaving == 0:
                return
            if leaving is None:
                busy = taken - sum(other.need for other in idle)
                raise Outage(
                    f"{held.folder} needs {_mb(held.need)} MB; of host.memory_mb {_mb(self._budget)} the models that "
                    f"are at work or deployed hold {_mb(busy)}"
                )
            await self._unload(idle[0])

    async def _unload(self, held: Held) -> None:
        held.ready = False
        began = time.monotonic()
        await self._shelf.unload(held.sha256)
        log.info("unloaded %s, %s, in %.1f s", held.folder, held.sha256[:12], time.monotonic() - began)


def to_leave(idle: Sequence[int], missing: int) -> int | None:
    """How many of the `idle`, in this order, must go for `missing` bytes; None when all are not enough."""
    for count in range(len(idle) + 1):
        if missing <= 0:
            return count
        missing -= idle[count] if count < len(idle) else 0
    return None


def needed_bytes(manifest: Manifest, slots: int, mixed_mb: int = MIXED_MB) -> int:
    """The memory that a model takes: its files, and a decoder's KV cache for `slots` generations.

    Weights of at most `mixed_mb` MB are held twice, see `held_twice`; a GPU needs less. Adapters are held
    each alone and all side by side, and so reckoned twice.

    What a run needs besides, its activations, is not in it: leave room for that beside `host.memory_mb`.
    """
    files = sum(entry.bytes for entry in manifest.files.values())
    files += sum(manifest.files[name].bytes for name in map(adapter_file, manifest.adapters) if name in manifest.files)
    files += held_twice(manifest, mixed_mb)
    place = 2 if manifest.precision == "fp16" else 4
    tokens = slots * manifest.context_length
    return files + 2 * manifest.num_layers * manifest.num_kv_heads * manifest.head_dim * tokens * place


def _mb(size: int) -> int:
    return -(-size // MB)
