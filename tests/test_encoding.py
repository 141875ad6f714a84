"""Encoders on tiny models, through the engine: tagging, ranking, cuts, what is kept, what fails alone."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flink_llm.engine.answers import Answers
from flink_llm.engine.batching import LIMITS
from flink_llm.engine.client import open_engine
from flink_llm.engine.encoder import _sigmoid
from flink_llm.engine.encoding import DOCUMENTS, Encoding, cut
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.job import Job, Said
from flink_llm.engine.metrics import Metrics
from flink_llm.engine.model import open_model_folder
from flink_llm.engine.protocol import Done, Engine, Fault, Submit
from flink_llm.engine.readers import Classifier, Embedder, Ranked, Reranker, Tagger
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import WorkTable
from flink_llm.errors import FlinkLlmError, Overloaded, RecordError
from tests import tiny

METRICS = Metrics().model("m", "a" * 64)
KINDS = {"embedding": Embedder, "classifier": Classifier, "token_classifier": Tagger, "reranker": Reranker}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {kind: tiny.encoder(made / kind, kind) for kind in KINDS}


class Stage:
    """An engine in this process with one model, whose runs are counted."""

    def __init__(self, folder: Path, kind: str, cache_mb: float = 64.0) -> None:
        self.backend = OnnxBackend(HostSettings(device="cpu", threads=1, cache_mb=cache_mb))
        self.table = WorkTable(self.backend)
        self.model: Any = KINDS[kind](self.table, kind, str(folder))
        self.runs: list[int] = []
        self.spoil = ""

    async def load(self) -> None:
        await self.model.load()
        served: Any = next(iter(self.backend._models.values()))
        encoder, poison = served._encoder, served._tokenizer.encode_text("!")[0]
        ran = encoder._run

        def watched(texts: list[list[int]], types: Any) -> Any:
            self.runs.append(len(texts))
            answers = ran(texts, types)
            for i, text in enumerate(texts):
                if self.spoil and poison in text:
                    if self.spoil == "raise":
                        raise RuntimeError("out of bounds")
                    answers[i][:] = np.nan
            return answers

        encoder._run = watched

    async def code(self, *asked: Any, **options: Any) -> str:
        """The code of the record's failure."""
        with pytest.raises(RecordError) as caught:
            await self.model(*asked, **options)
        return caught.value.code


def run(folders: dict[str, Path], kind: str, case: Callable[[Stage], Awaitable[None]], **settings: Any) -> None:
    async def inside() -> None:
        stage = Stage(folders[kind], kind, **settings)
        try:
            await stage.load()
            await case(stage)
        finally:
            await stage.table.close()

    asyncio.run(inside())


async def outcome(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except FlinkLlmError as error:
        return getattr(error, "code", type(error).__name__)


# Tagging.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nobody is here", []),
        ("Pia Qin met Lu", [("PER", "Pia Qin"), ("LOC", "Lu")]),
        ("été à Lyon: 東京 Pé", [("LOC", "Lyon"), ("PER", "Pé")]),
        ("</s> Qin, Pia", [("PER", "Qin"), ("PER", "Pia")]),
    ],
)
def test_entities_are_cut_out_of_the_text(folders: dict[str, Path], text: str, found: list[Any]) -> None:
    async def case(stage: Stage) -> None:
        tagging = await stage.model(text)
        assert [(each.label, text[each.start : each.end]) for each in tagging.entities] == found
        assert all(0.5 < each.score <= 1 for each in tagging.entities)
        assert tagging.usage.prompt_tokens == len(text.encode())

    run(folders, "token_classifier", case)


def test_a_text_whose_entities_would_be_cut_off_is_refused(folders: dict[str, Path]) -> None:
    async def case(stage: Stage) -> None:
        assert len((await stage.model("x" * 60 + " Pia")).entities) == 1
        assert await stage.code("x" * 60 + " Pia.") == "context_overflow"
        assert await stage.code("x" * 1_000_000) == "context_overflow"

    run(folders, "token_classifier", case)


def test_tags_do_not_depend_on_their_neighbours(folders: dict[str, Path]) -> None:
    texts = ["Pia", "to Lu " * 9, "Pia Qin and Lu", "x"]

    async def case(stage: Stage) -> None:
        alone = [(await stage.model(text)).entities for text in texts]
        together = [each.entities for each in await asyncio.gather(*map(stage.model, texts))]
        assert together == alone
        assert max(stage.runs) > 1

    run(folders, "token_classifier", case, cache_mb=0)


# Ranking.


def test_scores_are_in_the_order_of_the_documents(folders: dict[str, Path]) -> None:
    documents = ["a", "zebra", "the quick brown fox", "a"]

    async def case(stage: Stage) -> None:
        found = await stage.model("who?", documents)
        alone = [(await stage.model("who?", [each])).scores[0] for each in documents]
        np.testing.assert_allclose(found.scores, alone, rtol=1e-4)
        assert all(0 < score < 1 for score in found.scores) and len(set(found.scores)) == 3
        order = sorted(range(4), key=lambda i: -found.scores[i])
        assert found.best() == [Ranked(i, found.scores[i]) for i in order]
        assert found.best(2) == found.best()[:2]
        other = await stage.model("what, then?", documents)
        assert other.scores != found.scores

    run(folders, "reranker", case, cache_mb=0)


def test_a_model_is_told_which_of_the_two_is_the_query(folders: dict[str, Path]) -> None:
    async def case(stage: Stage) -> None:
        there, back = await stage.model("an e", ["one"]), await stage.model("one", ["an e"])
        assert there.scores[0] + back.scores[0] == pytest.approx(1, abs=1e-5)
        assert abs(there.scores[0] - 0.5) > 0.01

    run(folders, "reranker", case)


@pytest.mark.parametrize(
    ("query", "documents", "code"),
    [
        ("who?", [], "empty_text"),
        ("who?", ["a", " "], "empty_text"),
        (" ", ["a"], "empty_text"),
        ("who?", ["a"] * (DOCUMENTS + 1), "too_large"),
        ("who?", ["a", 5], "invalid"),
        ("who?", "a text", "invalid"),
        ("who?", None, "invalid"),
        (None, ["a"], "empty_text"),
        (5, ["a"], "invalid"),
    ],
)
def test_what_cannot_be_ranked_is_the_records_fault(
    folders: dict[str, Path], query: Any, documents: Any, code: str
) -> None:
    async def case(stage: Stage) -> None:
        bad, good = await asyncio.gather(outcome(stage.model(query, documents)), stage.model("who?", ["a"] * DOCUMENTS))
        assert bad == code
        assert len(good.scores) == DOCUMENTS

    run(folders, "reranker", case)


def test_a_long_pair_is_cut(folders: dict[str, Path]) -> None:
    async def case(stage: Stage) -> None:
        found = await stage.model("who?", ["x" * 1_000_000, "x" * 100])
        assert found.scores[0] == pytest.approx(found.scores[1])
        assert found.usage.prompt_tokens == 2 * 64

    run(folders, "reranker", case)


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("embedding", ("good",), ("bad!",)),
        ("classifier", ("good",), ("bad!",)),
        ("token_classifier", ("good",), ("bad!",)),
        ("reranker", ("who?", ["good", "fine"]), ("who?", ["good", "bad!", "fine"])),
    ],
)
def test_a_failure_is_its_own_and_is_not_kept(
    folders: dict[str, Path], kind: str, good: Any, bad: Any, how: str
) -> None:
    async def case(stage: Stage) -> None:
        stage.spoil = how
        found = await asyncio.gather(*(outcome(stage.model(*asked)) for asked in (good, bad, good)))
        assert found[1] == "model_error"
        assert found[0].model == found[2].model == kind
        stage.spoil = ""
        assert (await stage.model(*bad)).model == kind

    run(folders, kind, case)


# Cuts.


def test_a_cut_embedding_is_its_beginning_of_length_one(folders: dict[str, Path]) -> None:
    async def case(stage: Stage) -> None:
        whole = (await stage.model("hello")).vector
        for dimensions in (1, 5, 16):
            part = (await stage.model("hello", dimensions=dimensions)).vector
            wanted = whole[:dimensions] / np.linalg.norm(whole[:dimensions])
            np.testing.assert_allclose(part, wanted, rtol=1e-5)
        assert stage.runs == [1]  # one answer serves every cut

    run(folders, "embedding", case)


@pytest.mark.parametrize("dimensions", [0, -1, 17, 10**9])
def test_dimensions_that_a_model_has_not_are_refused(folders: dict[str, Path], dimensions: int) -> None:
    async def case(stage: Stage) -> None:
        assert await stage.code("hello", dimensions=dimensions) == "bad_option"
        with pytest.raises(RecordError, match=f"dimensions is {dimensions}, embedding has 1 to 16"):
            await stage.model("hello", dimensions=dimensions)

    run(folders, "embedding", case)


def test_a_cut_keeps_its_length_where_the_model_does() -> None:
    vector = np.array([3, 4, 12], dtype=np.float32)
    assert cut(vector, 2, normalize=False).tolist() == [3, 4]
    assert cut(vector, 2, normalize=True).tolist() == pytest.approx([0.6, 0.8])
    assert cut(vector, None, normalize=True).tolist() == [3, 4, 12]
    assert cut(np.array([0, 1], dtype=np.float32), 1, normalize=True).tolist() == [0]
    assert vector.tolist() == [3, 4, 12]


# What is kept.


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("embedding", ("hello",)),
        ("classifier", ("hello",)),
        ("token_classifier", ("Pia is in Lu",)),
        ("reranker", ("who?", ["hello", "you"])),
    ],
)
def test_a_text_that_comes_again_needs_no_model(folders: dict[str, Path], kind: str, asked: Any) -> None:
    async def case(stage: Stage) -> None:
        first = await stage.model(*asked)
        ran = len(stage.runs)
        again = await stage.model(*asked)
        assert len(stage.runs) == ran
        assert repr(again) == repr(first)
        assert again.usage.prompt_tokens > 0

    run(folders, kind, case)


def test_only_the_documents_that_are_new_are_run(folders: dict[str, Path]) -> None:
    async def case(stage: Stage) -> None:
        first = await stage.model("who?", ["one", "two"])
        second = await stage.model("who?", ["two", "three", "one"])
        assert sum(stage.runs) == 3
        assert [second.scores[2], second.scores[0]] == first.scores
        await stage.model("what?", ["one"])
        assert sum(stage.runs) == 4

    run(folders, "reranker", case)


def test_nothing_is_kept_where_it_is_off(folders: dict[str, Path]) -> None:
    async def case(stage: Stage) -> None:
        await stage.model("hello")
        await stage.model("hello")
        assert stage.runs == [1, 1]

    run(folders, "embedding", case, cache_mb=0)


def test_a_model_hears_nothing_of_anothers_answers(folders: dict[str, Path], tmp_path: Path) -> None:
    answers = Answers(1)
    other = tiny.changed(tiny.encoder(tmp_path / "other", "embedding"), pooling="cls")
    vectors = []
    for folder in (folders["embedding"], other):
        served = Served(folder, answers)
        served.add("hello")
        vectors.append(served.step()["hello"].vector)
    assert vectors[0] != vectors[1]


def test_a_host_in_a_process_of_its_own_tags_and_ranks(folders: dict[str, Path]) -> None:
    async def case(engine: Engine) -> None:
        tagger = Tagger(engine, "t", str(folders["token_classifier"]))
        reranker = Reranker(engine, "r", str(folders["reranker"]))
        await tagger.load()
        await reranker.load()
        tagging, ranking = await asyncio.gather(tagger("to Lu"), reranker("who?", ["a", "zebra"]))
        assert [(each.label, each.start, each.end) for each in tagging.entities] == [("LOC", 3, 5)]
        assert len(ranking.scores) == 2
        assert await outcome(reranker("who?", [])) == "empty_text"

    async def inside(folder: str) -> None:
        engine = open_engine(HostSettings(device="cpu", threads=1, cache_mb=0.5, linger_s=0.1, socket_dir=folder))
        try:
            await case(engine)
        finally:
            await engine.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(inside(folder))


# Steps.


class Served:
    """An encoder without a thread: work is named by its text."""

    def __init__(self, folder: Path, answers: Answers | None = None, queue: int = 4096) -> None:
        settings = HostSettings(device="cpu", threads=1, queue=queue)
        self.encoding = Encoding(open_model_folder(folder), settings, "cpu", METRICS, answers or Answers(0))

    def add(self, text: str, **fields: Any) -> Job:
        work = Submit(call=0, model="m", kind=self.encoding._kind, work=text, request_id=text, text=text, **fields)
        job = Job(work, text, lambda event: None, METRICS.request(5))
        self.encoding.add(job)
        return job

    def step(self) -> dict[str, Any]:
        """The answers of a step by the generation; a fault by its code."""
        said: Said = []
        self.encoding.step(said)
        return {event.generation if isinstance(event, Done) else event.code: event for _, event in said}  # type: ignore[union-attr]


def test_a_step_is_one_run_and_short_texts_do_not_wait_for_long_ones(folders: dict[str, Path]) -> None:
    served = Served(folders["embedding"])
    long = "x" * 64
    rows = LIMITS["cpu"].rows
    for i in range(rows + 16):
        served.add(f"{long}{i}")
    for text in ("hi", "ho"):
        served.add(text)
    assert set(served.step()) == {"hi", "ho"}
    assert len(served.step()) == rows
    assert len(served.step()) == 16
    assert served.step() == {}


def test_who_has_waited_for_the_ceiling_is_next(folders: dict[str, Path]) -> None:
    for waited, first in ((0.0, False), (0.05, True)):
        served = Served(folders["embedding"])
        served.add("x" * 64)
        for i in range(30):
            served.add(f"hi {i}")
        served.encoding._waiting[0].since -= waited
        assert ("x" * 64 in served.step()) is first


def test_what_is_cancelled_is_not_run(folders: dict[str, Path]) -> None:
    served = Served(folders["reranker"])
    served.add("who", documents=["a", "b"]).cancelled = True
    served.add("what", documents=["a", "b"])
    assert set(served.step()) == {"what"}
    assert served.step() == {}


def test_a_full_queue_refuses_what_is_not_known(folders: dict[str, Path]) -> None:
    served = Served(folders["embedding"], Answers(1), queue=1)
    served.add("known")
    served.step()
    served.add("waiting")
    with pytest.raises(Overloaded, match="the queue is full"):
        served.add("too many")
    served.add("urgent", priority=0)
    served.add("known")
    assert set(served.step()) == {"known", "waiting", "urgent"}


def test_what_a_failed_step_was_about_is_told(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(folders["embedding"], Answers(1))
    served.add("known")
    served.step()
    jobs = {text: served.add(text) for text in ("known", "one", "two", "three")}
    put = served.encoding._answers.put

    def fails(key: bytes, answer: Any) -> None:
        monkeypatch.setattr(served.encoding._answers, "put", lambda *_: 1 / 0)
        put(key, answer)

    monkeypatch.setattr(served.encoding._answers, "put", fails)
    said: Said = []
    with pytest.raises(ZeroDivisionError):
        served.encoding.step(said)
    answered = [event.generation for _, event in said if isinstance(event, Done)]
    left = served.encoding.drop()
    assert len(answered) == 2 and answered[0] == "known"
    assert {job.generation for job in left} == set(jobs) - set(answered)


def test_a_ranking_fails_once(folders: dict[str, Path]) -> None:
    served = Served(folders["reranker"])
    served.encoding._encoder._run = lambda texts, types: np.full((len(texts), 1), np.nan)  # type: ignore[method-assign]
    served.add("who", documents=["a", "b"])
    said: Said = []
    served.encoding.step(said)
    assert [event.code for _, event in said if isinstance(event, Fault)] == ["model_error"]
    assert len(said) == 1


def test_scores_differ_near_one_and_are_none_of_what_is_not_finite() -> None:
    found = _sigmoid(np.array([-1000, 0, 20, 21, np.inf, -np.inf, np.nan], dtype=np.float32))
    assert found[0] == 0 and found[1] == 0.5
    assert 0.99 < found[2] < found[3] < 1
    assert np.isnan(found[4:]).all()


def test_all_work_is_dropped_once(folders: dict[str, Path]) -> None:
    served = Served(folders["reranker"], Answers(1))
    served.add("who", documents=["a"])
    served.step()
    jobs = [served.add("who", documents=["a"]), served.add("what", documents=["a", "b", "c"])]
    assert served.encoding.drop() == jobs
    assert served.step() == {}


def test_another_kind_of_work_is_refused(folders: dict[str, Path]) -> None:
    served = Served(folders["embedding"])
    job = Job(
        Submit(call=0, model="m", kind="tag", work="w", request_id="r", text="a"),
        "g",
        lambda event: None,
        METRICS.request(5),
    )
    with pytest.raises(RecordError, match="embedding cannot tag"):
        served.encoding.add(job)


def test_dimensions_of_what_is_no_embedding_are_refused(folders: dict[str, Path]) -> None:
    served = Served(folders["classifier"])
    with pytest.raises(RecordError, match="dimensions is 3, classifier makes no embeddings"):
        served.add("a", dimensions=3)


def test_faults_are_told_by_their_code(folders: dict[str, Path]) -> None:
    served = Served(folders["embedding"])
    served.add("a")
    served.encoding._encoder._run = lambda *_: 1 / 0  # type: ignore[method-assign]
    [fault] = served.step().values()
    assert isinstance(fault, Fault) and fault.kind == "record"


def test_a_text_of_an_earlier_lane_goes_before_those_that_came_first(folders: dict[str, Path]) -> None:
    served = Served(folders["embedding"])
    rows = LIMITS["cpu"].rows
    for i in range(100, 110 + rows):
        served.add(str(i))
    served.add("200", priority=9)
    served.add("300", priority=0)
    first, second = served.step(), served.step()
    assert "300" in first and len(first) == rows
    assert {"200", str(109 + rows)} <= set(second)
