"""What the mini-cluster's job fails of is told once, whatever Flink's REST interface is doing meanwhile."""

import urllib.error

from flink_llm.local.failures import AGAIN_S, Failures

TRACE = "java.lang.RuntimeException: x\n\tat y\nCaused by: Traceback (most recent call last):\n  f()\nValueError: {}"


class Flink:
    def __init__(self):
        self.entries = []
        self.state = "RESTARTING"

    def fails(self, when, why):
        self.entries.insert(0, {"timestamp": when, "stacktrace": TRACE.format(why)})

    def __call__(self, path):
        if path == "/jobs/overview":
            return {"jobs": [{"jid": "1", "name": "chat", "state": self.state}]}
        assert path == "/jobs/1/exceptions"
        return {"exceptionHistory": {"entries": self.entries}}


def line(why):
    return f"the job chat has failed and is restarted: ValueError: {why}"


def test_a_failure_is_told_once_and_again_after_a_while():
    flink, failures = Flink(), Failures()
    assert list(failures.new(flink, 0.0)) == []
    flink.fails(10, "a")
    assert list(failures.new(flink, 1.0)) == [line("a")]
    assert list(failures.new(flink, 2.0)) == []
    flink.fails(20, "a")
    flink.fails(30, "b")
    assert list(failures.new(flink, 3.0)) == [line("b")], "the same again a moment later says nothing new"
    flink.fails(40, "a")
    assert list(failures.new(flink, 1.0 + AGAIN_S)) == [line("a")]


def test_a_job_that_ends_of_its_failure_says_so_itself():
    flink, failures = Flink(), Failures()
    flink.state = "FAILED"
    flink.fails(10, "a")
    assert list(failures.new(flink, 1.0)) == []


def test_flink_that_does_not_answer_is_no_failure():
    def down(path):
        raise urllib.error.URLError("refused")

    assert list(Failures().new(down, 0.0)) == []
    assert list(Failures().new(lambda path: {"errors": ["starting"]}, 0.0)) == []


def test_what_is_told_of_a_failure_shows_no_password():
    flink = Flink()
    flink.fails(10, "cannot log in with password=hush")
    assert list(Failures().new(flink, 0.0)) == [line("cannot log in with password=********")]
