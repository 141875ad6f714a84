"""The handlers that benchmarks run: they answer through the real model host."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from benchmarks import stages
from flink_llm.handler import AsyncUdf, CallContext, Context
from flink_llm.records import ChatRequest


class Counted(AsyncUdf):
    """Streams a reply and counts its calls per key. Writes how many are in flight to a file each 20 ms.

    With `features` it reads a customer first. The file is the worker's own: the gauge's name and its process id.
    """

    stateful = True

    def __init__(self, gauge: str, *, features: bool = False) -> None:
        self._gauge = gauge
        self._reads = features

    async def open(self, ctx: Context) -> None:
        self._model = ctx.model("scripted")
        self._customers = ctx.features("customer_profile") if self._reads else None
        self._in_flight = 0
        self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while True:
            self._tell()
            await asyncio.sleep(0.02)

    def _tell(self) -> None:
        scratch = Path(f"{self._gauge}-{os.getpid()}.new")  # a name that workers shared would be moved away by another
        scratch.write_text(str(self._in_flight))
        scratch.replace(f"{self._gauge}.{os.getpid()}")

    async def call(self, request: ChatRequest, ctx: CallContext) -> dict[str, Any]:
        self._in_flight += 1
        try:
            count = ctx.state.get("count", 0) + 1
            ctx.state["count"] = count
            customer = await self._customers.get(user_id="user-1") if self._customers else None
            reply = self._model.chat(request.messages, features=customer)
            async for token in reply:
                await ctx.emit(token)
            return {
                "request_id": request.request_id,
                "session_id": request.session_id,
                "count": count,
                "finish_reason": reply.finish_reason,
                "generation_id": reply.generation_id,
                "text": reply.text,
                "ended_at": time.time(),
            }
        finally:
            self._in_flight -= 1


class Timed(AsyncUdf):
    """Says when its call ended, in seconds of this machine's clock."""

    async def open(self, ctx: Context) -> None:
        self._model = ctx.model("scripted")

    async def call(self, request: ChatRequest, ctx: CallContext) -> dict[str, Any]:
        await self._model.chat(request.messages)
        return {"request_id": request.request_id, "completed": time.time()}


class Streamed(AsyncUdf):
    """Streams a reply, and says when its call ended."""

    async def open(self, ctx: Context) -> None:
        self._model = ctx.model("scripted")

    async def call(self, request: ChatRequest, ctx: CallContext) -> dict[str, Any]:
        reply = self._model.chat(request.messages)
        async for token in reply:
            await ctx.emit(token)
        return {"request_id": request.request_id, "completed": time.time()}


class Echo(AsyncUdf):
    """The shortest way through client and host: one message there, one back."""

    async def open(self, ctx: Context) -> None:
        self._model = ctx.model("scripted")

    async def call(self, request: ChatRequest, ctx: CallContext) -> dict[str, Any]:
        reply = await self._model.chat(request.messages)
        return {"request_id": request.request_id, "text": reply.text}


class _Staged(AsyncUdf):
    """Stamps what its worker does, see `benchmarks.stages`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    async def open(self, ctx: Context) -> None:
        stages.install(self._folder)
        self._model = ctx.model("scripted")


class StagedStream(_Staged):
    """`Streamed`; each token says when the host said it and when the handler had it."""

    async def call(self, request: ChatRequest, ctx: CallContext) -> dict[str, Any]:
        async for token in self._model.chat(request.messages):
            await ctx.emit({"text": token.text, "had": time.time()})
        return {"request_id": request.request_id}


class StagedEcho(_Staged):
    """`Echo`; each answer says when its call began, when the host said it, and when the handler had it."""

    async def call(self, request: ChatRequest, ctx: CallContext) -> dict[str, Any]:
        began = time.time()
        reply = await self._model.chat(request.messages)
        return {"request_id": request.request_id, "text": reply.text, "began": began, "had": time.time()}


class Grounded(AsyncUdf):
    """Reads a customer, then generates: both of a job's parts are needed for each reply."""

    async def open(self, ctx: Context) -> None:
        self._model = ctx.model("scripted")
        self._customers = ctx.features("customer_profile")

    async def call(self, request: ChatRequest, ctx: CallContext) -> dict[str, Any]:
        customer = await self._customers.get(user_id="user-1")
        reply = await self._model.chat(request.messages, features=customer)
        return {"request_id": request.request_id, "found": customer.found, "text": reply.text}


class Straggling(AsyncUdf):
    """Asks the model that the message names, "scripted" where it names none."""

    async def open(self, ctx: Context) -> None:
        self._models = {name: ctx.model(name) for name in ("scripted", "slow", "never")}

    async def call(self, request: ChatRequest, ctx: CallContext) -> dict[str, Any]:
        model = self._models.get(request.messages[-1].content, self._models["scripted"])
        reply = await model.chat(request.messages)
        return {"request_id": request.request_id, "text": reply.text}
