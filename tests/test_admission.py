"""Who is let in and who leaves, in the models themselves: step by step, without a thread."""

from pathlib import Path
from typing import Any

import pytest

from flink_llm.engine.answers import Answers
from flink_llm.engine.decoding import Decoding
from flink_llm.engine.encoding import Encoding
from flink_llm.engine.job import Job, Said, ServedModel
from flink_llm.engine.metrics import Metrics
from flink_llm.engine.model import open_model_folder
from flink_llm.engine.protocol import Options, Submit
from flink_llm.engine.settings import HostSettings
from flink_llm.errors import Outage, Overloaded, RecordError
from tests import tiny

SETTINGS = HostSettings(device="cpu", slots=1, queue=3, threads=1)


@pytest.fixture(scope="module")
def generates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.encoder(tmp_path_factory.mktemp("models") / "embedding", "embedding")


class Stage:
    """A model, its metrics, and the jobs it is given."""

    def __init__(self, folder: Path) -> None:
        opened = open_model_folder(folder)
        self.metrics = Metrics()
        kind = self.kind = opened.manifest.kind
        self.name = opened.manifest.name
        metrics = self.metrics.model(self.name, "a" * 64)
        self.model: ServedModel = (
            Decoding(opened, SETTINGS, "cpu", metrics)
            if kind == "decoder"
            else Encoding(opened, SETTINGS, "cpu", metrics, Answers(0))
        )
        self.said: Said = []

    def add(self, text: str = "hello", *, deadline: float | None = None, priority: int = 5, **options: Any) -> Job:
        work = Submit(
            call=0, model="", kind="generate" if self.kind == "decoder" else "embed", work="w", request_id="r",
            prompt=text, text=text, deadline=deadline, priority=priority, options=Options(**options),
        )  # fmt: skip
        job = Job(work, "g", lambda event: None, self.model.metrics.request(5))
        self.model.add(job)
        return job

    def step(self) -> bool:
        return bool(self.model.step(self.said))

    def value(self, name: str, **labels: str) -> float:
        of = {"model": self.name, "model_hash": "a" * 12, "lane": "5", **labels}
        return self.metrics.registry.get_sample_value(f"flink_llm_{name}", of) or 0.0


@pytest.mark.parametrize("kind", ["decoder", "embedding"])
def test_whose_client_has_gone_leaves_the_queue_at_the_next_step(kind: str, generates: Path, embeds: Path) -> None:
    stage = Stage(generates if kind == "decoder" else embeds)
    if kind == "decoder":
        stage.add(max_tokens=400)
        stage.step()
    waiting = [stage.add() for _ in range(SETTINGS.queue)]
    with pytest.raises(Overloaded):
        stage.add()
    for job in waiting:
        job.cancelled = True
    stage.step()
    assert stage.value("requests_total", outcome="cancelled") == SETTINGS.queue
    assert stage.value("queue_length") == 1  # of the one that was refused here, whose end is the engine's to tell
    stage.add()
    assert stage.value("queue_length") == 2


def test_a_generation_that_would_begin_too_late_is_refused(generates: Path) -> None:
    stage = Stage(generates)
    stage.add(max_tokens=400)
    stage.step()
    stage.add(deadline=1e-6)  # nothing has ended yet: nothing is known
    stage.model._scheduler._pace.took(50.0)
    with pytest.raises(Overloaded, match=r"the wait is about 100\.0 s, the deadline is in (60|59)\.") as caught:
        stage.add(deadline=60.0)
    assert (caught.value.reason, caught.value.retry_after) == ("deadline", 30.0)
    stage.add(deadline=101.0)


def test_a_text_that_would_be_read_too_late_is_refused(embeds: Path) -> None:
    stage = Stage(embeds)
    stage.add()
    assert stage.step()
    assert not stage.step()
    stage.model._pace.took(50.0)
    stage.add(deadline=1.0)  # nobody is before it
    with pytest.raises(Overloaded, match=r"the deadline is in 1\.0|0\.9") as caught:
        stage.add(deadline=1.0)
    assert caught.value.reason == "deadline"
    stage.add(deadline=51.0)
    stage.step()
    assert stage.value("requests_total", outcome="stop") == 3


def test_a_text_is_judged_by_those_that_are_read_before_it(embeds: Path) -> None:
    stage = Stage(embeds)
    stage.model._pace.took(50.0)
    stage.add("low", priority=9)
    with pytest.raises(Overloaded, match=r"the wait is about 50\.0 s"):
        stage.add("low as well", deadline=1.0, priority=9)
    stage.add("high", deadline=1.0, priority=0)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(Outage("gone"), "outage"), (RecordError("bad_option", "no"), "invalid"), (ValueError("odd"), "failed")],
)
def test_an_end_is_counted_once_as_what_it_was(embeds: Path, error: Exception, outcome: str) -> None:
    stage = Stage(embeds)
    job = stage.add()
    job.fail(error, stage.said)
    job.leave()
    assert stage.value("requests_total", outcome=outcome) == 1
    assert (stage.value("requests_total", outcome="cancelled"), stage.value("queue_length")) == (0, 0)


def test_a_refusal_is_counted_with_its_reason(embeds: Path) -> None:
    stage = Stage(embeds)
    for reason in ("full", "deadline", "deadline"):
        job = stage.add()
        job.fail(Overloaded("told to", 1.0, reason), stage.said)  # type: ignore[arg-type]
    assert stage.value("requests_total", outcome="refused_deadline") == 2
    assert stage.value("requests_total", outcome="refused_full") == 1
    assert {event.kind for _, event in stage.said} == {"overloaded"}  # type: ignore[union-attr]
