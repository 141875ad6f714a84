"""Shards are spread evenly, by Flink's own hash of their keys."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from pyflink.java_gateway import get_gateway

from flink_llm.udfs.keying import shard_keys


def spread(keys, max_parallelism, parallelism):
    """How many shards each subtask has."""
    jvm = get_gateway().jvm
    row = jvm.org.apache.flink.types.Row(1)
    found = Counter(dict.fromkeys(range(parallelism), 0))
    for key in keys:
        row.setField(0, key)
        assignment = jvm.org.apache.flink.runtime.state.KeyGroupRangeAssignment
        found[assignment.assignKeyToParallelOperator(row, max_parallelism, parallelism)] += 1
    return found


def test_the_defaults_at_every_parallelism():
    keys = shard_keys(16, 128)
    for parallelism in range(1, 129):
        found = spread(keys, 128, parallelism)
        assert max(found.values()) - min(found.values()) <= 1, parallelism
        assert len(found) == parallelism


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.data())
def test_any_shards_at_any_parallelism(shards, factor, data):
    keys = shard_keys(shards, shards * factor)
    assert len(set(keys)) == shards
    for parallelism in data.draw(st.lists(st.integers(1, shards * factor), min_size=3, max_size=6)):
        found = spread(keys, shards * factor, parallelism)
        assert max(found.values()) - min(found.values()) <= 1
