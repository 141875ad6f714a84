"""Circuit breakers: what fails is left alone, one call finds out when it is back."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flink_llm.breakers import Breaker, Breakers, BreakerSettings
from flink_llm.errors import CircuitOpen, Outage, Overloaded, RecordError
from flink_llm.handler import AsyncUdf, CallContext
from flink_llm.testing import Script
from flink_llm.testing.harness import Harness
from flink_llm.testing.services import FakeServices

FAILURES, RESET_S = 3, 2.0


class Machine(RuleBasedStateMachine):
    """Calls that overlap in any order, against what a breaker promises."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker("x", BreakerSettings(failures=FAILURES, reset_s=RESET_S), lambda: self.now)
        self.calls: list[tuple[Any, bool]] = []  # and whether it is a probe
        self.row = 0
        self.opened_at: float | None = None

    @property
    def probing(self) -> bool:
        return any(probe for _, probe in self.calls)

    @rule()
    def call(self) -> None:
        allowed = self.opened_at is None or (self.now >= self.opened_at + RESET_S and not self.probing)
        try:
            entered = self.breaker.enter()
        except CircuitOpen as error:
            assert not allowed
            assert 0 < error.retry_after <= RESET_S + 1e-9, "the clock is told in floats"
        else:
            assert allowed
            self.calls.append((entered, self.opened_at is not None))

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 50), how=st.sampled_from(["well", "outage", "record", "full", "left"]))
    def end(self, which: int, how: str) -> None:
        entered, probe = self.calls.pop(which % len(self.calls))
        errors = {"outage": Outage("gone"), "record": RecordError("invalid", "bad"), "full": Overloaded("full")}
        if how == "left":
            entered.left()
        else:
            entered.ended(errors.get(how))
        entered.ended(Outage("what is said twice does not count"))
        if how == "left" or (self.opened_at is not None and not probe):
            return
        if how != "outage":
            self.row, self.opened_at = 0, None
            self.calls = [(one, False) for one, _ in self.calls]
            return
        self.row += 1
        if probe or self.row >= FAILURES:
            self.opened_at = self.now

    @rule(seconds=st.floats(0.1, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def says_what_it_is(self) -> None:
        assert (self.breaker.level == 0) == (self.opened_at is None) == (self.breaker.outage_since is None)
        assert sum(probe for _, probe in self.calls) <= 1
        if self.probing:
            assert self.breaker.level == 1


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestMachine = Machine.TestCase


def test_never_open_where_it_is_switched_off() -> None:
    breaker = Breaker("x", BreakerSettings(failures=0))
    for _ in range(20):
        breaker.enter().ended(Outage("gone"))
    assert breaker.level == 0


def test_a_part_that_probes_itself() -> None:
    breakers = Breakers(BreakerSettings(failures=2), lambda: 7.0)
    view = breakers.named("features.view")
    for _ in range(3):
        view.check() if view.level == 0 else None
        view.report(Outage("gone"))
    assert (view.level, breakers.outage_since, list(breakers)) == (2, 7.0, ["features.view"])
    with pytest.raises(CircuitOpen, match="has failed 2 times in a row"):
        view.check()
    view.probing()
    assert view.level == 1
    view.report(Outage("still gone"))
    assert view.level == 2
    view.report(None)
    view.check()
    assert breakers.outage_since is None


def test_breakers_may_be_looked_at_while_others_are_made() -> None:
    breakers = Breakers(BreakerSettings())
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor() as pool:
            looking = pool.submit(lambda: {breakers.outage_since for _ in range(2_000)})
            for number in range(2_000):
                breakers.named(f"models.{number}")
            assert looking.result() == {None}
    finally:
        sys.setswitchinterval(before)


class Ask(msgspec.Struct):
    request_id: str
    session_id: str = "s"


class Asking(AsyncUdf):
    async def open(self, ctx: Any) -> None:
        self.model = ctx.model("m")

    async def call(self, request: Ask, ctx: CallContext) -> Any:
        await self.model.generate("say")
        return {"request_id": request.request_id}


def test_calls_stop_reaching_a_dead_model_and_one_probe_closes_the_circuit() -> None:
    dead, well = Script(fault="outage"), Script(text="hello")
    services = FakeServices({"m": [*[dead] * 6, well]}, breaker=BreakerSettings(failures=4, reset_s=5.0))
    with Harness(Asking(), services) as run:
        for number in range(12):
            run.send(Ask(request_id=str(number)))
        run.advance(4.0)
        breaker = services.breakers["models.m"]
        assert (breaker.level, services.backend.started) == (2, 4), "eight records have not reached it"
        run.advance(2.0)
        assert (breaker.level, services.backend.started) == (2, 5), "and one has, at the time of the probe"
        run.finish()
        assert len(run.results()) == 12
        assert not run.failures()
        assert breaker.level == 0
