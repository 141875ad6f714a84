"""How long a call waits before another try, and what becomes of one that a handler calls worth it."""

import math
import pickle
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.call import OperatorSettings
from flink_llm.errors import Outage, Overloaded, RecordError, Retriable
from flink_llm.handler import AsyncUdf
from flink_llm.retries import BACKOFF_LIMIT_S, BACKOFF_S, foremost, wait_before
from flink_llm.testing import Harness

seconds = st.floats(0, 60)
errors = st.one_of(
    st.just(Outage("told to")),
    st.just(ConnectionResetError()),
    st.builds(lambda after: Overloaded("told to", after), seconds),
    st.builds(lambda after: Retriable("told_to", "told to", after), seconds),
)


@given(errors, st.integers(1, 10_000), st.none() | st.floats(0, 600), st.randoms(use_true_random=False))
def test_a_wait_is_bounded_fits_and_heeds_what_it_was_told(error, attempt, left, chance):
    told = getattr(error, "retry_after", 0.0)
    delay = wait_before(error, attempt, left, chance.uniform)
    if delay is None:
        assert left <= told + BACKOFF_S
    else:
        assert told <= delay <= told * 1.5 + BACKOFF_LIMIT_S
        assert delay > 0  # never a loop without a pause
        assert left is None or delay < left


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ("5", 5.0),
        (None, 0.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
        (math.nan, 0.0),
        (math.inf, 0.0),
        (-1, 0.0),
        (10**400, 0.0),
    ],
)
def test_a_retry_after_is_taken_as_the_answer_had_it(after, told):
    assert told <= wait_before(Retriable("busy", "503", after), 1) <= 1.5 * told + BACKOFF_S


OUT, BUSY, WRONG, FOREIGN = Outage("out"), Overloaded("busy"), RecordError("invalid", "wrong"), ValueError("bug")


@pytest.mark.parametrize(
    ("errors", "stands"),
    [([OUT, BUSY], OUT), ([BUSY, OUT], BUSY), ([OUT, WRONG], WRONG), ([OUT, FOREIGN], None), ([FOREIGN], None)],
)
def test_one_error_stands_for_those_of_a_task_group(errors, stands):
    group = ExceptionGroup("of a TaskGroup", [ExceptionGroup("inner", errors[:1]), *errors[1:]])
    assert foremost(group) is (stands or group)


def test_waits_double_and_are_drawn():
    highest = [wait_before(Outage(""), attempt, draw=lambda low, high: high) for attempt in range(1, 9)]
    assert highest == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert wait_before(Overloaded("", 10), 1, draw=lambda low, high: high) > 14
    assert wait_before(Outage(""), 1) != wait_before(Outage(""), 1)


def test_a_seed_of_the_handlers_does_not_bring_all_workers_back_in_step():
    drawn = []
    for _ in range(2):
        random.seed(1)
        drawn.append([wait_before(Outage(""), attempt) for attempt in range(1, 9)])
    assert drawn[0] != drawn[1]


class Flaky(AsyncUdf):
    """Fails as often as the request says."""

    tries = 0

    async def call(self, request: dict, ctx):
        self.tries += 1
        assert ctx.attempt == self.tries - 1
        if self.tries <= request["fails"]:
            raise Retriable("no_quote", f"try {self.tries}", request.get("after", 0.0))
        return {"tries": self.tries}


def run(request, **settings):
    udf = Flaky()
    with Harness(udf, settings=OperatorSettings(**settings)) as harness:
        harness.send({"session_id": "s", **request})
        harness.finish()
    return udf, harness


def test_a_call_that_is_worth_it_is_tried_again():
    _, harness = run({"fails": 2})
    assert harness.results() == [{"tries": 3}]
    assert harness.runner.metrics.counts["retries"] == 2


def test_after_so_many_tries_the_record_is_a_failure_with_its_own_code():
    udf, harness = run({"fails": 10}, retries=1)
    assert udf.tries == 2
    assert [(failure["code"], failure["message"]) for failure in harness.failures()] == [("no_quote", "try 2")]


def test_no_retry_waits_beyond_the_deadline():
    began = time.monotonic()
    udf, harness = run({"fails": 10, "after": 30.0}, deadline=20.0)
    assert udf.tries == 1
    assert time.monotonic() - began < 10
    assert [failure["code"] for failure in harness.failures()] == ["no_quote"]


def test_it_can_be_pickled():
    again = pickle.loads(pickle.dumps(Retriable("c", "m", 2.5)))
    assert (again.code, again.message, again.retry_after) == ("c", "m", 2.5)
