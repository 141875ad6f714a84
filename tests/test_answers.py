"""Encoders' answers in a bounded memory, by their content."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.answers import Answer, Answers, content_key
from flink_llm.engine.protocol import Entity


def answer(size: int = 4, entities: int = 0) -> Answer:
    found = tuple(Entity(f"{i}-LABEL", i / 7, 1000 + i, 2000 + i) for i in range(entities))
    return Answer(1000 + size, np.random.default_rng(size).random(size, dtype=np.float32), found)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 2000)), max_size=60))
def test_never_more_bytes_than_it_may(puts):
    answers = Answers(0.01)
    last: dict[bytes, Answer] = {}
    for name, size in puts:
        key = bytes([name])
        last[key] = answer(size)
        answers.put(key, last[key])
        assert answers.size <= 10_000
        if last[key].size <= 10_000:
            assert answers.get(key) is last[key]
    kept = [key for key in last if answers.get(key) is not None]
    assert sum(last[key].size for key in kept if answers.get(key) is last[key]) <= answers.size


def test_what_was_used_longest_ago_is_forgotten_first():
    answers = Answers(3.5 * answer().size / 1e6)
    for key in (b"a", b"b", b"c"):
        answers.put(key, answer())
    answers.get(b"a")
    answers.put(b"d", answer())
    assert [key for key in (b"a", b"b", b"c", b"d") if answers.get(key)] == [b"a", b"c", b"d"]


def test_none_are_kept_where_it_is_off():
    answers = Answers(0)
    answers.put(b"a", answer())
    assert answers.get(b"a") is None


def test_the_bytes_are_about_those_it_really_takes():
    for size, entities in ((384, 0), (4, 0), (1, 10)):
        answers = Answers(1)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for i in range(4000):
            answers.put(content_key("model", "embed", str(i)), answer(size, entities))
        taken = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert 0.5 < taken / answers.size < 1.2


def test_what_is_asked_is_part_of_the_key():
    asked = [("m", "embed", "ab"), ("n", "embed", "ab"), ("m", "classify", "ab")]
    asked += [("m", "rerank", "a", "b"), ("m", "rerank", "", "ab"), ("m", "embed", "\ud800"), ("m", "embed", "?")]
    assert len({content_key(*each) for each in asked}) == len(asked)
