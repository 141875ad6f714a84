import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.tempo import KEPT, LEAST_SHARE, NEAR, Tempo, TempoMeter

COUNTS = st.lists(st.integers(1, NEAR), min_size=2, max_size=KEPT, unique=True)


@given(COUNTS, st.floats(0.001, 0.1), st.floats(0.0001, 0.01))
def test_what_a_run_and_a_token_take_is_learnt(counts, run_s, token_s):
    meter = TempoMeter()
    for count in counts * 20:
        meter.read(count, run_s + token_s * count)
    counts = (counts * 20)[-KEPT:]
    mean = sum(counts) / len(counts)
    if token_s >= LEAST_SHARE * (run_s / mean + token_s):
        assert meter.tempo.run_s == pytest.approx(run_s, rel=0.02, abs=1e-6)
        assert meter.tempo.token_s == pytest.approx(token_s, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(0.0, 1.0)), min_size=1, max_size=2 * KEPT))
def test_whatever_is_measured_neither_a_run_nor_a_token_takes_less_than_nothing(runs):
    meter = TempoMeter()
    for count, seconds in runs:
        meter.read(count, seconds)
    tempo = meter.tempo
    assert tempo.run_s >= -1e-9 and tempo.token_s >= 0
    assert not tempo.known, "no step has been measured"
    if tempo.token_s > 1e-6:
        assert tempo.reading(tempo.tokens_in(1.0)) <= 1.0 + 1e-6 or tempo.run_s > 1.0


def test_runs_far_into_a_prompt_tell_how_much_slower_they_are_and_change_no_line():
    meter = TempoMeter()
    meter.stepped(0.01)
    for count in (10, 20) * 20:
        meter.read(count, 0.1 + count * 0.004)
    assert meter.tempo.reading(20) == pytest.approx(0.18, rel=0.01)
    for _ in range(40):
        meter.read(20, 0.36, past=1000)
    assert meter.tempo.reading(20) == pytest.approx(0.36, rel=0.01)
    assert meter.tempo.reading(10) == pytest.approx(0.28, rel=0.01)
    for _ in range(40):
        meter.read(20, 0.18)
    assert meter.tempo.reading(20) == pytest.approx(0.18, rel=0.01)


def test_a_run_far_into_a_prompt_is_better_than_nothing():
    meter = TempoMeter()
    meter.stepped(0.01)
    meter.read(512, 5.12, past=512)
    assert meter.tempo == Tempo(0.01, 0.0, 0.01)


@given(st.lists(st.integers(16, 44), min_size=KEPT, max_size=2 * KEPT).filter(lambda counts: len(set(counts)) > 8))
def test_behind_a_beginning_that_all_share_a_run_is_learnt_as_well(counts):
    meter = TempoMeter()
    meter.stepped(0.01)
    meter.read(512, 0.0073 + 512 * 0.00028)
    for count in counts:
        meter.read(count, 0.0073 + count * 0.00028, past=512)
    for count in (16, 64, 128):
        assert meter.tempo.reading(count) == pytest.approx(0.0073 + count * 0.00028, rel=0.15)


@pytest.mark.parametrize("past", [0, 1000])
@pytest.mark.parametrize("stall", [1.0, 10.0, 1000.0])
def test_a_machine_that_stood_still_is_forgotten_soon(past, stall):
    meter = TempoMeter()
    meter.stepped(0.01)
    for count in (10, 20, 30, 40) * 8:
        meter.read(count, 0.01 + count * 0.0003)
    meter.read(20, stall, past=past)
    assert meter.tempo.reading(20) < 0.04
    for count in (10, 20, 30, 40) * 3:
        meter.read(count, 0.01 + count * 0.0003)
    assert meter.tempo.reading(20) == pytest.approx(0.016, rel=0.3)


def test_what_a_prompt_adds_to_a_step_tells_how_long_its_tokens_take_now():
    meter = TempoMeter()
    meter.stepped(0.02)
    for count in (10, 20) * 20:
        meter.read(count, 0.01 + count * 0.001)
    for _ in range(40):
        assert meter.mixed(20, 0.02 + 20 * 0.0015) == pytest.approx(0.03)
    assert meter.tempo.token_s == pytest.approx(0.0015, rel=0.02)
    assert meter.tempo.step_s == 0.02, "a step is what it is without a prompt"
    assert meter.mixed(1, 0.5) == pytest.approx(0.48), "of a few tokens nothing is learnt"
    assert meter.tempo.token_s == pytest.approx(0.0015, rel=0.02)
    assert meter.mixed(20, 0.01) == 0.0, "nobody waited for less than nothing"


def test_in_a_mixed_run_tokens_are_all_that_takes_time():
    tempo = Tempo(step_s=0.02, run_s=0.01, token_s=0.001)
    assert (tempo.mixed.reading(20), tempo.mixed.tokens_in(0.02), tempo.mixed.step_s) == (0.02, 20, 0.02)
