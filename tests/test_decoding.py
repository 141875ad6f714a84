"""Steps of a decoder at work, one by one."""

import pytest

from flink_llm.engine.decoding import Decoding
from flink_llm.engine.export import export_decoder
from flink_llm.engine.job import Job
from flink_llm.engine.metrics import Metrics
from flink_llm.engine.model import open_model_folder
from flink_llm.engine.protocol import Fault, Options, Submit
from flink_llm.engine.scheduler import HOLD_SHARE
from flink_llm.engine.settings import HostSettings
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    to = tmp_path_factory.mktemp("models") / "tiny"
    export_decoder(tiny.llama(tmp_path_factory.mktemp("source") / "llama"), to, name="tiny", precision="fp32")
    return to


class Steps:
    """A decoder without its engine: `step` gives the events of one step, each with the name of its work."""

    def __init__(self, folder, **settings):
        opened = open_model_folder(folder)
        plain = HostSettings(device="cpu", slots=8, threads=1, **settings)
        self.served = Decoding(opened, plain, "cpu", Metrics().model("tiny", "0" * 64))
        self.jobs = {}

    def ask(self, name, prompt, tokens):
        work = Submit(
            call=0,
            model="",
            kind="generate",
            work=name,
            request_id=name,
            prompt=prompt,
            options=Options(max_tokens=tokens),
        )
        job = self.jobs[name] = Job(work, name, lambda event: None, self.served.metrics.request(5))
        self.served.add(job)

    def step(self):
        said = []
        self.served.step(said)
        return [(event.generation or "", event) for _, event in said]

    def said(self):
        """Tokens of each reply so far."""
        entries = self.served._entries.values()
        return {entry.item.job.work.work: len(entry.item.sequence.tokens) for entry in entries}

    def run(self):
        found = {}
        for _ in range(500):
            for name, event in self.step():
                found.setdefault(name, []).append(event)
            if not self.served._entries:
                return found
        raise AssertionError("it never ends")


def alone(folder, prompt, tokens):
    steps = Steps(folder)
    steps.ask("alone", prompt, tokens)
    return steps.run()["alone"][-1].text


def amidst(folder, new):
    """Replies decode, more than a burst holds, and a prompt has just been read whose first token has a text."""
    steps = Steps(folder, speculation=False, mixed_mb=0)
    for number in range(HOLD_SHARE + 1):
        steps.ask(f"long {number}", f"a text that goes on {number}", 60)
    while len(steps.said()) <= HOLD_SHARE or not all(steps.said().values()):
        steps.step()
    for number in range(20):  # a first token may have no text yet, and is no reason to tell before the step then
        steps.ask(new, f"another one {number}", 40)
        before = steps.said()
        while not steps.said().get(new):
            before = steps.said()
            steps.step()
        if steps.served._due:
            return steps, before
        steps.jobs[new].cancelled = True
        steps.step()
    raise AssertionError("no first token was told before a step: nothing was tried")


def test_a_first_token_is_told_before_the_step_in_which_it_takes_part(folder):
    steps, before = amidst(folder, "new")
    assert steps.said() == {**before, "new": 1}, "nobody's step stands between"
    steps.step()
    assert steps.said() == {name: count + 1 for name, count in before.items()} | {"new": 2}, "one step of all"


@pytest.mark.parametrize("speculation", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_whoever_comes_amidst_others_says_what_it_says_alone(folder, tokens, speculation):
    steps = Steps(folder, speculation=speculation)
    steps.ask("long", "so it goes, so it goes, so it goes", 60)
    found = {}
    for number in range(6):
        for _ in range(3):
            for name, event in steps.step():
                found.setdefault(name, []).append(event)
        steps.ask(f"new {number}", f"prompt {number}", tokens)
    for name, events in steps.run().items():
        found.setdefault(name, []).extend(events)
    for number in range(6):
        assert found[f"new {number}"][-1].text == alone(folder, f"prompt {number}", tokens)
        assert found[f"new {number}"][-1].completion_tokens <= tokens
    assert found["long"][-1].text == alone(folder, "so it goes, so it goes, so it goes", 60)


def test_who_is_cancelled_between_its_first_token_and_the_step_is_gone(folder):
    steps, _ = amidst(folder, "new")
    steps.jobs["new"].cancelled = True
    events = steps.run()
    assert "new" not in events
    assert len(events) == HOLD_SHARE + 1 and {each[-1].finish for each in events.values()} <= {"length", "stop"}


def test_work_that_is_dropped_between_a_first_token_and_the_step_is_gone(folder):
    steps, before = amidst(folder, "new")
    assert {job.work.work for job in steps.served.drop()} == {"new", *before}
    assert steps.step() == []
    steps.ask("again", "another one", 5)
    assert not any(isinstance(event, Fault) for event in steps.run()["again"])
