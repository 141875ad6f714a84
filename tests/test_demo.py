"""How the demo ends, with a sleeping process in the place of its job."""

import sys
from pathlib import Path

import pytest

from flink_llm.errors import LocalError
from flink_llm.local import demo, processes


class Scripted(demo.Demo):
    """Starts a process as its job; `script` says what comes up on the way."""

    def __init__(self, state: Path, **script: type[BaseException]) -> None:
        super().__init__(state, 1)
        self.script = script

    def _start(self) -> None:
        processes.start(["sleep", "60"], self._log, file=self._job_file)
        self.started = processes.recall(self._job_file)
        self._comes_up("start")

    def _sample(self) -> bool:
        return "failed" not in self.script

    def _converse(self) -> None:
        self._comes_up("converse")

    def _comes_up(self, where: str) -> None:
        if where in self.script:
            raise self.script[where]


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Plays a demo at a terminal; its answer, after a look that nothing is left."""
    monkeypatch.setattr(demo, "demo_model", lambda: tmp_path)
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
def test_the_end_of_the_talk_is_no_error(played, end):
    assert played(converse=end) is True


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
    monkeypatch.setattr(demo, "demo_model", lambda: tmp_path)
    with demo.FileLock(tmp_path / "demo.lock"), pytest.raises(LocalError, match=r"^a demo runs in .* already"):
        demo.Demo(tmp_path, 1).run()


@pytest.mark.parametrize("streamed", [["Order 7 ", "is packed."], ["Order 7 "], [], ["Else"]])
def test_a_reply_is_whole_though_it_overtakes_its_tokens(tmp_path, monkeypatch, capsys, streamed):
    talk = demo.Demo(tmp_path, 1)
    monkeypatch.setattr(talk, "_console", demo.Console(width=200))
    monkeypatch.setattr(talk._console, "input", lambda _: questions.pop())
    monkeypatch.setattr(talk, "_send", lambda *_: "7")
    talk._producer = type("Producer", (), {"flush": lambda self: None})()
    arrived = [("chat.tokens", {"request_id": "7", "text": text}) for text in streamed]
    arrived.append(("chat.responses", {"request_id": "7", "text": "Order 7 is packed."}))
    monkeypatch.setattr(talk, "_outcomes", lambda _: iter(arrived))
    questions = ["", "Where is order 7?"]
    talk._converse()
    assert "Order 7 is packed." in capsys.readouterr().out.splitlines()
