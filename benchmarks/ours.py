"""Our engine as a contender: embedded or behind the real host's socket, through the public API."""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import Request, rate
from benchmarks.machine import CORES
from flink_llm.engine.client import open_engine
from flink_llm.engine.generation import Model
from flink_llm.engine.settings import HostSettings


class Ours:
    """One model folder in the engine. `engine` is "embedded" or "host". Use as a context manager.

    Without speculation where peers are compared: random weights repeat themselves, which would flatter us.
    """

    def __init__(self, folder: Path, engine: str = "embedded", *, slots: int = 16, speculation: bool = False) -> None:
        self._sockets = tempfile.TemporaryDirectory(prefix="flink-llm-")
        self._settings = HostSettings(
            engine=engine, device="cpu", threads=CORES, slots=slots, linger_s=2.0, socket_dir=self._sockets.name,
            speculation=speculation,
        )  # type: ignore[arg-type]  # fmt: skip
        self._folder = folder
        self._runner = asyncio.Runner()

    def __enter__(self) -> "Ours":
        self._engine = open_engine(self._settings)
        self.model = Model(self._engine, "ours", str(self._folder))
        self._runner.run(self.model.load())
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()
        self._sockets.cleanup()

    def run(self, requests: Sequence[Request]) -> float:
        """Tokens per second over the makespan, replies streamed to the caller."""
        began = time.perf_counter()
        self._runner.run(self._all(requests))
        return rate(requests, began)

    def do(self, work: Any) -> Any:
        """Runs a coroutine on the engine's loop."""
        return self._runner.run(work)

    async def _all(self, requests: Sequence[Request]) -> None:
        await asyncio.gather(*(self._one(request) for request in requests))

    async def _one(self, request: Request) -> None:
        await asyncio.sleep(request.at)
        reply = await self.model.generate(request.text, max_tokens=request.reply)
        said = (reply.usage.prompt_tokens, reply.usage.completion_tokens)
        if said != (len(request.tokens), request.reply):
            raise RuntimeError(f"prompt and reply have {said} tokens instead of {len(request.tokens), request.reply}")
