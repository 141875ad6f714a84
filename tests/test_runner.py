"""The operator's contract, without Flink: handlers through the library's own runner and state."""

import asyncio
import threading
import time

import pytest

from flink_llm.breakers import BreakerSettings
from flink_llm.call import OperatorSettings
from flink_llm.errors import FlinkLlmError, Outage, Overloaded, RecordError, StateError
from flink_llm.handler import AsyncUdf
from flink_llm.places import PATIENCE_S
from flink_llm.records import ChatRequest, ChatResponse, Message
from flink_llm.testing import FakeServices, Harness, Script


def request(number, session="s", text="hello", **fields):
    messages = [Message("user", text)]
    return ChatRequest(request_id=f"r{number}", session_id=session, messages=messages, **fields)


class Plain(AsyncUdf):
    """Does what the text of the request says."""

    attempts = 0
    release = threading.Event()

    async def call(self, request: ChatRequest, ctx):
        text = request.messages[-1].content
        if text.startswith("sleep"):
            await asyncio.sleep(float(text.split()[1]))
        elif text == "hold":
            await asyncio.to_thread(Plain.release.wait, 10)
        elif text == "none":
            return None
        elif text == "record":
            raise RecordError("bad_option", "told to")
        elif text == "value":
            raise ValueError("told to")
        elif text == "exit":
            raise SystemExit(3)
        elif text == "cancel":
            raise asyncio.CancelledError
        elif text == "object":
            return object()
        elif text == "outage" and ctx.attempt < 2:
            raise Outage("told to")
        elif text == "overloaded":
            raise Overloaded("told to", 0.01)
        elif text == "state":
            return ctx.state
        elif text == "stubborn":
            while True:
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    continue
        return {"request_id": request.request_id, "text": text}


class Counting(AsyncUdf):
    stateful = True

    async def call(self, request: ChatRequest, ctx):
        count = ctx.state.get("count", 0) + 1
        ctx.state["count"] = count
        await asyncio.sleep(0.001)
        if request.messages[-1].content == "fail":
            raise ValueError("told to")
        if request.messages[-1].content == "bad":
            ctx.state["bad"] = object()
        return {"request_id": request.request_id, "count": count}


class Streaming(AsyncUdf):
    async def open(self, ctx):
        self.model = ctx.model("echo")

    async def call(self, request: ChatRequest, ctx) -> ChatResponse:
        reply = self.model.chat(request.messages)
        async for token in reply:
            await ctx.emit(token)
        return reply.response


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("none", "bad_result"),
        ("object", "bad_result"),
        ("record", "bad_option"),
        ("value", "handler_error"),
        ("exit", "handler_error"),
        ("cancel", "handler_error"),
        ("state", "handler_error"),
    ],
)
def test_whatever_a_handler_raises_ends_its_record_alone(text, code):
    with Harness(Plain()) as run:
        run.send(request(1, text=text))
        run.send(request(2))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == [code]
    assert [result["request_id"] for result in run.results()] == ["r2"]


def test_a_failure_names_the_place_of_the_original_and_not_its_payload():
    with Harness(Plain()) as run:
        run.send(b'{"request_id": "r1", "session_id": 5, "secret": "x"}', headers={"h": b"1" * 1000})
        run.finish()
    (failure,) = run.failures()
    assert failure["code"] == "invalid"
    assert (failure["topic"], failure["partition"], failure["offset"]) == ("test", 0, 0)
    assert failure["request_id"] == "r1"
    assert failure["payload"] is None
    assert len(failure["headers"]["h"]) == 256
    assert "secret" not in str(failure)


def test_null_and_broken_values_are_failures():
    with Harness(Plain()) as run:
        for value in (None, b"{", b"\xff", b"[]"):
            run.send(value)
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["null_value", "malformed", "malformed", "invalid"]


def test_a_repeat_gets_the_first_answer_once_and_a_conflict_a_failure():
    services = FakeServices({"echo": Script(first_ms=20)})
    with Harness(Streaming(), services) as run:
        run.send(request(1))
        run.send(request(1))  # while the first is in flight
        run.finish()
        run.send(request(1))  # after it was answered
        run.send(request(1, text="another"))
        run.finish()
    assert len(run.results()) == 3
    assert len({result["generation_id"] for result in run.results()}) == 1
    assert services.backend.started == 1
    assert [failure["code"] for failure in run.failures()] == ["conflicting_request"]


def test_an_id_that_failed_runs_again():
    with Harness(Counting()) as run:
        run.send(request(1, text="fail"))
        run.finish()
        run.send(request(1, text="fail"))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["handler_error", "handler_error"]


def test_remembered_answers_expire():
    with Harness(Plain(), settings=OperatorSettings(remember_s=0.05)) as run:
        run.send(request(1))
        run.finish()
        run.advance(0.1)
        run.send(request(1, text="another"))  # no conflict either: the first is forgotten
        run.finish()
        run.advance(0.1)
        assert not run.state.names()[1]
    assert [result["text"] for result in run.results()] == ["hello", "another"]


def test_calls_of_one_key_run_in_turn_from_the_uncommitted_state():
    with Harness(Counting()) as run:
        for i in range(50):
            run.send(request(i, session=f"s{i % 5}"))
        run.finish()
    counts = {}
    for result in run.results():
        key = int(result["request_id"][1:]) % 5
        counts.setdefault(key, []).append(result["count"])
    assert all(found == list(range(1, 11)) for found in counts.values())


@pytest.mark.parametrize("ordered", [False, True])
def test_a_repeat_that_runs_for_its_first_keeps_its_place_in_the_order_of_state(ordered):
    class Seen(AsyncUdf):
        stateful, failed = True, False

        async def call(self, request: dict, ctx):
            ctx.state["seen"] = seen = [*ctx.state.get("seen", []), request["n"]]
            await asyncio.sleep(0.5)
            if not Seen.failed:
                Seen.failed = True
                raise RecordError("invalid", "once")
            return {"n": request["n"], "seen": seen}

    with Harness(Seen(), settings=OperatorSettings(ordered=ordered)) as run:
        for request_id, number in (("r1", 1), ("r1", 1), ("r2", 2)):
            run.send({"session_id": "a", "request_id": request_id, "n": number})
        run.finish()
        run.send({"session_id": "a", "request_id": "r3", "n": 3})
        run.finish()
    assert [result["seen"] for result in run.results()] == [[1], [1, 2], [1, 2, 3]]
    assert [failure["request_id"] for failure in run.failures()] == ["r1"]


def test_a_failed_call_changes_no_state():
    with Harness(Counting()) as run:
        for number, text in enumerate(["ok", "fail", "bad", "ok"]):
            run.send(request(number, text=text))
        run.finish()
    assert [result["count"] for result in run.results()] == [1, 2]
    assert [failure["code"] for failure in run.failures()] == ["handler_error", "bad_state"]


def test_a_crash_loses_nothing_and_runs_again_in_order():
    Plain.release.clear()
    with Harness(Plain()) as run:
        for i in range(20):
            run.send(request(i, text="hold"))
        state = run.checkpoint()
    Plain.release.set()
    settings = OperatorSettings(ordered=True)
    with Harness(Plain(), state=state, settings=settings) as again:
        again.finish()
    assert [result["request_id"] for result in again.results()] == [f"r{i}" for i in range(20)]
    assert again.state.names()[0] == []


def test_state_is_committed_with_the_outcome_and_never_twice():
    with Harness(Counting()) as run:
        for i in range(10):
            run.send(request(i))
        run.finish()
        state = run.checkpoint()
    with Harness(Counting(), state=state) as again:
        again.send(request(3))  # answered before the crash
        again.send(request(10))
        again.finish()
    assert sorted(result["count"] for result in again.results()) == [4, 11]


def test_state_of_another_shard_count_is_refused_with_both():
    with Harness(Plain(), settings=OperatorSettings(shards=16)) as run:
        state = run.checkpoint()
    other = Harness(Plain(), settings=OperatorSettings(shards=8), state=state)
    with pytest.raises(StateError, match=r"shards=16 .*; the job says shards=8"):
        other.__enter__()
    other.runner.close()


def test_a_deadline_cancels_the_call_and_the_model():
    services = FakeServices({"echo": Script(fault="hang")})

    class Strict(Streaming):
        on_deadline = "failure"

    with Harness(Strict(), services) as run:
        run.send(request(1, deadline=0.05))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["deadline"]
    assert services.backend.cancelled == 1


def test_a_deadline_in_mid_reply_gives_the_part_there_is():
    services = FakeServices({"echo": Script(tokens=100, first_ms=1, gap_ms=20)})
    with Harness(Streaming(), services) as run:
        run.send(request(1, text="x" * 100, deadline=0.2))
        run.finish()
    (result,) = run.results()
    assert result["finish_reason"] == "deadline"
    assert 0 < len(result["text"]) < 100
    assert "".join(token["text"] for token in run.partials()).startswith(result["text"])
    assert services.backend.cancelled == 1


def test_a_handler_has_a_moment_for_a_reply_that_its_deadline_cut_short():
    class Storing(AsyncUdf):
        async def open(self, ctx):
            self.model = ctx.model("echo")

        async def call(self, request: ChatRequest, ctx) -> ChatResponse:
            reply = self.model.chat(request.messages)
            await reply
            await asyncio.sleep(0.2)  # it is stored somewhere
            return reply.response

    with Harness(Storing(), FakeServices({"echo": Script(text="one two three", tokens=3, gap_ms=1000)})) as run:
        run.send(request(1, deadline=1.5))
        run.finish()
    assert [result["finish_reason"] for result in run.results()] == ["deadline"]


def test_a_call_that_never_ends_is_abandoned():
    with Harness(Plain()) as run:
        run.send(request(1, text="stubborn", deadline=0.05))
        run.send(request(2))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["deadline"]


def test_an_outage_is_waited_out():
    with Harness(Plain()) as run:
        run.send(request(1, text="outage", deadline=0.15))
        run.finish()
    assert len(run.results()) == 1
    assert not run.failures()


@pytest.mark.parametrize("failures", [0, 2])  # of an open circuit both are the probe
def test_an_outage_in_a_task_group_is_an_outage(failures):
    class Both(AsyncUdf):
        async def open(self, ctx):
            self.model = ctx.model("echo")

        async def call(self, request: dict, ctx):
            async def one():
                return (await self.model.generate("hi")).text

            async with asyncio.TaskGroup() as group:
                said = [group.create_task(one()) for _ in range(2)]
            return {"said": [task.result() for task in said]}

    services = FakeServices({"echo": Script(text="yes", first_ms=500)}, breaker=BreakerSettings(failures=failures))
    with Harness(Both(), services) as run:
        run.send({"session_id": "a"})
        run.advance(0.1)
        run.outage(3.0)
        run.finish()
    assert (run.results(), run.failures()) == ([{"said": ["yes", "yes"]}], [])


def test_the_clock_of_a_record_stands_still_while_a_part_is_out():
    with Harness(Plain()) as run:
        run.outage(0.35)
        run.send(request(1, text="sleep 0.4", deadline=0.2))
        run.finish()
    assert len(run.results()) == 1


def test_with_on_outage_deadline_the_clock_runs_on():
    settings = OperatorSettings(on_outage="deadline", deadline=0.3)

    class Down(AsyncUdf):
        async def call(self, request: ChatRequest, ctx):
            raise Outage("told to")

    with Harness(Down(), settings=settings) as run:
        run.send(request(1))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["outage"]


def test_overloaded_is_tried_again_until_the_deadline():
    with Harness(Plain()) as run:
        run.send(request(1, text="overloaded", deadline=0.1))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["overloaded"]
    assert run.runner.metrics.counts["overloaded"] > 2


def test_order_is_kept_by_key_when_asked_for():
    settings = OperatorSettings(ordered=True)
    with Harness(Plain(), settings=settings) as run:
        for i, delay in enumerate([0.05, 0.0, 0.03, 0.0]):
            run.send(request(i, text=f"sleep {delay}"))
        run.finish()
    assert [result["request_id"] for result in run.results()] == ["r0", "r1", "r2", "r3"]


def test_a_place_is_free_when_the_outcome_could_be_emitted():
    settings = OperatorSettings(capacity=2)
    with Harness(Plain(), settings=settings) as run:
        began = time.monotonic()
        for i in range(6):  # nothing is emitted between these: capacity must not wait for it
            run.outputs += run.shard.receive(run._keyer.arrive(_arrival(request(i)))[1].to_bytes())
        assert time.monotonic() - began < 0.9
        run.finish()
    assert len(run.results()) == 6


def test_an_eighth_of_the_places_is_read_ahead_and_begins_without_flinks_thread():
    running = []

    class Held(AsyncUdf):
        async def call(self, request: ChatRequest, ctx):
            running.append(request.request_id)
            await asyncio.to_thread(Plain.release.wait, 10)
            return {"request_id": request.request_id}

    Plain.release.clear()
    with Harness(Held(), settings=OperatorSettings(capacity=8)) as run:
        began = time.monotonic()
        for i in range(9):
            run.send(request(i))
        assert time.monotonic() - began < 0.9  # the ninth did not wait for a place
        time.sleep(0.1)
        assert len(running) == 8
        Plain.release.set()
        deadline = time.monotonic() + 5
        while len(running) < 9 and time.monotonic() < deadline:
            time.sleep(0.01)  # nothing is submitted or emitted meanwhile
        assert len(running) == 9
        run.finish()
    assert len(run.results()) == 9


def test_a_deadline_passes_for_what_is_read_ahead():
    Plain.release.clear()
    with Harness(Plain(), settings=OperatorSettings(capacity=8, deadline=10), real_time=True) as run:
        for i in range(8):
            run.send(request(i, text="hold"))
        run.send(request(8, deadline=0.1))
        time.sleep(0.3)
        run.advance(0)
        assert [failure["code"] for failure in run.failures()] == ["deadline"]
        Plain.release.set()
        run.finish()
    assert len(run.results()) == 8


def test_a_full_operator_gives_way_after_its_patience():
    Plain.release.clear()
    settings = OperatorSettings(capacity=1)
    with Harness(Plain(), settings=settings, real_time=True) as run:
        began = time.monotonic()
        for i in range(2):  # the harness would wait for longer
            run.outputs += run.shard.receive(run._keyer.arrive(_arrival(request(i, text="hold")))[1].to_bytes())
        waited = time.monotonic() - began
        Plain.release.set()
        run.finish()
    assert 0.9 * PATIENCE_S < waited < 3
    assert len(run.results()) == 2


def test_many_partials_flow_without_end():
    class Chatty(AsyncUdf):
        async def call(self, request: ChatRequest, ctx):
            for i in range(20_000):
                await ctx.emit({"n": i})
            return {"request_id": request.request_id}

    with Harness(Chatty()) as run:
        run.send(request(1))
        run.finish(30)
    assert [partial["n"] for partial in run.partials()] == list(range(20_000))
    assert len(run.results()) == 1


def test_emitting_after_the_end_is_refused():
    caught = []

    class Late(AsyncUdf):
        async def call(self, request: ChatRequest, ctx):
            async def later():
                await asyncio.sleep(0.05)
                try:
                    await ctx.emit({"late": True})
                except RuntimeError as error:
                    caught.append(str(error))

            self.task = asyncio.create_task(later())
            return {"request_id": request.request_id}

    with Harness(Late()) as run:
        run.send(request(1))
        run.finish()
        run.advance(0.1)
    assert caught == ["ctx.emit after the call has ended"]
    assert not run.partials()


def test_reply_to_outside_the_list_is_refused_and_inside_it_sets_the_topic():
    settings = OperatorSettings(reply_topics=["here"])
    with Harness(Plain(), settings=settings) as run:
        run.send(request(1, reply_to="here"))
        run.send(request(2, reply_to="elsewhere"))
        run.finish()
    assert [output.topic for output in run.outputs if output.kind == "result"] == ["here"]
    assert [failure["code"] for failure in run.failures()] == ["bad_reply_to"]


def test_a_result_too_large_for_its_topic_is_a_failure():
    with Harness(Plain(), settings=OperatorSettings(max_result_bytes=100)) as run:
        run.send(request(1, text="x" * 200))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["result_too_large"]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_repeat_with_larger_headers_is_too_large_too(at_once):
    asked, headers = {"session_id": "a", "request_id": "r"}, {"h": b"z" * 5000}

    class Long(AsyncUdf):
        async def call(self, request: dict, ctx):
            return {"x": "x" * 900}

    with Harness(Long(), settings=OperatorSettings(max_result_bytes=1000)) as run:
        run.send(asked)
        if not at_once:
            run.finish()
        run.send(asked, headers=headers)
        run.send(asked)
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["result_too_large"]
    assert len(run.results()) == 2


def test_a_handler_that_cannot_open_says_so_in_one_line():
    class Broken(AsyncUdf):
        async def open(self, ctx):
            raise ValueError("no such thing")

        async def call(self, request: ChatRequest, ctx):
            return {}

    with pytest.raises(FlinkLlmError, match=r"^Broken\.open failed: ValueError: no such thing$"):
        Harness(Broken()).__enter__()


def _arrival(record):
    from flink_llm import codec
    from flink_llm.arrivals import Arrival

    return Arrival(value=codec.encode(record), from_kafka=True, topic="t", partition=0, offset=0)
