import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm.engine.scheduler import Scheduler
from flink_llm.errors import Overloaded

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(0, 9), st.none() | st.floats(0.1, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.floats(0.01, 2)),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(EVENTS)
def test_no_slot_leaks_and_no_request_is_lost_or_doubled(events):
    scheduler: Scheduler[int] = Scheduler(slots=3, limit=10, chunk=8)
    now, entries, ended = 0.0, [], set()
    for event in events:
        if event[0] == "add":
            try:
                entries.append(scheduler.add(len(entries), event[1], priority=event[2], now=now, deadline=event[3]))
            except Overloaded:
                assert scheduler.waiting == 10
        elif event[0] == "cancel" and event[1] < len(entries):
            scheduler.remove(entries[event[1]])
            ended.add(event[1])
        elif event[0] == "step":
            now += event[1]
            plan = scheduler.plan(now)
            ended |= {entry.item for entry in plan.expired}
            taking_part = [*plan.decode, *([plan.prefill[0]] if plan.prefill else [])]
            slots = [entry.slot for entry in taking_part]
            assert len(set(slots)) == len(slots)
            assert all(slot is not None and 0 <= slot < 3 for slot in slots)
            assert not {entry.item for entry in taking_part} & ended
            if plan.prefill:
                entry, start, count = plan.prefill
                assert start == entry.filled and 0 < count <= 8
                scheduler.advance(entry, count)
            for entry in plan.decode[:1]:  # one generation ends
                scheduler.remove(entry)
                ended.add(entry.item)
        assert scheduler.waiting + scheduler.running == len(entries) - len(ended)
    for entry in entries:
        scheduler.remove(entry)
    assert (scheduler.waiting, scheduler.running) == (0, 0)
    assert sorted(scheduler._free) == [0, 1, 2]


def test_no_lane_starves():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=1000, chunk=8)
    scheduler.add("patient", 1, priority=9, now=0.0)
    now, served = 0.0, []
    while "patient" not in served and now < 60:
        scheduler.add("urgent", 1, priority=0, now=now)
        plan = scheduler.plan(now)
        if plan.prefill:
            scheduler.advance(plan.prefill[0], 1)
        for entry in plan.decode:
            served.append(entry.item)
            scheduler.remove(entry)
        now += 0.5
    assert "patient" in served


def test_urgent_requests_go_first():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=10, chunk=8)
    for name, priority in [("later", 5), ("first", 0)]:
        scheduler.add(name, 4, priority=priority, now=0.0)
    assert scheduler.plan(0.1).prefill[0].item == "first"


def test_a_full_queue_refuses_with_a_time_to_come_back():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=1, chunk=8)
    scheduler.add("a", 1, priority=5, now=0.0)
    with pytest.raises(Overloaded) as caught:
        scheduler.add("b", 1, priority=5, now=0.0)
    assert caught.value.retry_after > 0
