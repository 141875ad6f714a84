"""Work beside the engine's thread: in order, bounded, left at once, and nobody's tokens wait for it."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flink_llm.engine import preparing
from flink_llm.engine.aside import Aside
from flink_llm.engine.job import Job
from flink_llm.engine.metrics import Metrics
from flink_llm.engine.protocol import Done, Fault, Submit
from flink_llm.errors import Overloaded, RecordError
from tests import tiny
from tests.test_admission import Stage

CHOICES = ["yes", "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.decoder(tmp_path_factory.mktemp("models") / "tiny")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


class Gate:
    """What is called stops here until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.calls = 0

    def __call__(self, *_: Any) -> int:
        self.calls += 1
        self.reached.set()
        assert self.opened.wait(10)
        return self.calls


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


class Jobs:
    """Jobs, and how often they woke their engine."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1

    def __call__(self, priority: int = 5) -> Job:
        work = Submit(call=0, model="", kind="generate", work="w", request_id="r", priority=priority)
        return Job(work, "g", lambda event: None, self.metrics.model("m", "a" * 64).request(5), self.wake)

    @property
    def cancelled(self) -> float | None:
        labels = {"model": "m", "model_hash": "a" * 12, "lane": "5", "outcome": "cancelled"}
        return self.metrics.registry.get_sample_value("flink_llm_requests_total", labels)


def fails() -> int:
    raise RecordError("bad_option", "no")


def test_calls_are_done_in_order_and_their_errors_are_theirs() -> None:
    aside: Aside[int] = Aside(10)
    jobs = Jobs()
    put = [jobs() for _ in range(4)]
    for number, job in enumerate(put):
        aside.put(job, fails if number == 2 else lambda number=number: number)  # type: ignore[misc]
    taken: list[Any] = []
    until(lambda: taken.extend(aside.take()) or len(taken) == 4)
    assert [job for job, _ in taken] == put
    assert [made for _, made in taken if not isinstance(made, RecordError)] == [0, 1, 3]
    until(lambda: jobs.woken == 4)
    assert aside.take() == []


def test_a_thread_is_there_while_there_is_work(gate: Gate) -> None:
    def threads() -> int:
        return sum(thread.name == "flink-llm aside" for thread in threading.enumerate())

    aside: Aside[int] = Aside(10)
    assert threads() == 0
    for _ in range(2):
        aside.put(Jobs()(), gate)
    assert threads() == 1
    gate.opened.set()
    until(lambda: threads() == 0)
    aside.put(Jobs()(), gate)
    until(lambda: len(aside.take()) or gate.calls == 3)


def test_no_more_wait_than_may(gate: Gate) -> None:
    aside: Aside[int] = Aside(2)
    jobs = Jobs()
    first = jobs()
    aside.put(first, gate)
    aside.put(jobs(), gate)
    with pytest.raises(Overloaded, match="2 requests are being prepared"):
        aside.put(jobs(), gate)
    assert gate.reached.wait(10)
    first.cancelled = True
    assert aside.take() == []
    aside.put(jobs(), gate)


def test_who_is_urgent_goes_before_those_who_wait_and_is_not_refused_for_them(gate: Gate) -> None:
    aside: Aside[int] = Aside(2)
    jobs = Jobs()
    put = [jobs(), jobs(), jobs(priority=0)]
    aside.put(put[0], gate)
    assert gate.reached.wait(10)
    for job in put[1:]:
        aside.put(job, gate)
    with pytest.raises(Overloaded):
        aside.put(jobs(priority=0), gate)
    gate.opened.set()
    taken: list[Any] = []
    until(lambda: taken.extend(aside.take()) or len(taken) == 3)
    assert [job for job, _ in taken] == [put[0], put[2], put[1]]


def test_who_is_cancelled_is_gone_at_once_and_never_heard_of(gate: Gate) -> None:
    aside: Aside[int] = Aside(10)
    jobs = Jobs()
    put = [jobs() for _ in range(3)]
    for job in put:
        aside.put(job, gate)
    assert gate.reached.wait(10)
    put[0].cancelled = put[1].cancelled = True  # one at work, one waiting
    assert aside.take() == []
    assert jobs.cancelled == 2
    gate.opened.set()
    taken: list[Any] = []
    until(lambda: taken.extend(aside.take()) or taken)
    assert ([job for job, _ in taken], gate.calls) == ([put[2]], 2)
    assert jobs.cancelled == 2


def test_what_was_dropped_is_forgotten(gate: Gate) -> None:
    aside: Aside[int] = Aside(10)
    jobs = Jobs()
    put = [jobs(), jobs()]
    for job in put:
        aside.put(job, gate)
    assert gate.reached.wait(10)
    assert aside.drop() == put
    gate.opened.set()
    until(lambda: jobs.woken == 1)
    last = jobs()
    aside.put(last, lambda: 7)
    taken: list[Any] = []
    until(lambda: taken.extend(aside.take()) or taken)
    assert taken == [(last, 7)]


def generated(stage: Stage) -> float:
    return stage.value("completion_tokens_total")


def test_others_generate_while_a_grammar_is_compiled(folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = preparing.definition
    monkeypatch.setattr(preparing, "definition", lambda *given: gate() and compiled(*given))
    stage = Stage(folder)
    stage.add(max_tokens=20)
    asks, leaves, nonsense = (
        stage.add(choices=CHOICES), stage.add(choices=CHOICES), stage.add(json_schema='{"type": 3}')
    )  # fmt: skip
    assert gate.reached.wait(10)
    while stage.step():
        pass
    assert generated(stage) > 1
    assert [type(event) for _, event in stage.said if not hasattr(event, "sequence")] == [Done]
    assert stage.value("queue_length") == 3
    leaves.cancelled = True
    stage.step()
    assert stage.value("queue_length") == 2
    gate.opened.set()
    stage.said.clear()

    def ended() -> list[Done | Fault]:
        stage.step()
        return [event for _, event in stage.said if isinstance(event, (Done, Fault))]

    until(lambda: len(ended()) == 2)
    ends = ended()
    assert {event.text for event in ends if isinstance(event, Done)} <= set(CHOICES)
    assert [event.code for event in ends if isinstance(event, Fault)] == ["bad_option"]
    assert (gate.calls, asks.cancelled, nonsense.cancelled) == (2, False, False)


def test_work_that_is_dropped_includes_what_is_compiled(
    folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "definition", gate)
    stage = Stage(folder)
    compiled, runs = stage.add(choices=CHOICES), stage.add()
    assert set(stage.model.drop()) == {compiled, runs}
    gate.opened.set()
    assert not stage.step()
