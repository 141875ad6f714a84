"""What a shard keeps: names tell all that a restore asks for, and only what is known is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.errors import StateError
from flink_llm.kept import Kept, Remembered
from flink_llm.testing import MemoryMap

U64 = st.integers(0, 2**64 - 1)
REMEMBERED = st.builds(
    Remembered,
    digest=st.binary(min_size=16, max_size=16),
    payload_hash=st.binary(min_size=32, max_size=32),
    expiry=U64,
)


@given(st.sets(U64), st.lists(REMEMBERED, unique_by=lambda one: one.digest), st.sets(st.text()))
def test_names_give_back_what_was_put(sequences, remembered, keys):
    kept = Kept(MemoryMap())
    for sequence in sequences:
        kept.add_record(sequence, 7, b"arrival %d" % sequence)
    for one in remembered:
        kept.add_answer(one, one.digest, "topic")
    for key in keys:
        kept.set_state(key, key.encode())
    found = kept.names()
    assert found[0] == sorted(sequences)
    assert found[1] == sorted(remembered, key=lambda one: one.expiry)
    assert set(found[2]) == keys
    assert found[3] is False
    assert all(kept.record(sequence) == (7, b"arrival %d" % sequence) for sequence in sequences)
    assert all(kept.answer(one) == (one.digest, "topic") for one in remembered)
    assert all(kept.state(key) == key.encode() for key in keys)


@given(st.sets(U64), st.lists(REMEMBERED, unique_by=lambda one: one.digest), st.sets(st.text()))
def test_what_is_removed_leaves_nothing(sequences, remembered, keys):
    kept = Kept(MemoryMap())
    for sequence in sequences:
        kept.add_record(sequence, 0, b"")
        kept.remove_record(sequence)
    for one in remembered:
        kept.add_answer(one, b"", None)
        kept.remove_answer(one)
    for key in keys:
        kept.set_state(key, b"x")
        kept.remove_state(key)
    assert list(kept.entries.keys()) == []


def test_a_key_of_half_a_character_is_kept():
    kept = Kept(MemoryMap())
    kept.set_state("\ud800", b"x")
    assert kept.names()[2] == ["\ud800"]


def test_meta_is_known_once_written():
    kept = Kept(MemoryMap())
    kept.set_meta(16, 128)
    assert kept.names()[3] is True
    assert kept.meta() == [16, 128]


def test_an_entry_of_another_release_is_refused():
    kept = Kept(MemoryMap())
    kept.entries.put(b"z1", b"")
    with pytest.raises(StateError, match="does not know"):
        kept.names()


def test_a_name_without_its_entry_is_an_error_that_names_it():
    with pytest.raises(StateError, match="does not hold"):
        Kept(MemoryMap()).record(3)
