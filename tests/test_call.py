"""One call: its partials, its deadline, the size of what it says, its turn after failures."""

import asyncio
import gc
import os
import threading
import time

import pytest
from msgspec import Struct

from flink_llm.call import Call, OperatorSettings
from flink_llm.errors import ConfigError, FlinkLlmError, Outage, RecordError, StateError
from flink_llm.handler import AsyncUdf
from flink_llm.records import ChatRequest, EmbedRequest, Message
from flink_llm.testing import FakeServices, Harness, Script, copy_state


def request(number, session="s", text="hello", **fields):
    return ChatRequest(request_id=f"r{number}", session_id=session, messages=[Message("user", text)], **fields)


class Doing(AsyncUdf):
    """Runs a coroutine function of (request, ctx)."""

    def __init__(self, what):
        self._what = what

    async def call(self, request: dict, ctx):
        return await self._what(request, ctx)


def outcome_of(what, value=None, **settings):
    """What becomes of one record, and of a good one behind it."""
    with Harness(Doing(what), settings=OperatorSettings(**settings)) as run:
        run.send({"request_id": "r", "session_id": "s", **(value or {})})
        run.finish()
    return [failure["code"] for failure in run.failures()], run.results()


async def echo(request, ctx):
    return {"ok": True}


class Odd(Exception):
    def __str__(self):
        raise ValueError("not even this")


@pytest.mark.parametrize(
    "error",
    [Odd(), RecordError("bad_option", None), ValueError("half \ud800 a character"), OSError(os.fsdecode(b"\xff"))],
    ids=["no text", "no message", "half a character", "half a name"],
)
def test_an_error_that_cannot_be_told_is_still_its_records(error):
    async def fail(request, ctx):
        raise error

    codes, _ = outcome_of(fail, deadline=None)
    assert codes == ["bad_option" if isinstance(error, RecordError) else "handler_error"]


def test_a_deadline_that_no_clock_knows_is_the_records_fault():
    assert outcome_of(echo, {"deadline": 10**400})[0] == ["invalid"]


@pytest.mark.parametrize("text", [b"nan", b"inf", b"soon", b"9" * 400])
def test_a_deadline_header_that_is_no_number_is_the_records_fault(text):
    with Harness(Doing(echo)) as run:
        run.send({"request_id": "r", "session_id": "s"}, headers={"deadline-ms": text, "trace": b"t"})
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["invalid"]
    assert [output.headers for output in run.outputs] == [{"trace": b"t"}]


def test_what_could_not_be_stored_or_sent_has_its_code():
    async def surrogate(request, ctx):
        return {"text": "\ud800"}

    async def partial(request, ctx):
        await ctx.emit({"text": "\ud800"})

    assert outcome_of(surrogate)[0] == ["bad_result"]
    assert outcome_of(partial)[0] == ["bad_result"]


def test_whatever_goes_out_is_small_enough_for_its_topic():
    limit = 20_000
    settings = OperatorSettings(max_result_bytes=limit, keep_payload=True)

    async def say(request, ctx):
        size = request.get("partial")
        if size:
            await ctx.emit({"text": "x" * size})
        return {"text": "x" * request.get("result", 1)}

    headers = {f"h{i}": b"v" * 900 for i in range(20)}
    with Harness(Doing(say), settings=settings) as run:
        for number, value in enumerate(
            [{"result": limit}, {"partial": limit}, {"result": 3000}, {"session_id": "k" * 30_000}]
        ):
            value = {"request_id": f"r{number}", "session_id": "s", **value}
            run.send(value, headers=headers if number == 2 else None)
        run.send(b"\x01" * 15_000, headers=headers)  # broken, and six times as long in JSON
        run.send({"request_id": "i" * 15_000, "session_id": "s"})
        run.send({"request_id": "i" * 15_000, "session_id": "s", "other": 1})  # conflicts, and names its id
        run.finish()
    codes = [failure["code"] for failure in run.failures()]
    assert sorted(codes) == sorted(["result_too_large"] * 4 + ["malformed", "conflicting_request"])
    for output in run.outputs:
        headers_size = sum(len(name) + len(value) for name, value in output.headers.items())
        assert len(output.key) + len(output.value) + headers_size <= limit


def test_two_tasks_of_one_call_may_emit_without_end():
    async def both(request, ctx):
        async def emit(name):
            for i in range(3000):
                await ctx.emit({"from": name, "n": i})

        await asyncio.gather(emit("a"), emit("b"))
        return {"ok": True}

    with Harness(Doing(both)) as run:
        run.send({"request_id": "r", "session_id": "s"})
        run.finish(20)
    assert len(run.partials()) == 6000
    assert [partial["n"] for partial in run.partials() if partial["from"] == "a"] == list(range(3000))
    assert len(run.results()) == 1


def test_one_drain_takes_what_there_is_and_ends():
    async def stream(request, ctx):
        for i in range(20_000):
            await ctx.emit({"n": i})
        return {"ok": True}

    with Harness(Doing(stream)) as run:
        for number in range(4):
            run.send({"request_id": f"r{number}", "session_id": f"s{number}"})
        time.sleep(0.2)
        assert len(list(run.shard.drain())) < 10_000
        run.finish(30)


def test_a_repeat_changes_no_state():
    class Counting(AsyncUdf):
        stateful = True

        async def call(self, request: ChatRequest, ctx):
            ctx.state["count"] = ctx.state.get("count", 0) + 1
            return {"count": ctx.state["count"]}

    with Harness(Counting()) as run:
        keyed = [run._keyer.arrive(arrival)[1].to_bytes() for arrival in map(arrival_of, [1, 2, 1, 3])]
        for data in keyed:  # nothing is emitted in between
            run.outputs += run.shard.receive(data)
            time.sleep(0.02)
        run.finish()
        assert states(run)
        assert [result["count"] for result in run.results()] == [1, 2, 1, 3]
        again = copy_state(run.state)
    with Harness(Counting(), state=again) as run:
        run.send(request(4))
        run.finish()
    assert [result["count"] for result in run.results()] == [4]


def states(run):
    """The keys' states."""
    return {name[1:]: value for name, value in run.state.entries.data.items() if name[:1] == b"s"}


def arrival_of(number):
    from flink_llm import codec
    from flink_llm.arrivals import Arrival

    return Arrival(value=codec.encode(request(number)), from_kafka=True, topic="t", partition=0, offset=number)


def test_an_empty_state_takes_no_room():
    class Forgetting(AsyncUdf):
        stateful = True

        async def call(self, request: ChatRequest, ctx):
            found = dict(ctx.state)
            ctx.state.clear()
            if request.messages[-1].content == "keep":
                ctx.state["kept"] = True
            return {"found": found}

    with Harness(Forgetting()) as run:
        for number, text in enumerate(["keep", "drop", "drop"]):
            run.send(request(number, text=text))
            run.finish()
        assert states(run) == {}
    assert [result["found"] for result in run.results()] == [{}, {"kept": True}, {}]


def test_a_state_that_no_release_can_read_is_told_to_the_job():
    class Stateful(AsyncUdf):
        stateful = True

        async def call(self, request: ChatRequest, ctx):
            ctx.state["x"] = 1
            return {"ok": True}

    with Harness(Stateful()) as run:
        run.send(request(1))
        run.finish()
        run.state.set_state("s", b"\x09" + (run.state.state("s") or b"")[1:])
        state = run.checkpoint()
    wrong = pytest.raises(StateError, match=r"version 9, this release reads version 1")
    with Harness(Stateful(), state=state) as run, wrong:
        run.send(request(2))  # raises already where the loop was faster
        run.finish()


def test_a_task_that_raises_system_exit_takes_nobody_along():
    async def leave(request, ctx):
        async def later():
            raise SystemExit(1)

        if request["request_id"] == "r0":
            Doing.left = asyncio.create_task(later())
        await asyncio.sleep(0.02)
        return {"ok": True}

    with Harness(Doing(leave)) as run:
        for number in range(3):
            run.send({"request_id": f"r{number}", "session_id": "s"})
        run.finish()
    assert len(run.results()) == 3


@pytest.mark.parametrize("error", [SystemExit(2), KeyboardInterrupt(), ValueError("no")])
def test_whatever_open_raises_is_one_line(error):
    class Broken(Doing):
        async def open(self, ctx):
            raise error

    with pytest.raises(FlinkLlmError, match=rf"^Broken\.open failed: {type(error).__name__}"):
        Harness(Broken(echo)).__enter__()


def test_a_type_that_no_record_can_be_is_refused_at_once():
    class Either(AsyncUdf):
        async def call(self, request: ChatRequest | EmbedRequest, ctx):
            return {}

    with pytest.raises(ConfigError, match=r"Either\.call takes .* which no record can be decoded to"):
        Harness(Either())


def test_a_type_that_raises_of_its_own_is_the_records_fault():
    class Strict(Struct):
        session_id: str

        def __post_init__(self):
            raise KeyError("told to")

    class Taking(AsyncUdf):
        async def call(self, request: Strict, ctx):
            return {}

    with Harness(Taking()) as run:
        run.send({"session_id": "s"})
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["invalid"]


class Asking(AsyncUdf):
    async def open(self, ctx):
        self.model = ctx.model("echo")

    async def call(self, request: ChatRequest, ctx):
        reply = await self.model.chat(request.messages)
        return {"text": reply.text, "finish_reason": reply.finish_reason}


def test_a_reply_that_has_not_begun_by_its_deadline_is_a_failure_that_can_be_sent_again():
    services = FakeServices({"echo": Script(first_ms=5000)})
    with Harness(Asking(), services) as run:
        run.send(request(1, deadline=0.1))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["deadline"]
    assert not run.results()


def test_a_reply_that_an_outage_kept_from_beginning_says_outage():
    services = FakeServices({"echo": Script(first_ms=5000)}, {"other": {}})
    settings = OperatorSettings(on_outage="deadline")
    with Harness(Asking(), services, settings=settings) as run:
        run.outage(1.0, of="other")
        run.send(request(1, deadline=0.1))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["outage"]


@pytest.mark.parametrize(("on_outage", "code"), [("deadline", ["deadline"]), ("wait", [])])
def test_after_a_restore_the_clock_has_run_on_only_if_it_was_told_to(on_outage, code):
    settings = OperatorSettings(on_outage=on_outage)

    async def slow(request, ctx):
        await asyncio.sleep(0.3)
        return {"ok": True}

    with Harness(Doing(slow), settings=settings) as run:
        run.send({"request_id": "r", "session_id": "s", "deadline": 0.5})
        state = run.checkpoint()
    time.sleep(0.4)
    with Harness(Doing(slow), settings=settings, state=state) as again:
        again.finish()
    assert [failure["code"] for failure in again.failures()] == code


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_a_record_that_brings_its_part_down_while_others_are_answered_ends_at_its_deadline(seconds):
    async def call(request, ctx):
        await asyncio.sleep(seconds)
        if request["request_id"] == "bad":
            raise ConnectionResetError("told to")
        return {"ok": True}

    with Harness(Doing(call)) as run:
        run.send({"request_id": "bad", "session_id": "s", "deadline": 0.3})
        for number in range(60):
            run.send({"request_id": f"r{number}", "session_id": "s"})
            run.advance(0.02)
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["outage"]
    assert len(run.results()) == 60


def test_a_record_waits_out_what_nobody_is_answered_by():
    began = time.monotonic()

    async def call(request, ctx):
        await asyncio.sleep(0.02)
        if time.monotonic() - began < 1.0:
            raise ConnectionRefusedError("told to")
        return {"ok": True}

    with Harness(Doing(call)) as run:
        run.send({"request_id": "r", "session_id": "s", "deadline": 0.2})
        run.finish()
    assert len(run.results()) == 1


def test_the_wait_before_another_try_may_outlast_the_outage():
    up = threading.Event()

    async def call(request, ctx):
        await asyncio.sleep(0.02)
        if not up.is_set() and request["request_id"] == "r":
            raise Outage("told to")
        return {"ok": True}

    with Harness(Doing(call)) as run:
        run.send({"request_id": "r", "session_id": "s", "deadline": 0.3})
        run.send({"request_id": "other", "session_id": "s"})  # answered while the first attempt runs
        run.outage(1.0)
        run.advance(1.0)
        up.set()
        run.finish()
    assert not run.failures()
    assert len(run.results()) == 2


def calls_alive():
    return sum(isinstance(found, Call) for found in gc.get_objects())


def test_calls_that_are_over_are_freed_without_a_collection():
    gc.collect()
    before = calls_alive()
    gc.disable()
    try:
        with Harness(Doing(echo)) as run:
            for number in range(20):
                run.send({"request_id": f"r{number}", "session_id": "s"})
                run.finish()
            assert len(run.results()) == 20
            assert calls_alive() - before <= 2  # the shard's newest, and what the inbox has not forgotten yet
    finally:
        gc.enable()
