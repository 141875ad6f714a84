"""The kit for handlers' tests: a clock that jumps, scripted services, crashes, and what a reader makes of it all."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm.breakers import BreakerSettings
from flink_llm.call import OperatorSettings
from flink_llm.errors import CircuitOpen, ConfigError, FlinkLlmError, Overloaded
from flink_llm.handler import AsyncUdf
from flink_llm.records import ChatRequest, ChatResponse, Message
from flink_llm.testing import FakeFeatures, FakeServices, Harness, Reader, Script, timing

TOKENS = ["Where", " is", " my", " order", "?"]


def request(number=1, text="hello", **fields):
    return ChatRequest(request_id=f"r{number}", session_id="s", messages=[Message("user", text)], **fields)


class Reply(AsyncUdf):
    stateful = True

    async def open(self, ctx):
        self.model = ctx.model("m")

    async def call(self, request: ChatRequest, ctx) -> ChatResponse:
        ctx.state["turns"] = ctx.state.get("turns", 0) + 1
        reply = self.model.chat(request.messages)
        async for token in reply:
            await ctx.emit(token)
        return reply.response


class Doing(AsyncUdf):
    def __init__(self, what):
        self.what = what

    async def call(self, request: dict, ctx):
        return await self.what(request, ctx)


class Reading(AsyncUdf):
    async def open(self, ctx):
        self.users = ctx.features("users")

    async def call(self, request: dict, ctx):
        row = await self.users.get(user_id=request["user_id"])
        return {**row, "found": row.found, "stale": row.stale, "age_s": row.age_s}


def slow(*more):
    return FakeServices({"m": [Script(tokens=TOKENS, first_ms=1000, gap_ms=500), *more]})


# The clock.


def test_minutes_pass_without_waiting_and_in_order():
    async def call(request, ctx):
        await asyncio.sleep(request["s"])
        return {"s": request["s"]}

    began = time.monotonic()
    with Harness(Doing(call), settings=OperatorSettings(deadline=None), key="s") as run:
        for seconds in (1200, 60, 600):
            run.send({"s": seconds})
        run.advance(599)
        assert run.results() == [{"s": 60}]
        run.advance(1)
        assert run.results()[1:] == [{"s": 600}]
        run.finish()
    assert run.results()[2:] == [{"s": 1200}]
    assert time.monotonic() - began < 60


def test_no_time_passes_unless_it_is_let():
    with Harness(Reply(), slow()) as run:
        run.send(request())
        time.sleep(0.05)
        run.advance(0.999)
        assert run.outputs == []
        run.advance(0.001)
        assert [token["text"] for token in run.partials()] == ["Where"]
        run.finish()
    assert run.results()[0]["timings"]["first_token_ms"] == 1000
    assert run.results()[0]["timings"]["total_ms"] == pytest.approx(3000)


def test_a_deadline_is_met_on_the_virtual_clock():
    with Harness(Reply(), slow()) as run:
        run.send(request(deadline=1.7))
        run.finish()
        assert run.loop.time() == pytest.approx(1.7, abs=0.05)
    assert (run.results()[0]["text"], run.results()[0]["finish_reason"]) == ("Where is", "deadline")


def test_an_answer_is_remembered_for_its_time_to_live():
    services = FakeServices({"m": Script()})
    with Harness(Reply(), services, settings=OperatorSettings(remember_s=600)) as run:
        run.send(request())
        run.finish()
        run.advance(599)
        run.send(request())
        run.finish()
        assert services.backend.started == 1
        run.advance(2)
        run.send(request())
        run.finish()
    assert services.backend.started == 2
    assert len(run.results()) == 3


def test_time_waits_for_a_job_in_another_thread():
    async def call(request, ctx):
        await asyncio.to_thread(time.sleep, 0.05)
        return {"left": ctx.deadline}

    with Harness(Doing(call), key="k") as run:
        run.send({"k": "a", "deadline": 0.01})
        run.finish()
    assert run.results()[0]["left"] == pytest.approx(0.01, abs=0.002)


def test_a_handler_that_blocks_its_loop_is_told_of(monkeypatch):
    monkeypatch.setattr(timing, "BUSY_S", 0.1)

    async def call(request, ctx):
        time.sleep(0.5)  # noqa: ASYNC251
        return {}

    with Harness(Doing(call), key="k") as run, pytest.raises(TimeoutError, match="it blocks where it should await"):
        run.send({"k": "a"})


def test_what_never_ends_is_told_of():
    services = FakeServices({"m": Script(fault="hang")})
    with Harness(Reply(), services, settings=OperatorSettings(deadline=None)) as run:
        run.send(request())
        with pytest.raises(TimeoutError, match="1 records are still in flight"):
            run.finish(5)


def test_a_full_operator_reads_on_when_it_has_a_place():
    with Harness(Reply(), slow(), settings=OperatorSettings(capacity=1)) as run:
        for number in range(3):
            run.send(request(number))
        assert run.loop.time() == pytest.approx(6.0, abs=0.01)  # two have ended, 3 s each
        assert len(run.results()) == 2
        run.finish()
    assert len(run.results()) == 3


def test_a_full_operator_holds_what_is_sent_in_real_time_too():
    async def call(request, ctx):
        await asyncio.sleep(0.2)
        return request

    with Harness(Doing(call), key="n", settings=OperatorSettings(capacity=2), real_time=True) as run:
        for number in range(6):
            run.send({"n": number})
            assert run.shard.in_flight <= 2
        assert len(run.results()) >= 4
        run.finish()
    assert len(run.results()) == 6


def test_another_harness_goes_on_where_the_clock_of_the_checkpoint_was():
    services, settings = FakeServices({"m": Script()}), OperatorSettings(remember_s=600)
    with Harness(Reply(), services, settings=settings) as run:
        run.advance(300)
        run.send(request())
        run.finish()
        taken, at = run.checkpoint(), run.loop.wall()
    with Harness(Reply(), services, settings=settings, state=taken) as again:
        assert again.loop.wall() == pytest.approx(at)
        again.advance(590)
        again.send(request())
        again.finish()
        assert services.backend.started == 1
        again.advance(20)
        again.send(request())
        again.finish()
    assert services.backend.started == 2


def test_real_time_is_real():
    async def call(request, ctx):
        reader, writer = await asyncio.open_connection("127.0.0.1", request["port"])
        said = await reader.read()
        writer.close()
        return {"said": said.decode()}

    async def serve(reader, writer):
        await asyncio.sleep(0.05)
        writer.write(b"hello")
        writer.close()

    with Harness(Doing(call), key="port", real_time=True) as run:
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), run.loop).result()
        run.send({"port": server.sockets[0].getsockname()[1]})
        run.finish()
    assert run.results() == [{"said": "hello"}]


# Services.


def test_scripts_are_taken_in_turn():
    full = Script(fault="overloaded")
    services = FakeServices({"m": [full, full, Script(text="room")]})
    with Harness(Reply(), services) as run:
        run.send(request())
        run.finish()
        assert run.runner.metrics.counts["overloaded"] == 2
    assert run.results()[0]["text"] == "room"


def test_a_handler_may_fall_back_on_a_smaller_model():
    class Degrading(AsyncUdf):
        async def open(self, ctx):
            self.large, self.small = ctx.model("large"), ctx.model("small")

        async def call(self, request: ChatRequest, ctx) -> ChatResponse:
            try:
                return (await self.large.chat(request.messages)).response
            except Overloaded:
                return (await self.small.chat(request.messages)).response

    models = {"large": Script(fault="overloaded"), "small": Script(text="short")}
    with Harness(Degrading(), FakeServices(models)) as run:
        run.send(request())
        run.finish()
    assert [(each["model"], each["text"]) for each in run.results()] == [("small", "short")]


def test_a_model_may_fail_in_mid_reply_and_answer_by_what_it_is_asked():
    broken = Script(tokens=TOKENS, fault="model_error", fault_after=2)
    with Harness(Reply(), FakeServices({"m": [broken, Script(answers={"order": "Tomorrow."})]})) as run:
        for number, text in enumerate(("hello", "my order?", "hello")):
            run.send(request(number, text))
        run.finish()
    assert [failure["code"] for failure in run.failures()] == ["model_error"]
    assert [token["text"] for token in run.partials()][:2] == TOKENS[:2]
    assert [result["text"] for result in run.results()] == ["Tomorrow.", "hello"]


def test_tokens_have_waits_of_their_own():
    with Harness(Reply(), FakeServices({"m": Script(tokens=["a", "b", "c"], gap_ms=[100, 2000])})) as run:
        run.send(request())
        seen = [len(run.partials())]
        for seconds in (0.15, 1.9, 0.1):
            run.advance(seconds)
            seen.append(len(run.partials()))
    assert seen == [1, 2, 2, 3]


def test_an_outage_is_waited_out_and_the_record_is_answered_after_it():
    services = slow()
    with Harness(Reply(), services) as run:
        run.send(request(deadline=5))
        run.advance(1.6)
        run.outage(120, of="m")
        run.advance(119)
        assert services.outage_since is not None
        assert run.results() == run.failures() == []
        run.finish()
        assert 120 < run.loop.time() < 140
    assert services.outage_since is None
    assert run.results()[0]["text"] == "".join(TOKENS) == run.reader().text("r1")


def test_features_age_and_can_be_written():
    users = FakeFeatures({"a": {"n": 1}, "b": {"n": 2}}, max_age_s=60, age_s={"b": 50}, delay_s=0.01)
    with Harness(Reading(), FakeServices(features={"users": users}), key="user_id") as run:
        run.advance(20)
        for name in ("a", "b", "c"):
            run.send({"user_id": name})
        run.finish()
        users.write("b", n=3)
        run.send({"user_id": "b"})
        run.finish()
    *read, again = run.results()
    a, b, c = sorted(read, key=lambda result: result["user_id"])
    assert (a["n"], a["found"], round(a["age_s"])) == (1, True, 20)
    assert (b["n"], b["found"], b["stale"], b["age_s"]) == (None, False, True, None)
    assert (c["n"], c["found"], c["stale"]) == (None, False, False)
    assert (again["n"], round(again["age_s"])) == (3, 0)


def test_features_out_or_misread_are_as_with_a_real_store():
    class Wrong(Reading):
        async def call(self, request: dict, ctx):
            return dict(await self.users.get(order_id=1))

    tables = {"users": {"a": {"n": 1}}}
    with Harness(Reading(), FakeServices(features=tables), key="user_id") as run:
        run.outage(3, of="users")
        run.send({"user_id": "a"})
        run.finish()
        assert run.loop.time() > 3
    assert run.results()[0]["n"] == 1
    with Harness(Wrong(), FakeServices(features=tables), key="user_id") as run:
        run.send({"user_id": "a"})
        run.finish()
    assert "read by user_id, not by order_id" in run.failures()[0]["message"]
    with pytest.raises(ConfigError, match="users"):
        FakeServices(features=tables).features("user")


def test_features_have_a_name_and_say_their_keys_once_they_are_open():
    class Keys(AsyncUdf):
        async def open(self, ctx):
            self.users = ctx.features("users")
            with pytest.raises(ConfigError, match=r"the features users are not open yet: ask .* in call\(\)"):
                _ = self.users.join_keys

        async def call(self, request: dict, ctx):
            return {"keys": self.users.join_keys, "name": self.users.name}

    with Harness(Keys(), FakeServices(features={"users": {}})) as run:
        run.send({"session_id": "s"})
        run.crash()
        run.finish()
    assert run.results() == [{"keys": ["user_id"], "name": "users"}]


@pytest.mark.parametrize(("key", "code"), [(True, "invalid"), (1.5, "invalid"), ({"a": 1}, "invalid"), (7, None)])
def test_features_refuse_a_key_that_is_no_text(key, code):
    class Asking(Reading):
        async def call(self, request: dict, ctx):
            return {**await self.users.get(user_id=key)}

    with Harness(Asking(), FakeServices(features={"users": {str(key): {"n": 1}}})) as run:
        run.send({"session_id": "s"})
        run.finish()
    assert [failure["code"] for failure in run.failures()] == [code] * (code is not None)
    assert run.results() == ([] if code else [{"user_id": "7", "n": 1}])


def test_features_of_no_key_are_absent_and_no_read_of_the_store():
    with Harness(Reading(), FakeServices(features={"users": {"None": {"n": 1}}})) as run:
        run.outage(60, of="users")
        run.send({"session_id": "s", "user_id": None})
        run.finish()
        assert run.loop.time() < 1
    assert run.results() == [{"user_id": None, "n": None, "found": False, "stale": False, "age_s": None}]


def test_features_that_fail_are_left_alone_and_probed_as_in_a_job():
    class Told(Reading):
        async def call(self, request: dict, ctx):
            try:
                return await super().call(request, ctx)
            except CircuitOpen:
                return {"open": True}

    services = FakeServices(features={"users": {"a": {"n": 1}}}, breaker=BreakerSettings(failures=2, reset_s=5.0))
    with Harness(Told(), services, key="user_id") as run:
        run.outage(12, of="users")
        run.send({"user_id": "a"})
        run.advance(4)
        assert run.results() == [{"open": True}]
        run.advance(10.9)
        run.send({"user_id": "a"})
        assert run.results() == [{"open": True}] * 2, "it has been back for a while, and nobody has looked"
        run.advance(0.2)
        assert services.outage_since is None, "without a record that asks for it"
        run.send({"user_id": "a"})
        run.finish()
    assert run.results()[2]["n"] == 1


def test_a_circuit_opens_as_in_a_job_unless_the_test_says_otherwise():
    class Either(AsyncUdf):
        async def open(self, ctx):
            self.models = {name: ctx.model(name) for name in ("dead", "well")}

        async def call(self, request: dict, ctx):
            return {"said": (await self.models[request["model"]].generate("x")).text}

    models = {"dead": [*[Script(fault="outage")] * 20, Script(text="back")], "well": Script(text="here")}
    for breaker, waits in (({}, True), ({"breaker": BreakerSettings(failures=0)}, False)):
        with Harness(Either(), FakeServices(models, **breaker)) as run:
            run.send({"session_id": "a", "model": "dead", "deadline": 5})
            for _ in range(60):  # others are answered meanwhile
                run.send({"session_id": "b", "model": "well"})
                run.advance(0.1)
            run.finish()
        assert len(run.failures()) == (not waits)
        assert ({"said": "back"} in run.results()) == waits


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("embed", "", "there is no text"),
        ("classify", " \n", "there is no text"),
        ("tag", "", "there is no text"),
        ("rerank", ("", ["a"]), "there is no text"),
        ("rerank", ("a", []), "there are no documents"),
        ("rerank", ("a", ["b", " "]), "there is no text in document 1"),
    ],
)
def test_an_encoder_refuses_what_has_no_text(kind, asked, message):
    class Encoding(AsyncUdf):
        async def open(self, ctx):
            self.encoder = getattr(ctx, kind)("m")

        async def call(self, request: dict, ctx):
            await self.encoder(*(asked if isinstance(asked, tuple) else [asked]))
            return {}

    kinds = {"embed": "embedding", "classify": "classifier", "tag": "token_classifier", "rerank": "reranker"}
    with Harness(Encoding(), FakeServices({"m": Script(kind=kinds[kind], labels=["a"])})) as run:
        run.send({"session_id": "s"})
        run.finish()
    assert [(each["code"], each["message"]) for each in run.failures()] == [("empty_text", message)]


def test_a_classifier_gives_the_label_that_the_test_says():
    class Sorting(AsyncUdf):
        async def open(self, ctx):
            self.sort = ctx.classify("c")

        async def call(self, request: dict, ctx):
            return {"label": (await self.sort(request["text"])).label}

    script = Script(kind="classifier", labels=["ham", "spam"], answers={"prize": "spam"})
    with Harness(Sorting(), FakeServices({"c": script}), key="text") as run:
        run.send({"text": "you won a prize"})
        run.send({"text": "hello"})
        run.finish()
    assert [result["label"] for result in run.results()] == ["spam", "ham"]


# Crashes.


@settings(deadline=None, max_examples=40)
@given(crash_at=st.integers(1, 18), checkpoint_at=st.integers(0, 4), exactly_once=st.booleans())
def test_a_crash_anywhere_loses_nothing_and_the_reader_reads_the_final_text(crash_at, checkpoint_at, exactly_once):
    delivery = "exactly_once" if exactly_once else "at_least_once"
    with Harness(Reply(), slow(), delivery=delivery) as run:
        run.crash_after(crash_at)
        for number in range(3):
            if number == checkpoint_at:
                run.checkpoint()
            run.send(request(number))
            run.advance(0.8)
        run.finish()
        assert run.crashes == 1
        results = run.results()
        if exactly_once:
            assert sorted(result["request_id"] for result in results) == ["r0", "r1", "r2"]
        assert run.reader().texts() == dict.fromkeys(["r0", "r1", "r2"], "".join(TOKENS))
        run.send(request(9))
        run.finish()
        assert run.state.state("s") == b"\x01\x81\xa5turns\x04"  # each record once


def test_a_generation_goes_on_while_its_worker_is_down():
    services = slow()
    with Harness(Reply(), services) as run:
        run.send(request())
        run.advance(1.6)
        run.crash()
        assert [token["sequence"] for token in run.partials()] == [0, 1, 0, 1]  # at least once
        run.finish()
        assert run.loop.time() == pytest.approx(3.0, abs=0.01)
    assert services.backend.started == 1
    assert len({token["generation_id"] for token in run.partials()}) == 1


def test_a_generation_that_starts_anew_has_an_id_of_its_own():
    with Harness(Reply(), slow(Script(text="Something else."))) as run:
        run.send(request())
        run.advance(1.6)
        run.outage(1)  # the model loses what it was saying
        run.finish()
    assert len({token["generation_id"] for token in run.partials()}) == 2
    assert run.reader().texts() == {"r1": "Something else."}


def test_what_was_written_since_the_checkpoint_is_written_again():
    async def call(request, ctx):
        return {"n": request["n"]}

    for delivery, seen in (("exactly_once", [0, 1, 2]), ("at_least_once", [0, 1, 2, 1, 2])):
        with Harness(Doing(call), key="n", delivery=delivery) as run:
            for n in range(3):
                run.send({"n": n})
                if n == 0:
                    run.checkpoint()
            run.crash()
            run.finish()
        assert [result["n"] for result in run.results()] == seen


def test_a_worker_after_a_crash_has_a_handler_of_its_own_and_the_killed_one_is_not_closed():
    closed = []

    class Counting(AsyncUdf):
        def __init__(self):
            self.calls = 0

        async def call(self, request: dict, ctx):
            self.calls += 1
            return {"calls": self.calls}

        async def close(self):
            closed.append(self.calls)

    with Harness(Counting(), key="n") as run:
        run.send({"n": 1})
        run.checkpoint()
        run.crash()
        run.send({"n": 2})
        run.send({"n": 3})
    assert [result["calls"] for result in run.results()] == [1, 1, 2]
    assert closed == [2]


def test_a_handler_that_cannot_be_carried_to_another_worker_is_told_of():
    class Holding(Doing):
        def __init__(self):
            self.lock = __import__("threading").Lock()

    with (
        Harness(Holding(), key="k") as run,
        pytest.raises(TypeError, match=r"^Holding cannot be copied .* in open\(\)"),
    ):
        run.crash()


def test_a_late_record_is_as_old_as_it_says():
    async def call(request, ctx):
        return {"timestamp": ctx.timestamp}

    with Harness(Doing(call), key="k") as run:
        now = run.loop.wall() * 1000
        run.send({"k": 1}, age=90)
        run.finish()
    assert run.results()[0]["timestamp"] == pytest.approx(now - 90_000, abs=1)
    assert run.outputs[0].timestamp == run.results()[0]["timestamp"]


def test_a_handler_that_cannot_open_leaves_no_thread():
    class Broken(AsyncUdf):
        async def open(self, ctx):
            ctx.model("other")

        async def call(self, request: dict, ctx):
            return {}

    run = Harness(Broken(), FakeServices({"m": Script()}))
    with pytest.raises(FlinkLlmError, match="no script for the model 'other', only for m"):
        run.__enter__()
    assert not run.runner._thread.is_alive()


def test_a_record_without_the_key_says_which_field_it_lacks():
    with Harness(Reading(), FakeServices(features={"users": {}})) as run:
        run.send({"user_id": "a"})
        run.finish()
    assert (run.results(), run.failures()[0]["code"]) == ([], "bad_key")
    assert "it has no field 'session_id', or null there" in run.failures()[0]["message"]


# Reader.


def test_a_reader_says_what_is_missing_or_changed():
    def token(sequence, text="x"):
        return {"request_id": "r", "generation_id": "g", "sequence": sequence, "text": text}

    reader = Reader()
    reader.token(token(0))
    reader.token(token(2))
    with pytest.raises(ValueError, match="no result of 'r', only of none"):
        reader.text("r")
    reader.result({"request_id": "r", "generation_id": "g"})
    with pytest.raises(ValueError, match="token 1 of r is missing in generation g"):
        reader.texts()
    with pytest.raises(ValueError, match="token 2 of r was 'x' before, now 'y'"):
        reader.token(token(2, "y"))


@pytest.mark.parametrize("at", range(1, 5))
def test_a_crash_while_the_operator_is_full_reads_on_where_it_was(at):
    class Slow(AsyncUdf):
        async def call(self, request: dict, ctx) -> dict:
            await asyncio.sleep(1)
            return request

    with Harness(Slow(), settings=OperatorSettings(capacity=1)) as run:
        run.crash_after(at)
        for number in range(5):
            run.send({"session_id": "a", "n": number})
        run.finish()
    assert [result["n"] for result in run.results()] == list(range(5))
    assert run.crashes == 1
