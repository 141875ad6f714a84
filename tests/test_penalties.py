"""Penalties and log-probabilities: what their definitions say, over the whole vocabulary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.logprobs import Logprobs
from flink_llm.engine.penalties import check_tokens, penalties
from flink_llm.engine.protocol import Options
from flink_llm.errors import RecordError

SIZE = 40
TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=30)
OPTIONS = st.builds(
    Options,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -2.0]),
    logit_bias=st.lists(
        st.tuples(st.integers(0, SIZE - 1), st.sampled_from([-100.0, 0.5, 7.0])),
        max_size=5,
        unique_by=lambda one: one[0],
    ),
)


def row(seed, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal(SIZE) * 3).astype(dtype)


def defined(logits, option, prompt, reply):
    """Keskar et al. 2019 and OpenAI's formula, dense."""
    found = logits.astype(np.float64)
    counts = np.bincount(reply, minlength=SIZE)
    seen = (counts > 0) | (np.bincount(prompt, minlength=SIZE) > 0)
    penalty = option.repetition_penalty
    found = np.where(seen, np.where(found > 0, found / penalty, found * penalty), found)
    found -= option.frequency_penalty * counts + option.presence_penalty * (counts > 0)
    for token, bias in option.logit_bias:
        found[token] += bias
    return found


@given(OPTIONS, TOKENS, TOKENS, st.integers(0, 2**32))
def test_logits_are_changed_as_the_options_define(option, prompt, reply, seed):
    of = penalties(option, prompt)
    for position in range(len(reply) + 1):
        logits = row(seed + position)
        wanted = defined(logits, option, np.array(prompt, int), np.array(reply[:position], int))
        before = logits.copy()
        if of is not None:
            of.apply(logits)
            for token in range(SIZE):
                kept = of.before(token)
                assert kept == pytest.approx(before[token]) if kept is not None else logits[token] == before[token]
            if position < len(reply):
                of.add(reply[position])
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)


def test_options_by_default_ask_for_nothing():
    assert penalties(Options(), [1, 2, 3]) is None


def test_a_bias_of_a_token_that_the_model_does_not_have_is_refused():
    check_tokens([(39, 1.0)], 40)
    with pytest.raises(RecordError, match="logit_bias names token 40, the model has 0 to 39"):
        check_tokens([(3, 1.0), (40, 1.0)], 40)


@given(st.integers(0, 2**32), st.integers(0, 20), st.integers(0, SIZE - 1))
def test_log_probabilities_are_those_of_the_model(seed, top, token):
    logits = row(seed)
    wanted = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    of = Logprobs(top, str)
    of.look(logits)
    before = float(logits[token])
    logits[token] = -np.inf  # a penalty's
    of.take(token, before)
    (found,) = of.found
    assert (found.id, found.text) == (token, f"[{token}]")
    assert found.logprob == pytest.approx(wanted[token], abs=1e-4)
    assert [one.logprob for one in found.top] == pytest.approx(np.sort(wanted)[::-1][:top].tolist(), abs=1e-4)
    assert len({one.id for one in found.top}) == top
