"""What is older than its transactions is refused, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.errors import ConfigError, StateError
from flink_llm.transactions import AliveWatch, checkpoint_timeout_ms


def watch(now_ms: int, *, submitted_ms: int = 0, of_savepoint: bool = False) -> AliveWatch:
    return AliveWatch(600_000, submitted_ms=submitted_ms, of_savepoint=of_savepoint, clock=lambda: now_ms)


@pytest.mark.parametrize("alive_ms", [None, 400_000, 1_000_000])
def test_what_the_broker_still_holds_may_be_restored(alive_ms):
    watch(1_000_000).check(alive_ms)


def test_an_older_checkpoint_is_refused_with_both_numbers():
    with pytest.raises(StateError, match=r"is 601 s old, longer than kafka\.transaction_timeout_ms=600000"):
        watch(1_000_000).check(399_000)


def test_a_savepoint_may_be_as_old_as_it_likes():
    watch(10**9, submitted_ms=10**9 - 5, of_savepoint=True).check(1)


def test_a_job_that_began_from_a_savepoint_is_refused_after_an_outage_of_its_own():
    with pytest.raises(StateError, match=r"is 700 s old"):
        watch(1_000_000, submitted_ms=200_000, of_savepoint=True).check(300_000)


def test_a_retained_checkpoint_is_no_savepoint():
    with pytest.raises(StateError, match=r"resume_after_timeout: true"):
        watch(1_000_000, submitted_ms=999_000).check(1)


@given(st.integers(1_000, 3_600_000), st.integers(10, 60_000), st.integers(0, 20))
def test_as_many_checkpoints_as_may_fail_end_before_the_transactions(transaction_ms, interval_ms, tolerable):
    try:
        timeout = checkpoint_timeout_ms(transaction_ms, interval_ms, tolerable, None)
    except ConfigError:
        assert (tolerable + 1) * (1_000 + interval_ms) > transaction_ms - tolerable
    else:
        assert timeout >= 1_000 and (tolerable + 1) * (timeout + interval_ms) <= transaction_ms


def test_a_timeout_of_ones_own_that_is_too_long_is_refused():
    assert checkpoint_timeout_ms(600_000, 1_000, 10, 50_000) == 50_000
    with pytest.raises(
        ConfigError, match=r"is 600000, and 10 failed .* of 60000 ms and 1000 ms apart, may last 671000"
    ):
        checkpoint_timeout_ms(600_000, 1_000, 10, 60_000)
