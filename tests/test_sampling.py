"""Draws: right by the definition, the same whoever shares the batch, and nothing of the logits' size made."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.protocol import Options
from flink_llm.engine.sampling import BLOCK, sample, uniform

SIZES = st.sampled_from([1, 2, 7, 300, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
OPTIONS = st.builds(
    Options,
    temperature=st.sampled_from([1e-310, 0.01, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 3000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.4, 1.0]),
    seed=st.integers(0, 2**53 - 1),
)


def logits(size: int, seed: int, spread: float, dtype: Any = np.float32) -> Any:
    random = np.random.default_rng(seed)
    row = random.standard_normal(size) * spread
    row[random.integers(0, size, size // 3)] = -np.inf
    row[random.integers(0, size)] = 0.0
    return np.round(row, 1).astype(dtype)


def defined(row: Any, option: Options, position: int) -> int:
    """The draw as top-k, top-p and the inverse transform are defined, over sorted copies."""
    row = row.astype(np.float64)
    order = np.lexsort((np.arange(row.size), -row))[: option.top_k or row.size]
    with np.errstate(over="ignore"):
        shares = np.exp((row - row.max()) / option.temperature)
    if option.top_p < 1:
        mass = np.cumsum(shares[order])
        order = order[: int(np.searchsorted(mass, option.top_p * mass[-1])) + 1]
    order = order[shares[order] >= option.min_p]
    mass = np.cumsum(np.where(np.isin(np.arange(row.size), order), shares, 0))
    return int(np.searchsorted(mass, uniform(option.seed, position) * mass[-1], "right"))


@given(SIZES, st.integers(0, 2**32), st.sampled_from([0.05, 1.0, 5.0, 300.0]), OPTIONS, st.integers(0, 9999))
def test_a_draw_is_what_the_options_define(size: int, seed: int, spread: float, option: Options, position: int) -> None:
    for dtype in (np.float32, np.float16):
        row = logits(size, seed, spread, dtype)
        assert sample(row[None], [0], [option], [position]) == [defined(row, option, position)]


def test_draws_follow_the_shares() -> None:
    row = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    count = 4000
    option = Options(temperature=1.0, seed=11)
    drawn = [sample(row[None], [0], [option], [position])[0] for position in range(count)]
    for token, share in enumerate([0.5, 0.3, 0.2]):
        assert drawn.count(token) / count == pytest.approx(share, abs=0.03)


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    row = logits(5000, 1, 3.0)
    option = Options(temperature=0.9, top_p=0.95, seed=5)
    alone = sample(row[None], [0], [option], [17])
    for other in range(5):
        batch = np.stack([logits(5000, 10 + other, 3.0), row, logits(5000, 20 + other, 3.0)])
        assert sample(batch, [0, 1, 2], [option] * 3, [3, 17, 4])[1:2] == alone


def test_a_temperature_near_nothing_is_greedy() -> None:
    row = np.array([1.0, 5.0, -3.0, 2.0], dtype=np.float32)
    options = [Options(temperature=1e-310, seed=seed) for seed in range(50)]
    assert sample(np.stack([row] * 50), list(range(50)), options, [0] * 50) == [1] * 50


@pytest.mark.parametrize(
    "option",
    [
        Options(),
        Options(temperature=1.0),
        Options(temperature=0.8, top_p=0.9),
        Options(temperature=1.0, top_k=50, top_p=0.9),
        Options(temperature=1.0, min_p=0.1),
    ],
    ids=["greedy", "temperature", "top p", "top k", "min p"],
)
def test_a_step_makes_nothing_of_the_logits_size(option: Options) -> None:
    batch = np.stack([logits(49152, row, 3.0) for row in range(4)])
    sample(batch, [0], [option], [0])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    sample(batch, [0, 1, 2, 3], [option] * 4, [0, 1, 2, 3])
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < batch[0].nbytes < batch.nbytes


def test_nan_logits_fail_their_request_only() -> None:
    rows = np.array([[0.0, 1.0], [np.nan, 1.0], [1.0, np.inf], [3.0, 1.0]], dtype=np.float32)
    options = [Options(), Options(), Options(temperature=1.0), Options(temperature=1.0, seed=4)]
    first, second, third, fourth = sample(rows, [0, 1, 2, 3], options, [0] * 4)
    assert (first, second, third) == (1, None, None)
    assert fourth in (0, 1)


def test_a_row_that_cannot_be_drawn_from_costs_nobody_else_a_token() -> None:
    rows = np.array([[0.0, 1.0], [3.0, 1.0]], dtype=np.float32)
    assert sample(rows, [0, 1], [Options(temperature=1.0, seed=-1), Options()], [0, 0]) == [None, 0]
