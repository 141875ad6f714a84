import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm.engine.scheduler import AGEING_S, LANES, Entry, Scheduler
from flink_llm.errors import Overloaded

CHUNK = 8
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(-3, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.floats(0.01, 2)),
    ),
    max_size=60,
)


NUMBERS = itertools.count()


def prompt(length):
    """A prompt that shares no beginning with another."""
    return [next(NUMBERS), *range(length - 1)]


@settings(max_examples=200)
@given(EVENTS)
def test_no_slot_leaks_and_no_request_is_lost_or_doubled(events):
    scheduler: Scheduler[int] = Scheduler(slots=3, limit=10)
    now, entries, ended, begun = 0.0, [], set(), []
    for event in events:
        if event[0] == "add":
            try:
                entries.append(scheduler.add(len(entries), prompt(event[1]), priority=event[2], now=now))
            except Overloaded:
                assert scheduler.waiting == 10
        elif event[0] == "cancel" and event[1] < len(entries):
            scheduler.remove(entries[event[1]])
            ended.add(event[1])
        elif event[0] == "step":
            now += event[1]
            plan = scheduler.plan(CHUNK)
            taking_part = [*plan.decode, *([plan.prefill[0]] if plan.prefill else [])]
            slots = [entry.slot for entry in taking_part]
            assert len(set(slots)) == len(slots)
            assert all(slot is not None and 0 <= slot < 3 for slot in slots)
            assert not {entry.item for entry in taking_part} & ended
            if plan.prefill:
                entry, start, count = plan.prefill
                assert start == entry.filled and 0 < count <= CHUNK
                begun += [entry.item] if start == entry.shared else []
                scheduler.advance(entry, count)
            for entry in plan.decode[:1]:  # one generation ends
                scheduler.remove(entry)
                ended.add(entry.item)
        assert scheduler.waiting + scheduler.running == len(entries) - len(ended)
    assert len(begun) == len(set(begun))
    finish(scheduler, [entry for entry in entries if entry.item not in ended])
    for entry in entries:
        scheduler.remove(entry)
    assert (scheduler.waiting, scheduler.running) == (0, 0)
    assert scheduler._slots.free == 3


def finish(scheduler: Scheduler[int], left: list[Entry[int]]) -> None:
    """Every request that is left is prefilled and decodes once; `plan` may not forget one."""
    wanted = {entry.item for entry in left}
    for _ in range(sum(-(-len(entry.prompt) // CHUNK) + 1 for entry in left)):
        plan = scheduler.plan(CHUNK)
        if plan.prefill:
            scheduler.advance(plan.prefill[0], plan.prefill[2])
        for entry in plan.decode:
            wanted.remove(entry.item)
            scheduler.remove(entry)
    assert not wanted


ARRIVALS = st.lists(
    st.tuples(st.floats(0, 0.5), st.integers(0, 9), st.integers(1, 30), st.booleans()), min_size=1, max_size=120
)


@settings(max_examples=100)
@given(ARRIVALS, st.integers(0, 9), st.integers(1, 4), st.integers(1, 40))
def test_waiting_is_bounded_whoever_comes_and_goes(arrivals, priority, slots, size):
    """Only who came before, or within its ageing time after it, may be ahead of a request."""
    scheduler: Scheduler[str] = Scheduler(slots=slots, limit=1000)
    patient = scheduler.add("patient", prompt(size), priority=priority, now=0.0)
    now, steps, ahead = 0.0, 0, -(-size // CHUNK) + 1
    for gap, other, length, leaves in arrivals:
        now += gap
        entry = scheduler.add("other", prompt(length), priority=other, now=now)
        if now + other * AGEING_S < priority * AGEING_S:
            ahead += -(-length // CHUNK) + 1
        if leaves:
            scheduler.remove(entry)
        if not patient.gone:
            steps += 1
            step(scheduler)
    while not patient.gone:
        steps += 1
        step(scheduler)
        assert steps <= ahead + len(arrivals)
    assert steps <= ahead


def step(scheduler: Scheduler[str]) -> None:
    """A step in which everybody who decodes has come to the end."""
    plan = scheduler.plan(CHUNK)
    if plan.prefill:
        scheduler.advance(plan.prefill[0], plan.prefill[2])
    for entry in plan.decode:
        scheduler.remove(entry)


def test_no_lane_starves_in_the_queue():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=1000)
    patient = scheduler.add("patient", prompt(1), priority=9, now=0.0)
    now = 0.0
    while not patient.gone and now < 60:
        scheduler.add("urgent", prompt(1), priority=0, now=now)
        step(scheduler)
        now += 0.5
    assert now <= LANES * AGEING_S * 2


def test_no_lane_starves_in_its_slot():
    scheduler: Scheduler[str] = Scheduler(slots=4, limit=10_000)
    patient = scheduler.add("patient", prompt(2 * CHUNK), priority=9, now=0.0)
    scheduler.plan(CHUNK)
    assert patient.slot is not None
    now = 0.0
    while not patient.gone and now < 60:
        now += 0.1
        scheduler.add("urgent", prompt(CHUNK), priority=0, now=now)
        step(scheduler)
    assert now <= LANES * AGEING_S


def test_urgent_requests_go_first():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=10)
    for name, priority in [("later", 5), ("first", 0)]:
        scheduler.add(name, prompt(4), priority=priority, now=0.0)
    assert scheduler.plan(CHUNK).prefill[0].item == "first"


def test_no_priority_is_before_the_first_or_behind_the_last():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=10)
    entries = [scheduler.add("x", prompt(4), priority=priority, now=0.0) for priority in (-(10**9), 0, 9, 10**9)]
    assert [entry.rank[0] for entry in entries] == [0, 0, 9 * AGEING_S, 9 * AGEING_S]


def test_who_has_left_the_queue_takes_no_memory():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=10)
    scheduler.add("running", prompt(4), priority=0, now=0.0)
    scheduler.plan(CHUNK)
    for number in range(1000):
        scheduler.remove(scheduler.add("gone", prompt(4), priority=0, now=float(number)))
    assert len(scheduler._queue) <= LANES + 1


def test_a_full_queue_refuses_with_a_time_to_come_back():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=1)
    scheduler.add("a", prompt(1), priority=5, now=0.0)
    with pytest.raises(Overloaded) as caught:
        scheduler.add("b", prompt(1), priority=5, now=0.0)
    assert caught.value.retry_after > 0


def test_a_shared_beginning_is_read_once():
    scheduler: Scheduler[str] = Scheduler(slots=2, limit=10)
    system = list(range(100))
    scheduler.add("first", [*system, 7], priority=5, now=0.0)
    entry, start, count = scheduler.plan(200).prefill
    assert (start, count) == (0, 101)
    scheduler.advance(entry, count)
    second = scheduler.add("second", [*system, 8, 9], priority=5, now=0.0)
    plan = scheduler.plan(200)
    assert plan.sharing == [second]
    assert (second.source, second.shared) == (entry.slot, 100)
    assert plan.prefill == (second, 100, 2)
