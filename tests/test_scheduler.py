import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm.engine.pace import RETRY_S, RETRY_UNKNOWN_S, SMOOTH
from flink_llm.engine.scheduler import (
    CHUNK_LEAST,
    DELAY_LEAST,
    DELAY_MOST,
    HOLD_S,
    HOLD_SHARE,
    PROMPTS_MOST,
    STEPS_WAITED,
    Entry,
    Scheduler,
)
from flink_llm.engine.tempo import Tempo
from flink_llm.errors import Overloaded
from flink_llm.priorities import AGEING_S, LANES

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
                assert scheduler.waiting - (3 - scheduler.running) == 10
        elif event[0] == "cancel" and event[1] < len(entries):
            scheduler.remove(entries[event[1]])
            ended.add(event[1])
        elif event[0] == "step":
            now += event[1]
            plan = scheduler.plan(CHUNK)
            taking_part = [*plan.decode, *([plan.prefill[0]] if plan.prefill else []), *plan.beside]
            slots = [entry.slot for entry in taking_part]
            assert len(set(slots)) == len(slots)
            assert all(slot is not None and 0 <= slot < 3 for slot in slots)
            assert not {entry.item for entry in taking_part} & ended
            if plan.prefill:
                entry, start, count = plan.prefill
                assert start == entry.filled and 0 < count <= CHUNK
                begun += [entry.item] if start == entry.shared else []
                if plan.beside:
                    check_run([entry, *plan.beside])
                scheduler.advance(entry, count)
            for other in plan.beside:
                begun.append(other.item)
                scheduler.advance(other, other.left)
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


def check_run(entries: list[Entry[int]]) -> None:
    """Whole prompts of about one length in neighbouring slots, padded no more than a chunk."""
    lengths, slots = [entry.left for entry in entries], sorted(entry.slot for entry in entries)
    assert not any(entry.filled for entry in entries)
    assert slots == list(range(slots[0], slots[0] + len(slots)))
    assert max(lengths) * len(lengths) <= CHUNK and max(lengths) - min(lengths) <= CHUNK_LEAST


def finish(scheduler: Scheduler[int], left: list[Entry[int]]) -> None:
    """Every request that is left is prefilled and decodes once; `plan` may not forget one."""
    wanted = {entry.item for entry in left}
    for _ in range(sum(-(-len(entry.prompt) // CHUNK) + 1 for entry in left)):
        plan = scheduler.plan(CHUNK)
        if plan.prefill:
            scheduler.advance(plan.prefill[0], plan.prefill[2])
        for entry in plan.beside:
            scheduler.advance(entry, entry.left)
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
    """Only who came before, or within its ageing time after it, may be ahead of a request; but for one hold."""
    scheduler: Scheduler[str] = Scheduler(slots=slots, limit=1000)
    patient = scheduler.add("patient", prompt(size), priority=priority, now=0.0)
    now, steps, ahead = 0.0, 0, -(-size // CHUNK) + 2
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
    scheduler.waited(HOLD_S)
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
    assert (len(scheduler._queue), scheduler.waiting) == (0, 0)


def test_a_full_queue_refuses_with_a_time_to_come_back():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=1)
    scheduler.add("a", prompt(1), priority=5, now=0.0)
    scheduler.add("b", prompt(1), priority=5, now=0.0)
    with pytest.raises(Overloaded, match="the queue is full") as caught:
        scheduler.add("c", prompt(1), priority=5, now=0.0)
    assert (caught.value.retry_after, caught.value.reason) == (RETRY_UNKNOWN_S, "full")


def test_nobody_is_refused_for_a_queue_of_those_behind():
    scheduler: Scheduler[str] = Scheduler(slots=1, limit=2)
    for each in range(3):
        scheduler.add(f"later {each}", prompt(1), priority=5, now=0.0)
    for each in range(3):
        scheduler.add(f"urgent {each}", prompt(1), priority=0, now=0.0)
    for priority in (0, 5):
        with pytest.raises(Overloaded, match="the queue is full"):
            scheduler.add("one more", prompt(1), priority=priority, now=0.0)
    assert [entry.item for entry in scheduler._queue[:3]] == ["urgent 0", "urgent 1", "urgent 2"]


def test_a_short_queue_refuses_nobody_whom_a_free_slot_awaits():
    scheduler: Scheduler[int] = Scheduler(slots=4, limit=1)
    for number in range(5):
        scheduler.add(number, prompt(4), priority=5, now=0.0)
    with pytest.raises(Overloaded):
        scheduler.add(5, prompt(4), priority=5, now=0.0)


class Timed:
    """A scheduler on a clock that is moved by hand; every request is read at once and then held."""

    def __init__(self, slots: int, limit: int = 100) -> None:
        self.now = 0.0
        self.scheduler: Scheduler[int] = Scheduler(slots, limit, clock=lambda: self.now)
        self.entries: list[Entry[int]] = []

    def add(self, left: float | None = None, priority: int = 5) -> Entry[int]:
        entry = self.scheduler.add(len(self.entries), prompt(1), priority=priority, now=self.now, left=left)
        self.entries.append(entry)
        return entry

    def after(self, seconds: float) -> None:
        """Time passes; who waits is given what is free."""
        self.now += seconds
        self.scheduler.plan(CHUNK)

    def end(self, entry: Entry[int]) -> None:
        self.scheduler.remove(entry)

    @property
    def held(self) -> list[Entry[int]]:
        return [entry for entry in self.entries if entry.slot is not None and not entry.gone]


def known(slots: int, service_s: float) -> Timed:
    """All slots busy, after one request of `service_s` seconds."""
    timed = Timed(slots)
    first = timed.add()
    timed.after(0)
    timed.after(service_s)
    timed.end(first)
    for _ in range(slots):
        timed.add()
    timed.after(0)
    return timed


def test_a_wait_that_is_longer_than_what_is_left_is_refused():
    timed = known(slots=2, service_s=4.0)
    assert timed.add(left=2.0).slot is None  # one turn of two slots
    with pytest.raises(Overloaded, match=r"the wait is about 4.0 s, the deadline is in 3.9") as caught:
        timed.add(left=3.9)
    assert (caught.value.retry_after, caught.value.reason) == (4.0, "deadline")
    assert timed.add(left=4.0).slot is None
    assert timed.add(left=None).slot is None


def test_who_is_urgent_waits_for_those_before_it_only():
    timed = known(slots=1, service_s=1.0)
    for _ in range(20):
        timed.add(priority=9)
    assert timed.add(left=1.0, priority=0).slot is None
    with pytest.raises(Overloaded):
        timed.add(left=1.0, priority=9)


def test_nobody_is_refused_for_a_deadline_before_anything_is_known():
    timed = Timed(slots=1)
    for _ in range(10):
        timed.add(left=0.0)
    assert timed.scheduler.waiting == 10


@pytest.mark.parametrize(("service_s", "retry_after"), [(6.0, 3.0), (1e-6, RETRY_S[0]), (1e6, RETRY_S[1])])
def test_a_full_queue_says_when_a_place_is_free(service_s, retry_after):
    timed = known(slots=2, service_s=service_s)
    for _ in range(100):
        timed.add()
    with pytest.raises(Overloaded) as caught:
        timed.add()
    assert caught.value.retry_after == pytest.approx(retry_after)


LOADS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.none() | st.floats(-1, 20), st.integers(0, 9)),
        st.tuples(st.just("end"), st.integers(0, 5), st.floats(0, 10)),
        st.tuples(st.just("cancel"), st.integers(0, 60), st.just(0)),
    ),
    max_size=80,
)


@settings(max_examples=200)
@given(LOADS, st.integers(1, 4), st.integers(1, 6))
def test_only_who_would_wait_too_long_or_finds_no_room_is_refused(loads, slots, limit):
    timed = Timed(slots, limit)
    scheduler, service_s = timed.scheduler, None

    def end(entry):
        nonlocal service_s
        if entry in timed.held:
            took = timed.now - entry.began
            service_s = took if service_s is None else service_s + SMOOTH * (took - service_s)
        timed.end(entry)

    for what, value, extra in loads:
        if what == "add":
            waiting = [entry for entry in timed.entries if entry.slot is None and not entry.gone]
            free = slots - len(timed.held)
            turns = 1 - free + sum(entry.rank <= (timed.now + extra * AGEING_S, math.inf) for entry in waiting)
            wait = 0.0 if turns <= 0 else None if service_s is None else turns * service_s / slots
            late = turns > 0 and None not in (value, wait) and wait > value
            full = turns > limit
            try:
                timed.add(value, extra)
            except Overloaded as error:
                assert late or full
                assert error.reason == ("deadline" if late else "full")
                assert RETRY_S[0] <= error.retry_after <= RETRY_S[1]
                assert free <= len(waiting)  # whoever is ahead has the slots that are free
            else:
                assert not late and not full
        elif what == "cancel" and value < len(timed.entries):
            end(timed.entries[value])
        elif what == "end":
            timed.after(extra)
            if value < len(timed.held):
                end(timed.held[value])
        assert scheduler.waiting + scheduler.running == sum(not entry.gone for entry in timed.entries)
        assert scheduler.running == len({entry.slot for entry in timed.held}) == slots - scheduler._slots.free
    while timed.held or scheduler.waiting:  # nobody is lost
        timed.after(1)
        for entry in timed.held:
            timed.end(entry)
    assert all(entry.gone for entry in timed.entries)
    assert scheduler._slots.free == slots


def test_a_shared_beginning_is_read_once():
    scheduler: Scheduler[str] = Scheduler(slots=2, limit=10)
    system = list(range(100))
    scheduler.add("first", [*system, 7], priority=5, now=0.0)
    entry, start, count = scheduler.plan(200).prefill
    assert (start, count) == (0, 101)
    scheduler.advance(entry, count)
    second = scheduler.add("second", [*system, 8, 9], priority=5, now=0.0)
    plan = scheduler.plan(200)
    assert plan.copies == [(entry.slot, second.slot, 100)]
    assert second.shared == 100
    assert plan.prefill == (second, 100, 2)


def test_a_beginning_is_not_shared_across_keys():
    scheduler: Scheduler[str] = Scheduler(slots=3, limit=10)
    system = list(range(100))
    copies = []
    for key in ("one", "two", "one"):
        added = scheduler.add(key, [*system, 7], priority=5, now=0.0, key=key)
        plan = scheduler.plan(200)
        scheduler.advance(plan.prefill[0], plan.prefill[2])
        copies.append(plan.copies)
    assert copies == [[], [], [(0, 2, 100)]]
    assert added.shared == 100


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_burst_is_read_before_its_first_replies_go_on():
    clock = Clock()
    scheduler: Scheduler[int] = Scheduler(slots=8, limit=10, clock=clock)
    for number in range(8):
        scheduler.add(number, prompt(64), priority=5, now=0.0, tokens=1000)
    sizes, decoding = [], []
    tempo = Tempo(step_s=0.01, token_s=STEPS_WAITED * 0.01 / CHUNK_LEAST)
    while (plan := scheduler.plan(100, tempo)).prefill:
        scheduler.advance(plan.prefill[0], plan.prefill[2])
        sizes.append(plan.prefill[2])
        decoding.append(len(plan.decode))
        clock.now += 0.01
    assert sizes == [64] * 7 + [CHUNK_LEAST] * 4, "they are read in one go, until few enough of them are left"
    assert decoding == [0] * 7 + [7] * 4


def test_one_prompt_does_not_hold_many_replies():
    scheduler: Scheduler[int] = Scheduler(slots=8, limit=10, clock=Clock())
    for number in range(HOLD_SHARE + 1):
        scheduler.add(number, prompt(1), priority=5, now=0.0)
        plan = scheduler.plan()
        scheduler.advance(plan.prefill[0], 1)
    scheduler.add(99, prompt(50), priority=5, now=0.0)
    plan = scheduler.plan(100, Tempo(step_s=0.01, token_s=0.0005))
    assert (len(plan.decode), plan.prefill[2]) == (HOLD_SHARE + 1, int(STEPS_WAITED * 0.01 / 0.0005))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300), st.floats(0.001, 0.3)), min_size=1, max_size=60))
def test_no_reply_stands_still_for_long_in_all(steps):
    clock = Clock()
    scheduler: Scheduler[int] = Scheduler(slots=4, limit=1000, clock=clock)
    still: dict[Entry[int], float] = {}
    for arrivals, length, seconds in steps:
        for _ in range(arrivals):
            scheduler.add(len(still), prompt(length), priority=5, now=clock.now)
        plan = scheduler.plan(64)
        waits = [entry for entry in scheduler._running if not entry.left and entry not in plan.decode]
        for entry in waits:
            assert still.get(entry, 0.0) < HOLD_S + 1e-6, "it has stood still for long enough"
            still[entry] = still.get(entry, 0.0) + seconds
        assert not (waits and plan.decode), "some go on while others are held"
        assert not waits or plan.prefill, "nobody is held for nothing"
        if plan.prefill:
            scheduler.advance(plan.prefill[0], plan.prefill[2])
            scheduler.waited(seconds)
        clock.now += seconds
        for entry in plan.decode[:1]:
            scheduler.remove(entry)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 200), st.integers(1, 90)), min_size=1, max_size=40),
    st.sampled_from([0.0001, 0.001, 0.004]),
    st.sampled_from([0.0, 0.002]),
    st.booleans(),
)
def test_prompts_delay_a_reply_by_no_more_than_its_share(steps, token_s, run_s, mixes):
    tempo = Tempo(token_s=token_s, run_s=run_s, step_s=0.01)
    scheduler: Scheduler[int] = Scheduler(slots=4, limit=1000, mixes=mixes, clock=Clock())
    seen: dict[int, float] = {}
    arrivals = iter(steps)
    count, left = 0, sum(number for number, _, _ in steps)
    for _ in range(100_000):
        number, length, tokens = next(arrivals, (0, 1, 1))
        for _ in range(number):
            scheduler.add(count, prompt(length), priority=5, now=0.0, tokens=tokens)
            count += 1
        plan = scheduler.plan(64, tempo)
        if plan.prefill:
            seconds = (tempo.mixed if plan.mixed else tempo).reading(plan.tokens)
            assert plan.mixed == (mixes and bool(plan.decode))
            assert not (plan.mixed and plan.beside), "a mixed run reads one prompt"
            waits = [entry for entry in scheduler._running if not entry.left]
            for entry in waits:
                seen[entry.item] = seen.get(entry.item, 0.0) + seconds
            scheduler.waited(seconds)
            for entry, read in [plan.prefill[::2], *((one, one.left) for one in plan.beside)]:
                scheduler.advance(entry, read)
        for entry in plan.decode:
            scheduler.decoded(entry, 1)
            if entry.said >= entry.limit:
                assert seen.get(entry.item, 0.0) <= DELAY_MOST * tempo.step_s * entry.limit + 1e-9
                scheduler.remove(entry)
                left -= 1
        if not left:
            return
    raise AssertionError("somebody waits for ever")


def beside_a_reply(lengths: list[int], slots: int = 8, *, mixes: bool = False) -> Scheduler[int]:
    """Replies decode, one more than a burst holds, and prompts of these lengths have come."""
    scheduler: Scheduler[int] = Scheduler(slots=slots, limit=100, mixes=mixes, clock=Clock())
    replies = HOLD_SHARE * len(lengths) + 1
    for number in range(replies):
        scheduler.add(number, prompt(1), priority=5, now=0.0, tokens=1000)
        scheduler.advance(scheduler.plan().prefill[0], 1)
    for number, length in enumerate(lengths):
        scheduler.add(100 + number, prompt(length), priority=5, now=float(number))
    return scheduler


def test_chunks_are_longer_where_more_prompts_are_to_be_read():
    tempo = Tempo(step_s=0.1, run_s=0.05, token_s=0.001)
    one, two, many = (
        beside_a_reply([400] * count, slots=40).plan(512, tempo).prefill[2] for count in (1, 2, PROMPTS_MOST + 2)
    )
    assert (one, two, many) == tuple(int((STEPS_WAITED * count * 0.1 - 0.05) / 0.001) for count in (1, 2, PROMPTS_MOST))


@pytest.mark.parametrize(("length", "read"), [(75, 75), (100, 100), (101, 75)])
def test_no_run_is_left_for_a_rest_that_takes_less_than_half_a_run_by_itself(length, read):
    tempo = Tempo(step_s=0.1, run_s=0.05, token_s=0.001)
    assert beside_a_reply([length]).plan(512, tempo).prefill[2] == read


def test_in_the_run_of_a_step_only_a_prompts_tokens_take_time():
    tempo = Tempo(step_s=0.1, run_s=0.05, token_s=0.001)
    plan = beside_a_reply([400], mixes=True).plan(512, tempo)
    assert (plan.mixed, plan.prefill[2]) == (True, int(STEPS_WAITED * 0.1 / 0.001))
    plan = beside_a_reply([20, 20], slots=40, mixes=True).plan(512, tempo)
    assert (plan.mixed, plan.prefill[2], plan.beside) == (True, 20, [])
    short = Tempo(step_s=0.01, run_s=0.05, token_s=0.001)
    assert beside_a_reply([100], mixes=True).plan(512, short).prefill[2] == CHUNK_LEAST, (
        "a run of its own takes too long"
    )


@pytest.mark.parametrize(("lengths", "together"), [([40, 41, 40], True), ([40, 90, 140], False)])
def test_where_prompts_can_be_read_in_the_runs_of_steps_only_several_together_hold_replies(lengths, together):
    tempo = Tempo(step_s=0.1, run_s=0.001, token_s=0.0001)
    scheduler: Scheduler[int] = Scheduler(slots=8, limit=10, mixes=True, clock=Clock())
    reply = scheduler.add(0, prompt(1), priority=5, now=0.0, tokens=1000)
    scheduler.advance(scheduler.plan(10).prefill[0], 1)
    for number, length in enumerate(lengths, 1):
        scheduler.add(number, prompt(length), priority=5, now=1.0)
    plan = scheduler.plan(512, tempo)
    assert (len(plan.beside), plan.mixed) == ((2, False) if together else (0, True))
    assert plan.decode == ([] if together else [reply])


def test_replies_wait_longer_for_prompts_while_requests_wait_for_a_slot():
    tempo = Tempo(step_s=0.01, token_s=0.001)

    def delayed(queued: int) -> float:
        """Of a reply's own time, for how long prompts are read beside it before it goes on alone."""
        scheduler = beside_a_reply([100_000] * 5, slots=HOLD_SHARE * 5 + 6)
        for number in range(queued):
            scheduler.add(1000 + number, prompt(10), priority=0, now=100.0)
        read = 0.0
        while (plan := scheduler.plan(20, tempo)).prefill:
            scheduler.advance(plan.prefill[0], plan.prefill[2])
            scheduler.waited(tempo.reading(plan.tokens))
            read += tempo.reading(plan.tokens)
        return read / (tempo.step_s * 64)

    few = DELAY_LEAST + (DELAY_MOST - DELAY_LEAST) * 4 / (HOLD_SHARE * 5 + 6)
    assert delayed(0) == pytest.approx(few, abs=0.035), "a chunk takes a thirtieth"
    assert delayed(100) == pytest.approx(DELAY_MOST, abs=0.035)


def share_of_time_for_a_long_prompt(others: int, seconds: float) -> float:
    """Of 60 steps beside four replies and so many other prompts, in how many a long prompt is read."""
    clock = Clock()
    scheduler: Scheduler[int] = Scheduler(slots=40, limit=100, clock=clock)
    tempo = Tempo(token_s=0.001, step_s=0.01)
    for number in range(HOLD_SHARE * (others + 1) + 1):
        scheduler.advance(scheduler.add(number, prompt(1), priority=0, now=0.0, tokens=500), 0)
        plan = scheduler.plan(10)
        scheduler.advance(plan.prefill[0], 1)
    for number in range(others + 1):
        scheduler.add(100 + number, prompt(100_000), priority=5, now=0.0)
    scheduler.plan(1, tempo)
    clock.now += seconds
    read = 0
    for _ in range(60):
        plan = scheduler.plan(10, tempo)
        if plan.prefill:
            read += 1
            scheduler.advance(plan.prefill[0], plan.prefill[2])
            scheduler.waited(plan.tokens * tempo.token_s)
        for entry in plan.decode:
            scheduler.decoded(entry, 1)
    return read / 60


def test_prompts_are_read_the_more_the_more_there_are_and_the_longer_they_are_being_read():
    alone, later, several = (share_of_time_for_a_long_prompt(*given) for given in ((0, 0.0), (0, 4.0), (8, 0.0)))
    assert alone < later and alone < several
    assert share_of_time_for_a_long_prompt(0, 100.0) == share_of_time_for_a_long_prompt(4, 100.0), "up to the most"


def test_a_burst_of_prompts_of_about_one_length_is_read_in_one_run():
    scheduler: Scheduler[int] = Scheduler(slots=8, limit=10)
    lengths = [20, 22, 20, 60, 21]
    for number, length in enumerate(lengths):
        scheduler.add(number, [1000 * number + i for i in range(length)], priority=5, now=float(number))
    plan = scheduler.plan(200)
    assert [plan.prefill[0].item, *(entry.item for entry in plan.beside)] == [
        0,
        1,
        2,
    ]  # not the long one, nor beyond it
    for entry in (plan.prefill[0], *plan.beside):
        scheduler.advance(entry, entry.left)
    plan = scheduler.plan(200)
    assert (plan.prefill[0].item, plan.beside) == (3, [])
    apart: Scheduler[int] = Scheduler(slots=8, limit=10, together=False)
    for number in range(2):
        apart.add(number, [1000 * number + i for i in range(20)], priority=5, now=0.0)
    assert apart.plan(200).beside == []


def test_who_decodes_stays_in_neighbouring_rows():
    scheduler: Scheduler[str] = Scheduler(slots=4, limit=10)
    entries = [scheduler.add(name, [number] * 20, priority=0, now=0.0) for number, name in enumerate("abc")]
    for _ in entries:
        read, _, count = scheduler.plan(20).prefill
        scheduler.advance(read, count)
    assert [entry.slot for entry in entries] == [0, 1, 2]
    scheduler.remove(entries[1])
    assert (scheduler.plan(20).swaps, entries[2].slot) == ([(2, 1, 20)], 1)
    assert scheduler.plan(20).swaps == []
    scheduler.add("d", [3] * 20, priority=0, now=1.0)
    assert scheduler.plan(20).swaps == []  # it is read beside them


def test_one_that_is_apart_moves_and_not_everybody_else():
    scheduler: Scheduler[int] = Scheduler(slots=8, limit=10, mixes=True)
    entries = [scheduler.add(number, [number] * 20, priority=0, now=0.0) for number in range(8)]
    scheduler.plan(20)
    for entry in (entries[0], *entries[4:]):
        scheduler.advance(entry, 20)
    plan = scheduler.plan(20)
    assert plan.swaps == [(0, 3, 20), (1, 2, 0)], "and whose prompt is read next comes beside them"
    assert sorted(entry.slot for entry in entries if not entry.left) == [3, 4, 5, 6, 7]


def test_the_prompt_that_is_read_next_lies_at_an_end_of_who_decodes():
    scheduler: Scheduler[int] = Scheduler(slots=8, limit=10, mixes=True)
    entries = [scheduler.add(number, [number] * 20, priority=0, now=float(number)) for number in (0, 2, 3, 4, 1)]
    scheduler.plan(20)
    assert [entry.slot for entry in entries] == [0, 2, 3, 4, 1]
    for entry in entries[:2]:
        scheduler.advance(entry, 20)
    scheduler.advance(entries[4], 20)
    scheduler.remove(entries[1])
    plan = scheduler.plan(20)
    assert (plan.swaps, plan.prefill[0].item) == ([(3, 2, 20)], 3)
    assert [entry.slot for entry in entries[:4:2]] == [0, 2]


SYSTEMS = [[], [*range(100, 130)], [*range(100, 116), *range(200, 230)]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(SYSTEMS), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2)), max_size=25
    ),
    st.booleans(),
)
def test_each_request_finds_in_its_slot_what_was_read_of_it(requests, mixes):
    """Through all copies and changes of places: against a cache of lists, as a decoder would have it."""
    scheduler: Scheduler[int] = Scheduler(slots=4, limit=1000, mixes=mixes)
    cache: list[list[int]] = [[] for _ in range(4)]
    arrivals = iter(requests)
    alive: list[Entry[int]] = []
    for number in range(10_000):
        for system, length, tokens, pause in [next(arrivals, (None, 0, 0, 0))] if number % 3 == 0 else []:
            if system is not None:
                made = [*system, *(1000 + 7 * number + i for i in range(length))]
                alive.append(scheduler.add(number, made, priority=5, now=float(pause), tokens=tokens))
        plan = scheduler.plan(24, Tempo(step_s=0.01, run_s=0.005, token_s=0.001))
        for source, slot, count in plan.copies:
            cache[slot] = cache[source][:count]
        for one, other, count in plan.swaps:
            first, second = cache[one], cache[other]
            cache[one], cache[other] = second[:count] + first[count:], first[:count] + second[count:]
        for entry in scheduler._running:
            assert cache[entry.slot][: entry.filled] == entry.prompt[: entry.filled]
        for entry in [*plan.reads]:
            count = plan.prefill[2] if entry is plan.prefill[0] else entry.left
            cache[entry.slot] = list(entry.prompt[: entry.filled + count])
            scheduler.advance(entry, count)
        for entry in plan.decode:
            cache[entry.slot] = [*cache[entry.slot][: len(entry.prompt) + entry.said], 9]
            scheduler.decoded(entry, 9)
            if entry.said >= entry.limit:
                scheduler.remove(entry)
                alive.remove(entry)
        if not alive and number > 3 * len(requests):
            return
    raise AssertionError("somebody waits for ever")


def test_a_prompt_that_is_half_read_makes_room_for_who_decodes():
    scheduler: Scheduler[str] = Scheduler(slots=3, limit=10)
    first, long, last = (scheduler.add(name, [n] * 40, priority=0, now=float(n)) for n, name in enumerate("abc"))
    scheduler.plan(40)
    scheduler.advance(first, 40)
    scheduler.advance(long, 30)
    scheduler.advance(last, 40)
    plan = scheduler.plan(40)
    assert (plan.swaps, first.slot, last.slot, long.slot) == ([(2, 1, 40)], 0, 1, 2)
    assert plan.prefill == (long, 30, 10)
