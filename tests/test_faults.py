"""What fails in the engine costs one piece of work, never its neighbours, never the thread."""

import asyncio
import json
import logging
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flink_llm.engine import engine as engine_module
from flink_llm.engine.decoding import Decoding
from flink_llm.engine.engine import TAKEN_PER_STEP, OnnxBackend
from flink_llm.engine.faults import LONGEST, fault_of, lacks_memory
from flink_llm.engine.generation import Model
from flink_llm.engine.preparing import LONG, Preparing
from flink_llm.engine.protocol import Done, Event, Fault, Options, Submit
from flink_llm.engine.readers import Embedder
from flink_llm.engine.sequence import Sequence
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.engine.work import WorkTable
from flink_llm.errors import ConfigError, FlinkLlmError, ModelFolderError, Outage, Overloaded, RecordError
from tests import tiny

SETTINGS = HostSettings(device="cpu", slots=4, threads=1, cache_mb=0)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.encoder(tmp_path_factory.mktemp("models") / "embedding", "embedding")


class Stage:
    """An engine in this process, the model on it, and what the engine made of the model."""

    def __init__(self, folder: Path, kind: Any = Model) -> None:
        self.backend = OnnxBackend(SETTINGS)
        self.table = WorkTable(self.backend)
        self.model = kind(self.table, "tiny", str(folder))
        self.deaths: list[bool] = []
        self.backend._when_dead = lambda: self.deaths.append(True)

    @property
    def served(self) -> Any:
        return next(iter(self.backend._models.values()))

    async def submit(self, prompt: str, *, name: str = "w", deadline: float | None = None, **options: Any) -> Event:
        """The last event of a submission as a client may send it."""
        work = Submit(
            call=0, model=self.model.loaded.sha256, kind="generate", work=name, request_id="r",
            prompt=prompt, options=Options(**options), deadline=deadline,
        )  # fmt: skip
        return [event async for event in self.table.submit(work)][-1]


def run(folder: Path, case: Callable[[Stage], Awaitable[Any]], kind: Any = Model) -> None:
    async def main() -> None:
        stage = Stage(folder, kind)
        await stage.model.load()
        try:
            await asyncio.wait_for(case(stage), 60)
        finally:
            await stage.table.close()

    asyncio.run(main())


async def outcome(what: Awaitable[Any]) -> Any:
    """What comes of it: an answer, or the code of the failure."""
    try:
        return await what
    except RecordError as error:
        return error.code
    except FlinkLlmError as error:
        return type(error)


# What cannot be taken in.


@pytest.mark.parametrize(
    ("messages", "features", "code"),
    [
        ([{"role": "user"}], None, "invalid"),
        ([{"content": "hello"}], None, "invalid"),
        ([{"role": "</s>", "content": "hello"}], None, "invalid"),
        ([{"role": "\ue0009\ue001", "content": "hello"}], None, "invalid"),
        (HELLO, {"\ue0009\ue001": 1}, "invalid"),
        (HELLO, {"a": {"</s>": 1}}, "invalid"),
        ([], None, "empty_text"),
        ([*HELLO] * 1000, None, "context_overflow"),
    ],
)
def test_a_record_that_cannot_be_prompted_fails_alone(folder: Path, messages: Any, features: Any, code: str) -> None:
    async def case(stage: Stage) -> None:
        assert await outcome(stage.model.chat(messages, features=features)) == code
        assert (await stage.model.chat(HELLO, max_tokens=2)).usage.completion_tokens == 2

    run(folder, case)


def test_a_model_without_a_template_says_so(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()

    async def case(stage: Stage) -> None:
        with pytest.raises(RecordError, match="the model has no chat template"):
            await stage.model.chat(HELLO)
        assert (await stage.model.generate("hello", max_tokens=2)).usage.completion_tokens == 2

    run(tiny.changed(bare), case)


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(1)], ids=["error", "panic"])
def test_whatever_taking_in_raises_is_that_works_end(folder: Path, error: BaseException) -> None:
    async def case(stage: Stage) -> None:
        encode = stage.served._preparing.prompts.text

        def text(prompt: str) -> list[int]:
            if prompt == "poison":
                raise error
            return list(encode(prompt))

        stage.served._preparing.prompts.text = text
        found = await asyncio.gather(
            outcome(stage.model.generate("poison")), *(stage.model.generate("good", max_tokens=3) for _ in range(3))
        )
        assert found[0] == "model_error"
        assert [good.usage.completion_tokens for good in found[1:]] == [3, 3, 3]

    run(folder, case)


@pytest.mark.parametrize(
    "options",
    [{"seed": -1, "temperature": 1.0}, {"temperature": float("nan")}, {"max_tokens": 0}, {"top_p": 0.0}],
    ids=str,
)
def test_options_out_of_range_are_refused_by_the_engine_too(folder: Path, options: dict[str, Any]) -> None:
    async def case(stage: Stage) -> None:
        event = await stage.submit("hello", **options)
        assert isinstance(event, Fault) and (event.kind, event.code) == ("record", "bad_option")

    run(folder, case)


def test_a_huge_text_is_refused_before_it_is_tokenised(folder: Path, embedding: Path) -> None:
    longest: list[int] = []

    def watched(tokenizer: Any) -> Any:
        encode = tokenizer.encode

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(tokenizer, name)

            def encode(self, text: str, **options: Any) -> Any:
                longest.append(len(text))
                return encode(text, **options)

        return Watched()

    def watch(stage: Stage) -> None:
        served = stage.served
        tokenizer = served._preparing.tokenizer if isinstance(served, Decoding) else served._tokenizer
        for name in ("_text", "_later", "_template"):
            setattr(tokenizer, name, watched(getattr(tokenizer, name)))

    async def generated(stage: Stage) -> None:
        watch(stage)
        assert await outcome(stage.model.generate("x" * 1_000_000)) == "context_overflow"
        assert await outcome(stage.model.chat([{"role": "user", "content": "x" * 1_000_000}])) == "context_overflow"

    async def embedded(stage: Stage) -> None:
        long = (await stage.model("x" * 1000)).vector
        watch(stage)
        assert ((await stage.model("x" * 1_000_000)).vector == long).all()

    run(folder, generated)
    run(embedding, embedded, Embedder)
    assert longest and max(longest) <= 512 * len("<pad>")


def test_a_flood_of_work_is_taken_in_between_steps(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        added: list[int] = []
        add, step = stage.served.add, stage.served.step
        stage.served.add = lambda job: added.append(1) or add(job)
        per_step: list[int] = []

        def stepped(said: Any) -> Any:
            per_step.append(len(added))
            added.clear()
            return step(said)

        stage.served.step = stepped
        await asyncio.gather(*(stage.submit("x", name=str(n), max_tokens=1) for n in range(500)))
        assert sum(per_step) == 500
        assert max(per_step) <= TAKEN_PER_STEP

    run(folder, case)


# What fails in a run.


def poisoned(run: Any, poison: int, error: Exception) -> Any:
    """A run of the decoder that fails whenever the token takes part in it."""

    def failing(slots: Any, tokens: Any, *rest: Any) -> Any:
        if poison in np.hstack(tokens):
            raise error
        return run(slots, tokens, *rest)

    return failing


def test_a_failing_prefill_fails_alone(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        decoder = stage.served._decoder
        poison = stage.served._preparing.tokenizer.encode_text("!")[0]
        decoder.read = poisoned(decoder.read, poison, RuntimeError("out of bounds"))
        decoder.read_together = poisoned(decoder.read_together, poison, RuntimeError("out of bounds"))
        goods = [stage.model.generate("good", max_tokens=20) for _ in range(3)]
        found = await asyncio.gather(outcome(stage.model.generate("bad!")), *(good._whole() for good in goods))
        assert found[0] == "model_error"
        assert [good.usage.completion_tokens for good in goods] == [20, 20, 20]
        assert stage.served._scheduler.running == 0

    run(folder, case)


@pytest.mark.parametrize(
    ("error", "expect"),
    [
        (RuntimeError("indices out of bounds"), "model_error"),
        (MemoryError("no room"), Outage),
        (RuntimeError("Error in execution: Failed to allocate memory for requested buffer"), Outage),
    ],
    ids=["error", "memory", "buffer"],
)
def test_a_failing_decode_step_costs_who_made_it_fail(folder: Path, error: Exception, expect: Any) -> None:
    async def case(stage: Stage) -> None:
        alone = (await stage.model.generate("good 1", max_tokens=12)).text
        decoder = stage.served._decoder
        bad = stage.model.generate("bad", max_tokens=40)
        first = (await stage.submit("bad", name="first", max_tokens=1)).text  # type: ignore[union-attr]
        poison = stage.served._preparing.tokenizer.encode_text(first)[0]
        decoder.step = poisoned(decoder.step, poison, error)
        goods = [stage.model.generate(f"good {n}", max_tokens=12) for n in range(3)]
        found = await asyncio.gather(outcome(bad), *(outcome(good) for good in goods))
        assert found[0] == expect
        assert goods[1].text == alone
        assert stage.served._scheduler.running == 0

    run(folder, case)


def test_a_detokenizer_that_fails_costs_one_generation(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        take = Sequence.take

        def failing(self: Sequence, token: int, limit: int) -> Any:
            if self.count == 2 and self.options.max_tokens == 7:
                raise ValueError("no text")
            return take(self, token, limit)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sequence, "take", failing)
            found = await asyncio.gather(
                outcome(stage.model.generate("a", max_tokens=7)), stage.model.generate("b", max_tokens=9)
            )
        assert found[0] == "model_error"
        assert found[1].usage.completion_tokens == 9

    run(folder, case)


def test_a_failing_text_fails_alone_in_its_batch(embedding: Path) -> None:
    async def case(stage: Stage) -> None:
        encoder = stage.served._encoder
        poison = stage.served._tokenizer.encode_text("!")[0]
        alone = (await stage.model("good")).vector
        ran = encoder._run

        def failing(texts: list[list[int]], types: Any) -> Any:
            if any(poison in text for text in texts):
                raise RuntimeError("out of bounds")
            return ran(texts, types)

        encoder._run = failing
        found = await asyncio.gather(*(outcome(stage.model(text)) for text in ("good", "bad!", "good")))
        assert found[1] == "model_error"
        np.testing.assert_allclose([found[0].vector, found[2].vector], [alone, alone], atol=1e-6)

    run(embedding, case, Embedder)


def test_a_vector_that_is_not_finite_fails_alone(embedding: Path) -> None:
    async def case(stage: Stage) -> None:
        encoder = stage.served._encoder
        poison = stage.served._tokenizer.encode_text("!")[0]
        ran = encoder._run

        def spoilt(texts: list[list[int]], types: Any) -> Any:
            answers = ran(texts, types)
            answers[[poison in text for text in texts]] = np.nan
            return answers

        encoder._run = spoilt
        found = await asyncio.gather(*(outcome(stage.model(text)) for text in ("good", "bad!", "good")))
        assert found[1] == "model_error"
        assert np.isfinite([found[0].vector, found[2].vector]).all()

    run(embedding, case, Embedder)


def test_a_text_that_has_no_tokens_is_empty(embedding: Path, tmp_path: Path) -> None:
    strict = Path(shutil.copytree(embedding, tmp_path / "strict"))
    path = strict / "tokenizer.json"
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))

    async def case(stage: Stage) -> None:
        found = await asyncio.gather(*(outcome(stage.model(text)) for text in ("\x01\x02", "good")))
        assert found[0] == "empty_text"
        assert np.isfinite(found[1].vector).all()

    run(tiny.changed(strict), case, Embedder)


# The thread.


def test_a_dying_thread_is_an_outage_that_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def case(stage: Stage) -> None:
        reply = stage.model.generate("hello", max_tokens=400)
        await anext(reply)

        def dies(_: Any) -> Any:
            raise RuntimeError("a bug")

        stage.backend._take_in = dies  # type: ignore[method-assign]
        assert await outcome(reply) == Outage
        assert await outcome(stage.model.generate("again")) == Outage
        with pytest.raises(Outage, match="the engine's thread has died"):
            await stage.model.load()
        assert stage.deaths == [True]

    with caplog.at_level(logging.CRITICAL):
        run(folder, case)
    assert "the engine's thread has died, and its host ends with it" in caplog.text


def test_a_step_with_a_bug_is_an_outage_of_its_model(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        plan = stage.served._scheduler.plan

        def failing() -> Any:
            stage.served._scheduler.plan = plan
            raise RuntimeError("a bug")

        stage.served._scheduler.plan = failing
        assert await outcome(stage.model.generate("hello")) == Outage
        assert (await stage.model.generate("again", max_tokens=2)).usage.completion_tokens == 2

    run(folder, case)


def test_a_listener_that_raises_costs_no_other_its_events(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        def deaf(_: Event) -> None:
            raise RuntimeError("cannot hear")

        work = Submit(
            call=0, model=stage.model.loaded.sha256, kind="generate", work="deaf", request_id="r",
            prompt="x", options=Options(max_tokens=2),
        )  # fmt: skip
        stage.table.join(work, deaf)
        assert (await stage.model.generate("hello", max_tokens=4)).usage.completion_tokens == 4

    run(folder, case)


# Deadlines.


def test_the_engine_ends_nothing_by_a_deadline(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        event = await stage.submit("hello", deadline=0.0, max_tokens=30)
        assert isinstance(event, Done) and (event.finish, event.completion_tokens) == ("length", 30)

    run(folder, case)


def test_work_that_is_joined_again_does_not_keep_its_first_deadline(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        step = stage.served._decoder.step
        stage.served._decoder.step = lambda *args: time.sleep(0.002) or step(*args)
        first = asyncio.create_task(stage.submit("hello", deadline=0.05, max_tokens=100))
        await asyncio.sleep(0.1)
        again = await stage.submit("hello", deadline=30.0, max_tokens=100)
        assert isinstance(again, Done) and again.completion_tokens == 100
        assert (await first).text == again.text  # type: ignore[union-attr]

    run(folder, case)


# Sequences and faults.


def test_text_that_is_held_at_the_end_of_the_sequence_is_said(folder: Path) -> None:
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    sequence = Sequence([5], Options(stop=["ZZ"]), "g", tokenizer, frozenset([2]))
    said = [sequence.take(token, 512) for token in [*tokenizer.encode_text("price ok \ufffd"), 2]]
    assert sequence.done().text == "price ok \ufffd" == "".join(piece.text for piece in said if piece is not None)
    assert sequence.done().finish == "stop"


@pytest.mark.parametrize("stop", [[], ["Z"], ["never"]])
@pytest.mark.parametrize("limit", [3, 512])
def test_text_that_may_be_told_together_is_told_seldom_and_whole(folder: Path, stop: list[str], limit: int) -> None:
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    tokens = [*tokenizer.encode_text("price ok \u00e4 price ok Z behind"), 2]
    told = {}
    for every in (0.0, 60.0):
        sequence = Sequence([5], Options(stop=stop, max_tokens=limit), "g", tokenizer, frozenset([2]), told_every=every)
        pieces = []
        for token in tokens:
            pieces.append(sequence.take(token, 512))
            if sequence.finish is not None:
                break
        told[every] = [piece for piece in pieces if piece is not None]
        assert "".join(piece.text for piece in told[every]) == sequence.done().text
        assert [piece.sequence for piece in told[every]] == [*range(len(told[every]))]
    assert "".join(piece.text for piece in told[0.0]) == "".join(piece.text for piece in told[60.0])
    assert len(told[60.0]) == 2 < len(told[0.0]), "the first at once, and what there is at the end"


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (RecordError("empty_text", "none"), "record", "empty_text"),
        (Overloaded("full", 0.5), "overloaded", "overloaded"),
        (Outage("gone"), "outage", "outage"),
        (MemoryError(), "outage", "outage"),
        (ModelFolderError("refused"), "model_folder", "model_folder"),
        (ConfigError("wrong"), "model_folder", "model_folder"),
        (ValueError("allocation"), "record", "model_error"),
        (SystemExit(), "record", "model_error"),
    ],
    ids=repr,
)
def test_fault_of_an_error(error: BaseException, kind: str, code: str) -> None:
    fault = fault_of(error, 7)
    assert (fault.call, fault.kind, fault.code) == (7, kind, code)
    assert fault.retry_after == (0.5 if kind == "overloaded" else 0.0)


def test_a_faults_message_can_be_sent_whatever_it_holds() -> None:
    fault = fault_of(ModelFolderError("/models/\udcff" + "x" * 1000))
    assert fault.message.encode().startswith(b"/models/\\udcff")
    assert len(fault.message) <= LONGEST + 10


def test_only_onnx_runtimes_texts_tell_of_memory() -> None:
    assert not lacks_memory(KeyError("Failed to allocate"))
    assert lacks_memory(RuntimeError("Error in execution: bad_alloc"))


def test_taking_in_has_a_limit_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "TAKING_S", 0.0)

    async def case(stage: Stage) -> None:
        added: list[int] = []
        per_step: list[int] = []
        add, step = stage.served.add, stage.served.step
        stage.served.add = lambda job: added.append(1) or add(job)
        stage.served.step = lambda said: per_step.append(len(added)) or added.clear() or step(said)
        await asyncio.gather(*(stage.submit("x", name=str(n), max_tokens=1) for n in range(20)))
        assert max(per_step) == 1

    run(folder, case)


def test_a_long_prompt_is_prepared_beside_the_steps_of_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it says that a prompt is too long it says so, wherever it was prepared."""
    threads: set[str] = set()
    prepare = Preparing.prepare

    def watched(self: Preparing, work: Any) -> Any:
        threads.add(threading.current_thread().name)
        return prepare(self, work)

    monkeypatch.setattr(Preparing, "prepare", watched)

    async def case(stage: Stage) -> None:
        assert await outcome(stage.model.generate("x" * (LONG + 1))) == "context_overflow"
        assert threads == {"flink-llm aside"}
        assert (await stage.model.generate("short", max_tokens=2)).usage.completion_tokens == 2
        assert threads == {"flink-llm aside", "flink-llm engine"}

    run(folder, case)
