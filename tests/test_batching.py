"""What an encoder runs next: none lost, none doubled, little padding, and nobody overtaken beyond the ceiling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.batching import Limits, next_run

LIMITS = Limits(rows=8, padded_tokens=300, padding=0.25, free_tokens=20, ceiling_s=0.05, window=32)
LENGTHS = st.integers(1, 400)


@given(lengths=st.lists(LENGTHS, max_size=60), oldest_s=st.floats(0, 1))
def test_a_run_keeps_its_limits(lengths, oldest_s):
    run = next_run(lengths, oldest_s, LIMITS)

    assert bool(run) == bool(lengths)
    assert run == sorted(set(run)) and all(i < LIMITS.window for i in run)
    assert len(run) <= LIMITS.rows
    if len(run) > 1:
        padded = len(run) * max(lengths[i] for i in run)
        assert padded <= LIMITS.padded_tokens
        assert padded - sum(lengths[i] for i in run) <= max(LIMITS.free_tokens, LIMITS.padding * padded)


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 0.1), LENGTHS), min_size=1, max_size=80),
    second_per_token=st.sampled_from([0.0, 1e-5, 1e-3]),
)
def test_all_are_run_once_and_none_is_overtaken_beyond_the_ceiling(arrivals, second_per_token):
    """Plays a machine that is idle, busy or far too slow, from the first arrival to the last answer."""
    due, at = [], 0.0
    for gap, length in arrivals:
        at += gap
        due.append((at, length))
    now, waiting, answered = 0.0, [], []
    while due or waiting:
        if not waiting:
            now = max(now, due[0][0])
        while due and due[0][0] <= now:
            waiting.append(due.pop(0))
        oldest = waiting[0]
        run = next_run([length for _, length in waiting], now - oldest[0], LIMITS)
        if now - oldest[0] >= LIMITS.ceiling_s:
            assert 0 in run
        answered += [waiting[i] for i in run]
        now += second_per_token * len(run) * max(waiting[i][1] for i in run)
        waiting = [each for i, each in enumerate(waiting) if i not in run]
    at, expected = 0.0, []
    for gap, length in arrivals:
        at += gap
        expected.append((at, length))
    assert sorted(answered) == sorted(expected)


def test_a_long_text_is_not_starved_by_short_ones_that_keep_coming():
    waiting = [(0.0, 290), *((0.0, 5) for _ in range(20))]
    now, runs_before = 0.0, 0
    while any(length == 290 for _, length in waiting):
        run = next_run([length for _, length in waiting], now - waiting[0][0], LIMITS)
        waiting = [each for i, each in enumerate(waiting) if i not in run] + [(now, 5)] * len(run)
        now += 0.01
        runs_before += 1
    assert runs_before == 6  # five of ten milliseconds while it may be overtaken, then its own


@pytest.mark.parametrize(
    ("lengths", "oldest_s", "run"),
    [
        ([], 0.0, []),
        ([1000], 0.0, [0]),
        ([1000, 5, 6], 0.0, [1, 2]),
        ([1000, 5, 6], 0.05, [0]),
        ([9, 5, 250], 0.0, [0, 1]),
        ([100, 98, 30, 103], 0.0, [2]),
        ([100, 98, 30, 103], 0.05, [0, 1, 2]),
        ([100, 90, 30], 0.05, [0, 1]),
    ],
)
def test_the_next_run(lengths, oldest_s, run):
    assert next_run(lengths, oldest_s, LIMITS) == run
