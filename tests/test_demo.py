"""How the demo ends, with a sleeping process in the place of its job."""

import sys
from pathlib import Path

import pytest

from flink_llm.config import parse
from flink_llm.errors import ConfigError, LocalError
from flink_llm.local import demo, demo_job, processes, talk
from flink_llm.local.demo_table import Tally
from flink_llm.local.talk import Talk, ask


@pytest.mark.parametrize("data", [None, b"", b"no JSON", b"[1]", b'"a"', b"\xff", b"[" * 100_000])
def test_what_others_write_to_the_topics_is_no_outcome(data):
    assert talk._object(data) is None


class Scripted(demo.Demo):
    """Starts a process as its job; `script` says what comes up on the way."""

    def __init__(self, state: Path, **script: type[BaseException]) -> None:
        super().__init__(state, 1)
        self.script = script
        self._talk.converse = lambda patience: self._comes_up("converse")

    def _start(self) -> None:
        processes.start(["sleep", "60"], self._log, file=self._job_file)
        self.started = processes.recall(self._job_file)
        self._comes_up("start")

    def _sample(self) -> bool:
        return "failed" not in self.script

    def _comes_up(self, where: str) -> None:
        if where in self.script:
            raise self.script[where]


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Plays a demo at a terminal; its answer, after a look that nothing is left."""
    monkeypatch.setattr(demo_job, "demo_model", lambda: tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    def play(**script):
        it = Scripted(tmp_path / "state", **script)
        try:
            return it.run()
        finally:
            assert it.started is not None and it.started.process() is None
            assert processes.recall(tmp_path / "state" / "demo.json") is None

    return play


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_a_talk_is_no_error_nor_is_a_failure(end, capsys, monkeypatch):
    failure = {"request_id": "7", "code": "model_error", "message": "it [broke]"}
    talk = Heard(("chat.failures", failure))
    said = iter(["Where?", "And?"])
    asked = []

    def line(prompt):
        talk.arrived = talk.arrived if not asked else ()
        return next(said, None) or ended()

    def ended():
        raise end

    talk._console.input = line
    monkeypatch.setattr(talk, "send", lambda *request: asked.append(request) or "7")
    monkeypatch.setattr(talk, "flush", lambda: None)
    talk.converse(5, "user-2", "s")
    assert asked == [("Where?", "user-2", "s"), ("And?", "user-2", "s")]
    assert capsys.readouterr().out.splitlines() == ["model_error: it [broke]", "no reply within 5 s"]


def test_an_event_without_a_reply_is_told_after_the_talk(played):
    assert played(failed=LocalError) is False


@pytest.mark.parametrize("end", [KeyboardInterrupt, LocalError])
def test_an_end_during_the_start_is_passed_on(played, end):
    with pytest.raises(end):
        played(start=end)


def test_a_job_that_a_killed_demo_left_is_stopped(played, tmp_path):
    (tmp_path / "state").mkdir()
    left = processes.start(["sleep", "60"], tmp_path / "log", file=tmp_path / "state" / "demo.json")
    played()
    assert left.process() is None


def test_a_second_demo_of_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_job, "demo_model", lambda: tmp_path)
    with demo.FileLock(tmp_path / "demo.lock"), pytest.raises(LocalError, match=r"^a demo runs in .* already"):
        demo.Demo(tmp_path, 1).run()


class Heard(Talk):
    """Hears what a test says."""

    def __init__(self, *arrived):
        super().__init__(demo.Console(width=200), lambda: None)
        self.arrived = arrived

    def outcomes(self, patience):
        yield from self.arrived


def tokens(*texts, of="7"):
    return [("chat.tokens", {"request_id": of, "text": text}) for text in texts]


def reply(text, of="7"):
    usage, timings = {"completion_tokens": 3}, {"per_token_ms": 1.0}
    return "chat.responses", {"request_id": of, "text": text, "usage": usage, "timings": timings}


@pytest.mark.parametrize("streamed", [["Order 7 ", "is packed."], ["Order 7 "], [], ["Else"]])
def test_a_reply_is_whole_though_it_overtakes_its_tokens(capsys, streamed):
    talk = Heard(*tokens(*streamed), reply("Order 7 is packed."))
    assert talk.show("7", 1) == len(streamed)
    assert "Order 7 is packed." in capsys.readouterr().out.splitlines()


def test_a_reply_is_shown_while_it_comes(capsys):
    talk = Heard(*tokens("of another", of="6"), *tokens("Order 7 "))
    seen = []
    assert talk.show("7", 1, lambda: seen.append(capsys.readouterr().out)) is None
    assert seen == [""]
    assert capsys.readouterr().out == "Order 7 "


def test_a_failure_comes_in_the_reply_s_place():
    failure = {"request_id": "7", "code": "model_error", "message": "it broke"}
    with pytest.raises(LocalError, match=r"^model_error: it broke$"):
        Heard(("chat.failures", failure)).show("7", 1)


def test_an_event_counts_once_however_often_it_arrives():
    tally = Tally()
    tally.sent = {"7": 0.0, "8": 0.0}
    [token], answer = tokens("Or"), reply("Order 7")
    assert [tally.note(*each) for each in (token, answer, answer, token, reply("", of="9"))] == [
        False, True, False, False, False,
    ]  # fmt: skip
    failure = {"request_id": "8", "code": "model_error"}
    assert tally.note("chat.failures", failure) is False
    assert (tally.ended, len(tally.replies)) == (2, 1)
    names, values = (list(column.cells) for column in tally.table(2.0, "after 3 s").columns)
    said = dict(zip(names, values, strict=True))
    assert said["first streamed reply"] == "after 3 s"
    assert said["answered"] == "1 of 2" and said["failures"] == "1"
    assert "to the first token, 2 at once, p50" in said


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"job": "embedding"}, "makes vectors$"),
        ({"files": {"requests": "in", "outcomes": "out"}}, "reads files$"),
        ({"kafka": {"bootstrap_servers": "127.0.0.1:1"}}, "no broker answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_asked_says_why(changes, why, tmp_path):
    raw = {"job": "llm_inference", "name": "n", "models": {"support-chat": "m"}, **changes}
    with pytest.raises(ConfigError, match=why):
        ask(parse(raw, tmp_path), "Where?", "user-1", None, 1.0)


def test_others_replies_are_no_sign_of_life(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("flink_llm.local.talk.time.monotonic", lambda: float(next(clock)))
    talk = Heard(*(reply("to another", of="6") for _ in range(100)))
    assert talk.show("7", 20) is None
    assert next(clock) < 30
