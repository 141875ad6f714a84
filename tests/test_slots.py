"""Slots: nobody shares one, what is said to be shared is, and busy ones stay together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.slots import SHARED_LEAST, Placement, Slots

COUNT = 5
MOST = 50
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=60)


@given(
    st.booleans(),
    st.lists(
        st.tuples(PROMPTS, st.integers(0, COUNT - 1), st.booleans(), st.sampled_from(["", "a", "b"])), max_size=40
    ),
)
def test_whatever_comes_no_slot_is_shared_and_every_beginning_is_right(copies, steps):
    slots = Slots(COUNT, copies=copies)
    cache = {number: [] for number in range(COUNT)}  # what the decoder would hold, and by which key
    keys = {}
    busy = set()
    for prompt, leaving, keep, key in steps:
        if leaving in busy:
            slots.release(leaving, keep=keep)
            busy.discard(leaving)
        if slots.free == 0:
            continue
        place = slots.take(prompt, key)
        assert place.slot not in busy
        busy.add(place.slot)
        assert place.shared in range(len(prompt))
        assert place.shared == 0 or place.shared >= SHARED_LEAST
        assert copies or place.source == place.slot
        assert cache[place.source][: place.shared] == prompt[: place.shared]
        assert place.shared == 0 or keys[place.source] == key
        keys[place.slot] = key
        cache[place.slot] = cache[place.source][: place.shared] + prompt[place.shared :]
        slots.add(place.slot, prompt[place.shared :])
        assert list(slots.held(place.slot)) == prompt
        assert slots.free == COUNT - len(busy)
        used = {number for number in busy if len(cache[number]) % 2}  # the others are still being read, say
        gap = slots.gap(used, MOST)
        assert copies or gap is None
        if gap is not None:
            end, other = gap
            assert end in used and other not in used
            assert spread(used ^ {end, other}, used) > 0, "they are no closer together than before"
            assert max(len(slots.held(end)), len(slots.held(other))) <= MOST
            slots.swap(end, other)
            cache[end], cache[other] = cache[other], cache[end]
            keys[end], keys[other] = keys.get(other, ""), keys[end]
            if other not in busy:
                busy ^= {end, other}


def spread(after, before):
    """How many more of them lie in as many neighbouring slots."""
    count = len(before)
    both = [max(len(used & set(range(first, first + count))) for first in range(COUNT)) for used in (after, before)]
    return both[0] - both[1]


def session(*turns):
    return [token for turn in turns for token in range(turn, turn + 30)]


def test_the_next_turn_of_a_session_takes_its_own_slot():
    slots = Slots(4)
    first = slots.take(session(0))
    slots.add(first.slot, session(0))
    slots.release(first.slot)
    other = slots.take(session(500))
    assert other.slot != first.slot  # the one longest unused
    assert slots.take(session(0, 100)) == Placement(first.slot, 30, first.slot)


def test_a_shared_beginning_is_copied_from_a_busy_slot():
    slots = Slots(4)
    first = slots.take(session(0, 100))
    slots.add(first.slot, session(0, 100))
    second = slots.take(session(0, 200))
    assert second.slot != first.slot
    assert (second.shared, second.source) == (30, first.slot)


def test_busy_slots_stay_together():
    slots = Slots(16)
    taken = [slots.take([number]).slot for number in range(4)]
    assert sorted(taken) == [0, 1, 2, 3]
    slots.release(1)
    assert slots.take([9]).slot == 1


def test_a_prompt_that_is_held_whole_leaves_its_last_token_to_be_read():
    slots = Slots(2)
    place = slots.take(session(0))
    slots.add(place.slot, session(0))
    slots.release(place.slot)
    assert slots.take(session(0)) == Placement(place.slot, 29, place.slot)


def test_what_is_not_to_be_kept_is_gone():
    slots = Slots(2)
    place = slots.take(session(0))
    slots.add(place.slot, session(0))
    slots.release(place.slot, keep=False)
    assert slots.take(session(0)).shared == 0


def test_a_beginning_is_shared_under_one_key_alone():
    slots = Slots(2)
    first = slots.take(session(0), "one")
    slots.add(first.slot, session(0))
    slots.release(first.slot)
    assert slots.take(session(0), "two").shared == 0
    assert slots.take(session(0), "one") == Placement(first.slot, 29, first.slot)


def test_full_is_full():
    slots = Slots(1)
    slots.take([1])
    with pytest.raises(IndexError):
        slots.take([2])
