"""What a handler holds, over scripted models in process."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from flink_llm.engine.faults import fault_error
from flink_llm.engine.generation import (
    AWAITED_TOLD_S,
    CallInfo,
    Generation,
    Model,
    current_call,
    work_id,
)
from flink_llm.engine.options import default_seed
from flink_llm.engine.protocol import Done, Event, Fault, Options, Submit
from flink_llm.engine.readers import Classifier, Embedder, Reranker, Tagger
from flink_llm.engine.work import Events, WorkTable
from flink_llm.errors import ConfigError, Outage, Overloaded, RecordError
from flink_llm.feature_row import FeatureRow
from flink_llm.records import Message, TokenRecord, Usage
from flink_llm.testing import Script, ScriptedBackend

SCRIPTS = {
    "echo": Script(tokens=3),
    "slow": Script(text="one two three four ", tokens=4, gap_ms=40),
    "endless": Script(text="once upon a time", tokens=4, gap_ms=3600_000),
    "poison": Script(fault="context_overflow"),
    "full": Script(fault="overloaded"),
    "embed": Script(kind="embedding", dimension=4),
    "classify": Script(kind="classifier", labels=["refund", "praise"]),
}
HELLO = [Message("user", "abcdef")]


class Stage:
    """An engine of scripts, and the models on it."""

    def __init__(self) -> None:
        self.backend = ScriptedBackend(SCRIPTS)
        self.engine = WorkTable(self.backend)

    async def model(self, name: str) -> Model:
        model = Model(self.engine, name, name)
        await model.load()
        return model


def call_info(**changed: Any) -> CallInfo:
    plain = {"job": "job", "operator": "op", "key": "k", "request_id": "r1", "session_id": "s1"}
    return CallInfo(**(plain | changed))


def run(case: Callable[[Stage], Awaitable[None]]) -> CallInfo:
    """Runs a case as the work on one record."""
    info = call_info()

    async def main() -> None:
        current_call.set(info)
        await asyncio.wait_for(case(Stage()), 10)

    asyncio.run(main())
    assert not info.open_generations
    return info


def test_reply_comes_in_pieces_and_as_a_whole() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("echo")).chat(HELLO)
        pieces = [piece async for piece in reply]
        assert pieces == [
            TokenRecord(request_id="r1", generation_id=reply.generation_id, sequence=n, text=text)
            for n, text in enumerate(["ab", "cd", "ef"])
        ]
        assert (reply.text, reply.finish_reason) == ("abcdef", "stop")
        assert reply.usage == Usage(prompt_tokens=0, completion_tokens=3)
        assert reply.message == Message("assistant", "abcdef")
        response = reply.response
        assert (response.request_id, response.session_id, response.text) == ("r1", "s1", "abcdef")
        assert (response.model, response.model_hash) == ("echo", hashlib.sha256(b"echo").hexdigest())
        assert response.generation_id == reply.generation_id != ""
        assert response.timings.total_ms > 0

    assert run(case).last_generation != ""


def test_await_runs_to_the_end_and_gives_the_reply_itself() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("echo")).generate("abc")
        assert await reply is reply
        assert reply.text == "abc"
        assert await reply is reply
        assert [piece async for piece in reply] == []
        assert stage.backend.started == 1

    run(case)


def test_a_reply_that_is_awaited_is_told_in_fewer_pieces_and_is_the_same_work() -> None:
    asked: list[Submit] = []

    async def case(stage: Stage) -> None:
        submit = stage.engine.submit
        stage.engine.submit = lambda work: asked.append(work) or submit(work)  # type: ignore[assignment,func-returns-value]
        model = await stage.model("echo")
        await model.chat(HELLO)
        current_call.get().counts.clear()  # as after a restore
        assert [piece async for piece in model.chat(HELLO)]
        reply = model.chat(HELLO)
        await anext(reply)
        await reply

    run(case)
    assert [work.told_every for work in asked] == [AWAITED_TOLD_S, 0, 0], "somebody reads the others as they come"
    assert asked[0].work == asked[1].work


def test_nothing_starts_before_it_is_asked_for() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("echo")).chat(HELLO)
        await asyncio.sleep(0.01)
        assert stage.backend.started == 0
        assert (reply.text, reply.finish_reason) == ("", "cancelled")

    run(case)


def test_reader_that_left_goes_on_where_it_was() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("slow")).chat(HELLO)
        async for _ in reply:
            break
        assert [piece.sequence async for piece in reply] == [1, 2, 3]
        assert reply.text == "one two three four "

    run(case)


def test_turns_may_be_records_or_dicts() -> None:
    async def case(stage: Stage) -> None:
        model = await stage.model("echo")
        turns = [{"role": "user", "content": "x"}, Message("user", "abcdef")]
        assert (await model.chat(turns)).text == "abcdef"

    run(case)


def test_features_and_their_age_are_in_the_response() -> None:
    async def case(stage: Stage) -> None:
        row = FeatureRow({"orders": 3}, age_s=1.5, found=True)
        response = (await (await stage.model("echo")).chat(HELLO, features=row)).response
        assert (response.features, response.feature_age_s) == ({"orders": 3}, 1.5)

    run(case)


def test_deadline_keeps_what_was_read_and_stops_the_model() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("endless")).chat(HELLO)
        asyncio.get_running_loop().call_later(0.05, reply.expire)
        assert [piece.text async for piece in reply] == ["once"]
        assert (reply.text, reply.finish_reason) == ("once", "deadline")
        assert reply.response.finish_reason == "deadline"
        assert stage.backend.cancelled == 1
        assert await reply is reply

    run(case)


def test_deadline_between_two_reads_drops_what_was_not_read() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("echo")).chat(HELLO)
        first = await anext(reply)
        reply.expire()
        assert [piece async for piece in reply] == []
        assert reply.text == first.text == "ab"
        assert reply.finish_reason == "deadline"

    run(case)


def test_cancel_stops_the_model() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("endless")).chat(HELLO)
        await anext(reply)
        reply.cancel()
        reply.expire()
        assert (reply.text, reply.finish_reason) == ("once", "cancelled")
        assert stage.backend.cancelled == 1

    run(case)


def test_cancelled_reader_stops_the_model() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("endless")).chat(HELLO)

        async def read() -> Generation:
            return await reply

        task = asyncio.create_task(read())
        await asyncio.sleep(0.02)
        assert current_call.get().open_generations == {reply}
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stage.backend.cancelled == 1

    run(case)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [("poison", RecordError, "scripted"), ("full", Overloaded, "full")],
)
def test_fault_is_raised_to_the_handler(name: str, error: type[Exception], text: str) -> None:
    async def case(stage: Stage) -> None:
        with pytest.raises(error, match=text):
            await (await stage.model(name)).chat(HELLO)

    run(case)


def test_engine_that_closes_is_an_outage() -> None:
    async def case(stage: Stage) -> None:
        reply = (await stage.model("endless")).chat(HELLO)
        await anext(reply)
        await stage.engine.close()
        with pytest.raises(Outage, match="the engine is closed"):
            await anext(reply)

    run(case)


def test_engine_that_says_nothing_at_the_end_is_an_outage() -> None:
    class Mute(WorkTable):
        def submit(self, work: Submit) -> Events:
            events = Events()
            events.end()
            return events

    async def case(stage: Stage) -> None:
        stage.engine = Mute(stage.backend)
        with pytest.raises(Outage, match="ended a generation of echo without an answer"):
            await (await stage.model("echo")).chat(HELLO)

    run(case)


@pytest.mark.parametrize(
    ("kind", "expect"),
    [("record", RecordError), ("overloaded", Overloaded), ("outage", Outage), ("protocol", Outage)],
)
def test_error_of_a_fault(kind: Any, expect: type[Exception]) -> None:
    error = fault_error(Fault(call=1, kind=kind, code="deadline", message="why", retry_after=0.7))
    assert type(error) is expect
    assert str(error) == "why"
    assert getattr(error, "retry_after", 0.7) == 0.7
    assert getattr(error, "code", "deadline") == "deadline"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1}, r"Expected `float` >= 0.0 - at `\$.temperature`"),
        ({"max_tokens": 0}, r"Expected `int` >= 1 - at `\$.max_tokens`"),
        ({"max_tokens": "many"}, r"Expected `int`, got `str` - at `\$.max_tokens`"),
        ({"top_p": 0.0}, r"Expected `float` > 0.0 - at `\$.top_p`"),
        ({"seed": 2**53}, r"\$.seed"),
        ({"stop": [""]}, r"Expected `str` of length >= 1 - at `\$.stop\[0\]`"),
        ({"max_token": 5}, r"unknown field `max_token`"),
    ],
)
def test_option_out_of_its_range_is_the_records_fault(options: dict[str, Any], text: str) -> None:
    async def case(stage: Stage) -> None:
        with pytest.raises(RecordError, match=text) as raised:
            (await stage.model("echo")).chat(HELLO, **options)
        assert raised.value.code == "bad_option"

    run(case)


@pytest.mark.parametrize(
    "what",
    [
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": HELLO, "features": {"score": np.float32(1)}},
        {"messages": HELLO, "features": {1: "x"}},
        {"messages": HELLO, "features": {"count": 2**70}},
    ],
    ids=["not text", "lone surrogate", "numpy", "key", "huge"],
)
def test_what_no_host_could_read_never_reaches_it(what: dict[str, Any]) -> None:
    async def case(stage: Stage) -> None:
        with pytest.raises(RecordError, match="this cannot be sent to echo") as raised:
            (await stage.model("echo")).chat(what.pop("messages"), **what)
        assert raised.value.code == "invalid"

    run(case)


def test_options_that_are_none_have_their_default() -> None:
    async def case(stage: Stage) -> None:
        model = await stage.model("echo")
        reply = model.chat(HELLO, max_tokens=None, temperature=None, seed=None, stop=None)
        assert reply._work.options == Options(seed=default_seed("r1"))
        chosen = model.chat(HELLO, max_tokens=9, temperature=0.5, top_k=4, top_p=0.9, seed=3, stop=("a",))
        assert chosen._work.options == Options(max_tokens=9, temperature=0.5, top_k=4, top_p=0.9, seed=3, stop=["a"])

    run(case)


def test_deadline_and_priority_go_with_the_work() -> None:
    async def case(stage: Stage) -> None:
        model = await stage.model("echo")
        current_call.set(call_info(remaining=lambda: 2.5, priority=1))
        work = model.chat(HELLO)._work
        assert (work.deadline, work.priority, work.request_id) == (2.5, 1, "r1")

    run(case)


GOLDEN = Submit(
    call=0,
    model="ab" * 32,
    kind="generate",
    work="",
    request_id="r1",
    messages=[{"role": "user", "content": "hi"}],
    features={"b": 1, "a": None},
    options=Options(max_tokens=8, temperature=0.5, seed=7, stop=["\n"]),
    deadline=3.0,
    priority=2,
)


def test_work_id_is_frozen() -> None:
    info = call_info()
    assert work_id(info, GOLDEN) == "244f83d00af7c7f6398f13ca43a88645aafd5822e552e58fa215308d7ab07948"
    assert work_id(info, GOLDEN) == "cd83e69eac8462688cd642c9eb4114191ca6c1f6d19d96a5fdc46cb8cfd9fe33"
    assert work_id(call_info(), GOLDEN) == "244f83d00af7c7f6398f13ca43a88645aafd5822e552e58fa215308d7ab07948"


def test_a_field_that_is_added_with_a_default_changes_no_work_id() -> None:
    class MoreOptions(Options, frozen=True, kw_only=True):
        min_p: float = 0.0
        bias: list[int] = msgspec.field(default_factory=list)

    class MoreSubmit(Submit, frozen=True, tag="submit", kw_only=True):
        schema: str | None = None

    def more(**changed: Any) -> Submit:
        fields = {name: getattr(GOLDEN, name) for name in GOLDEN.__struct_fields__}
        options = {name: getattr(GOLDEN.options, name) for name in GOLDEN.options.__struct_fields__}
        own = {name: changed.pop(name) for name in ("min_p", "bias") if name in changed}
        return MoreSubmit(**fields | {"options": MoreOptions(**options | own)} | changed)

    assert work_id(call_info(), more()) == work_id(call_info(), GOLDEN)
    ids = {
        work_id(call_info(), more(**{name: value})) for name, value in [("min_p", 0.1), ("bias", [1]), ("schema", "")]
    }
    assert len(ids | {work_id(call_info(), GOLDEN)}) == 4


def test_work_id_does_not_know_call_deadline_or_priority() -> None:
    same = msgspec.structs.replace(GOLDEN, call=9, deadline=1.0, priority=0, features={"a": None, "b": 1})
    assert work_id(call_info(), same) == work_id(call_info(), GOLDEN)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "cd" * 32},
        {"messages": [{"role": "user", "content": "ho"}]},
        {"messages": None, "prompt": "hi"},
        {"features": {"b": 2, "a": None}},
        {"options": Options(max_tokens=9, temperature=0.5, seed=7, stop=["\n"])},
        {"kind": "embed", "messages": None, "text": "hi"},
        {"adapter": "one"},
    ],
)
def test_work_id_knows_model_input_and_options(changed: dict[str, Any]) -> None:
    assert work_id(call_info(), msgspec.structs.replace(GOLDEN, **changed)) != work_id(call_info(), GOLDEN)


@pytest.mark.parametrize("name", ["job", "operator", "key", "request_id"])
def test_work_id_knows_the_record(name: str) -> None:
    assert work_id(call_info(**{name: "other"}), GOLDEN) != work_id(call_info(), GOLDEN)


def test_default_seed_is_frozen() -> None:
    assert default_seed("r1") == int(hashlib.sha256(b"r1").hexdigest(), 16) >> (256 - 53)
    assert default_seed("r1") == 4_607_491_544_628_109
    assert default_seed("\ud800") < 2**53


def test_second_identical_call_of_a_record_is_work_of_its_own() -> None:
    async def case(stage: Stage) -> None:
        model = await stage.model("echo")
        first, second = await asyncio.gather(model.chat(HELLO)._whole(), model.chat(HELLO)._whole())
        assert first.generation_id != second.generation_id
        current_call.set(call_info())
        again = await model.chat(HELLO)
        assert again.generation_id == first.generation_id

    run(case)


def test_outside_of_a_record_every_call_is_new() -> None:
    async def main() -> None:
        model = await Stage().model("echo")
        first, second = await model.chat(HELLO), await model.chat(HELLO)
        assert first.generation_id != second.generation_id
        assert first._work.options.seed == second._work.options.seed

    asyncio.run(main())


def test_model_of_another_kind_is_refused() -> None:
    async def case(stage: Stage) -> None:
        expect = "models.embed is of kind 'embedding', it is used as 'decoder'"
        with pytest.raises(ConfigError, match=expect):
            await stage.model("embed")

    run(case)


def test_model_that_is_not_loaded_says_so() -> None:
    async def case(stage: Stage) -> None:
        with pytest.raises(ConfigError, match=r"models.echo is not loaded: ask for it in open\(\)"):
            Model(stage.engine, "echo", "echo").chat(HELLO)

    run(case)


def test_embedding() -> None:
    async def case(stage: Stage) -> None:
        embed = Embedder(stage.engine, "embed", "embed")
        await embed.load()
        one, two = await embed("a text"), await embed("a text")
        assert (one.vector.shape, one.vector.dtype) == ((4,), np.float32)
        assert (one.vector == two.vector).all()
        assert (one.model, one.model_hash) == ("embed", hashlib.sha256(b"embed").hexdigest())
        with pytest.raises(RecordError, match="this cannot be sent to embed"):
            await embed(5)  # type: ignore[arg-type]

    run(case)


def test_classification() -> None:
    async def case(stage: Stage) -> None:
        classify = Classifier(stage.engine, "classify", "classify")
        await classify.load()
        found = await classify("where is my money")
        assert (found.label, found.scores) == ("refund", {"refund": 0.5, "praise": 0.5})

    run(case)


def test_a_model_is_only_used_as_what_it_is() -> None:
    async def case(stage: Stage) -> None:
        for kind, word in ((Tagger, "token_classifier"), (Reranker, "reranker")):
            with pytest.raises(ConfigError, match=f"of kind 'embedding', it is used as '{word}'"):
                await kind(stage.engine, "embed", "embed").load()

    run(case)


def test_cancelled_embedding_is_cancelled_in_the_engine() -> None:
    class Endless(ScriptedBackend):
        def start(self, work: Submit, generation: str, emit: Callable[[Event], None]) -> Callable[[], None]:
            def cancel() -> None:
                self.cancelled += 1

            return cancel

    async def case(stage: Stage) -> None:
        backend = Endless(SCRIPTS)
        embed = Embedder(WorkTable(backend), "embed", "embed")
        await embed.load()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(embed("a text"), 0.05)
        assert backend.cancelled == 1

    run(case)


def test_what_a_deadline_cut_short_is_not_remembered() -> None:
    class Late(ScriptedBackend):
        def start(self, work: Submit, generation: str, emit: Callable[[Event], None]) -> Callable[[], None]:
            self.started += 1
            emit(Done(call=0, generation=generation, text="so far", finish="deadline"))
            return lambda: None

    async def case(stage: Stage) -> None:
        stage.backend = Late(SCRIPTS)
        stage.engine = WorkTable(stage.backend)
        model = await stage.model("echo")
        for _ in range(2):
            current_call.set(call_info())
            assert (await model.chat(HELLO)).finish_reason == "deadline"
        assert stage.backend.started == 2

    run(case)
