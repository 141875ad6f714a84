"""Who is refused at arrival: the estimate against simulated services, and the operator's use of it."""

import heapq
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.call import OperatorSettings
from flink_llm.handler import AsyncUdf
from flink_llm.priorities import rank_of
from flink_llm.shedding import Shedder, Shedding
from flink_llm.testing import FakeServices, Harness, Script


def one_by_one(rate):
    """A service that answers so many a second, one after another."""
    free = [0.0]

    def ends(at, draw):
        free[0] = max(at, free[0]) + 1 / rate
        return free[0]

    return ends


def side_by_side(slots, low, high):
    """A service with so many slots, each taking evenly distributed seconds."""
    free = [0.0] * slots

    def ends(at, draw):
        end = max(at, heapq.heappop(free)) + draw.uniform(low, high)
        heapq.heappush(free, end)
        return end

    return ends


def simulate(service, rate, until, deadline, seed):
    """(arrival, how long it took or None for who was refused), on a clock that is only counted."""
    draw, shedder, running, outcomes, now = random.Random(seed), Shedder(), [], [], 0.0
    while now < until:
        now += draw.expovariate(rate(now))
        while running and running[0][0] <= now:
            end, at, ahead = heapq.heappop(running)
            shedder.answered(ahead, end - at, deadline)
        if shedder.refuses(len(running), deadline):
            outcomes.append((now, None))
            continue
        end = service(now, draw)
        heapq.heappush(running, (end, now, len(running)))
        outcomes.append((now, end - now))
    return outcomes


SERVICES = {
    "one by one": lambda: one_by_one(50),
    "16 fixed": lambda: side_by_side(16, 0.32, 0.32),
    "16 varied": lambda: side_by_side(16, 0.16, 0.48),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("deadline", [1.0, 2.0])
@pytest.mark.parametrize("service", SERVICES)
def test_a_burst_of_ten_times_the_rate(service, deadline, seed):
    def rate(now):
        return 500 if 30 <= now < 60 else 35

    outcomes = simulate(SERVICES[service](), rate, 90, deadline, seed)
    taken = [(at, took) for at, took in outcomes if took is not None]
    assert sum(took <= deadline for _, took in taken) / len(taken) >= 0.99
    burst = [took for at, took in taken if 31 <= at < 60]
    assert len(burst) / 29 > 0.95 * 50  # nothing of what the service can do is given away
    refused_else = sum(took is None for at, took in outcomes if at < 30 or at > 60 + 2 * deadline)
    assert refused_else <= 0.01 * len(outcomes)


def simulate_lanes(rates, until, deadline, seed, *, slots=16, slowest=0.48):
    """By priority: how long each took, None for who was refused. A service serves by rank, the late as well."""
    draw, shedding, now, number = random.Random(seed), Shedding(), 0.0, 0
    waiting, serving, outcomes = [], [], {priority: [] for priority in rates(0)}

    def serve():
        while waiting and len(serving) < slots:
            _, _, who = heapq.heappop(waiting)
            heapq.heappush(serving, (now + draw.uniform(slowest / 3, slowest), *who))

    while now < until:
        due = now + draw.expovariate(sum(rates(now).values()))
        while serving and serving[0][0] <= due:
            now, _, at, priority, ahead, rank = heapq.heappop(serving)
            shedding.leave(rank)
            shedding.shedder(priority).answered(ahead, now - at, deadline)
            outcomes[priority].append((at, now - at))
            serve()
        now, number = due, number + 1
        (priority,) = draw.choices(list(rates(now)), list(rates(now).values()))
        ahead = shedding.ahead(now, priority)
        if shedding.shedder(priority).refuses(ahead, deadline):
            outcomes[priority].append((now, None))
            continue
        rank = shedding.join(now, priority)
        heapq.heappush(waiting, (rank_of(now, priority), number, (number, now, priority, ahead, rank)))
        serve()
    return outcomes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("deadline", [1.0, 2.0])
def test_a_burst_of_low_priority_takes_nothing_from_the_high(deadline, seed):
    def rates(now):
        return {0: 10, 9: 500 if 30 <= now < 60 else 25}

    outcomes = simulate_lanes(rates, 90, deadline, seed)
    high = [took for at, took in outcomes[0] if at >= 5]  # before, the first answers stand for all
    assert sum(took is not None and took <= deadline for took in high) / len(high) >= 0.98
    low = [took for _, took in outcomes[9] if took is not None]
    assert sum(took <= deadline for took in low) / len(low) >= 0.97
    assert sum(31 <= at < 60 for at, took in outcomes[9] if took is not None) / 29 > 0.9 * 40


def test_ahead_are_those_of_ones_own_priority_or_above_and_who_has_aged():
    shedding = Shedding()
    ranks = [shedding.join(0.0, priority) for priority in (5, 0, 5, 9, 4)]
    assert [shedding.ahead(0.0, priority) for priority in (0, 4, 5, 9)] == [1, 2, 4, 5]
    assert shedding.ahead(10.1, 0) == 4, "what is five steps lower has waited for five steps"
    for rank in ranks:
        shedding.leave(rank)
    assert shedding.ahead(0.0, 9) == 0


def test_who_has_nobody_ahead_is_taken_whatever_was_seen():
    shedder = Shedder()
    for _ in range(100):
        shedder.answered(0, took=50.0, left=1.0)
    assert not shedder.refuses(0, left=1.0)
    assert shedder.refuses(1, left=1.0)
    assert shedder.refuses(0, left=0.0)


def test_an_estimate_comes_down_again_once_answers_are_fast():
    shedder = Shedder()
    for _ in range(100):
        shedder.answered(0, took=50.0, left=1.0)
    tries = 0
    while shedder.refuses(10, left=1.0):
        shedder.answered(0, took=0.02, left=1.0)
        tries += 1
    assert tries < 150


def test_a_longer_queue_is_believed_to_cost_more():
    shedder = Shedder()
    for ahead in [0, 1, 2, 3] * 20:  # the first of each four is answered at once
        shedder.answered(ahead, took=0.1 * ahead, left=5.0)
    assert shedder.estimate(50) == pytest.approx(5.0, rel=0.15)


observations = st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 1e4), st.floats(0, 1e4)), max_size=60)


@given(observations, st.integers(0, 5000), st.integers(0, 5000))
def test_an_estimate_is_a_time_and_grows_with_the_queue(seen, one, other):
    shedder = Shedder()
    for ahead, took, left in seen:
        shedder.answered(ahead, took, left)
    fewer, more = sorted([one, other])
    assert 0 <= shedder.estimate(fewer) <= shedder.estimate(more) * (1 + 1e-9) < float("inf")


class Answering(AsyncUdf):
    async def open(self, ctx):
        self.model = ctx.model("slow")

    async def call(self, request: dict, ctx):
        reply = await self.model.chat([{"role": "user", "content": "hello"}])
        return {"request_id": request["request_id"], "text": reply.text}


def send(harness, number, **fields):
    harness.send({"request_id": f"r{number}", "session_id": "s", **fields})


def test_the_operator_refuses_at_once_what_it_cannot_answer_in_time():
    services = FakeServices({"slow": Script(rate_per_s=50)})
    settings = OperatorSettings(deadline=2.0, shed=True)
    with Harness(Answering(), services, settings=settings) as harness:
        for number in range(20):
            send(harness, number)
            harness.finish()
        for number in range(20, 400):
            began = len(harness.outputs)
            send(harness, number)
            refused = harness.failures() and len(harness.outputs) > began
            if refused and harness.shard.in_flight:
                break
        in_flight = harness.shard.in_flight
        harness.finish()
    codes = {failure["code"] for failure in harness.failures()}
    assert codes == {"shed"}
    assert "s were left, and the answer would have taken about" in harness.failures()[0]["message"]
    assert 10 < in_flight < 110
    assert harness.runner.metrics.counts["failures.shed"] == len(harness.failures())


def test_a_record_that_has_waited_in_kafka_for_too_long_is_refused_and_can_be_sent_again():
    services = FakeServices({"slow": Script()})
    with Harness(Answering(), services, settings=OperatorSettings(deadline=5.0, shed=True)) as harness:
        arrival = harness._keyer.arrive(old(time.time() - 60))[1]
        harness.outputs += harness.shard.receive(arrival.to_bytes())
        assert [failure["code"] for failure in harness.failures()] == ["shed"]
        assert not harness.shard.in_flight
        send(harness, 0)  # the same id: nothing was remembered
        harness.finish()
    assert len(harness.results()) == 1


def old(timestamp):
    from flink_llm.arrivals import Arrival

    value = b'{"request_id": "r0", "session_id": "s"}'
    return Arrival(value=value, from_kafka=True, topic="t", partition=0, offset=0, timestamp=int(timestamp * 1000))


def test_off_is_the_default_and_refuses_nobody():
    with Harness(Answering(), FakeServices({"slow": Script()}), settings=OperatorSettings(deadline=5.0)) as harness:
        harness.outputs += harness.shard.receive(harness._keyer.arrive(old(time.time() - 60))[1].to_bytes())
        harness.finish()
    assert len(harness.results()) == 1


def test_nobody_is_refused_while_a_part_is_out_or_after_a_restore():
    services = FakeServices({"slow": Script(fault="hang")})
    settings = OperatorSettings(deadline=5.0, shed=True)
    with Harness(Answering(), services, settings=settings) as harness:
        harness.outage(60.0)
        harness.outputs += harness.shard.receive(harness._keyer.arrive(old(time.time() - 60))[1].to_bytes())
        assert harness.shard.in_flight == 1
        state = harness.checkpoint()
    services = FakeServices({"slow": Script()})
    with Harness(Answering(), services, settings=settings, state=state) as again:
        again.finish()
    assert len(again.results()) == 1
    assert not again.failures()
