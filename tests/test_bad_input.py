"""Handlers and key functions that do what they should not: a failure record each, and the others go on."""

import asyncio
import time

import pytest

from flink_llm.call import UNSENT_PARTIALS_LIMIT, OperatorSettings
from flink_llm.engine.generation import CallInfo, current_call
from flink_llm.handler import AsyncUdf, Metrics
from flink_llm.leaks import Leaks
from flink_llm.records import ChatRequest, Message
from flink_llm.testing import FakeServices, Harness, Script


class Doing(AsyncUdf):
    async def call(self, request: dict, ctx) -> dict:
        if request["do"] == "raise":
            await ctx.emit({"n": 0})
            raise ValueError("after a partial")
        if request["do"] == "type":
            return ["no dict"]
        for number in range(request.get("partials", 0)):
            await ctx.emit({"n": number})
            assert ctx._call.emitted - ctx._call.sent <= UNSENT_PARTIALS_LIMIT
        return {"ok": True}


@pytest.mark.parametrize(("do", "code", "partials"), [("raise", "handler_error", 1), ("type", "bad_result", 0)])
def test_a_bad_end_is_a_failure_and_the_next_is_answered(do, code, partials):
    with Harness(Doing(), key="do") as run:
        run.send({"do": do})
        run.send({"do": "well"})
        run.finish()
    assert [failure["code"] for failure in run.failures()] == [code]
    assert (len(run.partials()), run.results()) == (partials, [{"ok": True}])


def test_a_key_function_that_raises_is_a_failure():
    with Harness(Doing(), key=lambda request: request["none"]) as run:
        run.send({"do": "well"})
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["bad_key"]


def test_a_million_partials_wait_for_those_before_them():
    with Harness(Doing(), key="do") as run:
        run.send({"do": "well", "partials": 1_000_000})
        run.finish()
    assert (len(run.partials()), run.results()) == (1_000_000, [{"ok": True}])


class Blocking(AsyncUdf):
    async def call(self, request: dict, ctx) -> dict:
        if request["do"] == "block":
            time.sleep(0.8)  # noqa: ASYNC251
        else:
            await asyncio.sleep(60)
        return {"ok": True}


def test_a_call_that_blocks_the_loop_is_told_of_and_deadlines_go_on(caplog):
    with Harness(Blocking(), key="do", settings=OperatorSettings(deadline=1.0), real_time=True) as run:
        run.send({"do": "block"})
        run.send({"do": "wait"})
        run.finish()
    assert run.results() == [{"ok": True}]
    assert [failure["code"] for failure in run.failures()] == ["deadline"]
    assert run.runner.metrics.counts["blocked"] >= 1
    assert "the loop of Blocking stood still" in caplog.text


class Asking(AsyncUdf):
    async def open(self, ctx):
        self.model, self.embed = ctx.model("m"), ctx.embed("e")

    async def call(self, request: ChatRequest, ctx):
        await asyncio.gather(self.model.chat(request.messages), self.embed("x"))
        return {"ok": True}


def test_priority_reaches_generations_and_encoders(monkeypatch):
    services = FakeServices({"m": Script(), "e": Script(kind="embedding")})
    seen, start = {}, services.backend.start

    def watched(work, *rest):
        seen[work.kind] = work.priority
        return start(work, *rest)

    monkeypatch.setattr(services.backend, "start", watched)
    with Harness(Asking(), services) as run:
        run.send(ChatRequest(request_id="r", session_id="s", messages=[Message("user", "hi")], priority=2))
        run.finish()
    assert len(run.results()) == 1
    assert len(seen) == 2
    assert set(seen.values()) == {2}


class Leaking(AsyncUdf):
    async def call(self, request: dict, ctx) -> dict:
        if request["do"] == "await":
            await asyncio.gather(asyncio.sleep(1), asyncio.sleep(2))
            await asyncio.wait_for(asyncio.sleep(1), 5)
        elif request["do"] == "cancel":
            asyncio.create_task(asyncio.sleep(100)).cancel()
        else:
            self.kept = [asyncio.create_task(asyncio.sleep(100)) for _ in range(3)]
        return {"ok": True}


@pytest.mark.parametrize(("do", "leaked"), [("await", None), ("cancel", None), ("leave", 6)])
def test_tasks_that_a_call_leaves_behind_are_counted_and_told_of_once(do, leaked, caplog):
    with Harness(Leaking(), key="do") as run:
        for _ in range(2):
            run.send({"do": do})
        run.finish()
        assert run.runner.metrics.counts.get("leaked_tasks") == leaked
    assert len(run.results()) == 2
    told = [record.getMessage() for record in caplog.records if "left 3 of its tasks running" in record.getMessage()]
    assert len(told) == (leaked is not None)


def test_of_a_calls_tasks_only_those_that_run_are_kept():
    async def call():
        for _ in range(100):
            await asyncio.create_task(asyncio.sleep(0))
        return len(info.tasks)

    info = CallInfo(job="j", operator="o", key="k", request_id="1", session_id="k")
    loop = asyncio.new_event_loop()
    Leaks("Polling", Metrics()).watch(loop)
    token = current_call.set(info)
    try:
        assert loop.run_until_complete(call()) <= 2  # itself, and one whose end is not told of yet
    finally:
        current_call.reset(token)
        loop.close()
