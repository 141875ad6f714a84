"""Counts and gauges as Flink's metrics, in the group `flink_llm`: from Flink's thread, as PyFlink demands."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pyflink.datastream.functions import RuntimeContext

from flink_llm.runner import Runner

GROUP = "flink_llm"
REPORT_MS = 1000
KNOWN = (
    "results", "repeats", "retries", "overloaded", "outages", "abandoned", "blocked", "leaked_tasks", "restored",
    "degraded", "failures.shed",
)  # fmt: skip
"""Counts that are told from the beginning: an alert sees no increase in what begins at one."""


class Counts:
    """Brings counts to counters of a metric group; None where `python.metric.enabled` is false."""

    def __init__(self, group: Any, counts: Mapping[str, int]) -> None:
        self._group = group
        self._counts = counts
        self._flink: dict[str, Any] = {}
        self._told: dict[str, int] = {}

    @property
    def untold(self) -> bool:
        """Whether there is anything to tell."""
        return self._counts != self._told

    def tell(self) -> None:
        """What has been counted since the last time."""
        for name, count in list(self._counts.items()) if self._group is not None else ():
            if name not in self._flink:
                self._flink[name] = self._group.counter(name)
            self._flink[name].inc(count - self._told.get(name, 0))
            self._told[name] = count


class Counters:
    """The operator's: its runner's counts, what is in flight, and the levels of its breakers.

    Beam drops what is counted while a timer is processed. A gauge is asked at the end of every bundle, of
    timers as well, where counting is heard: that is when all of it is told, once a second.
    """

    def __init__(self, runtime_context: RuntimeContext, runner: Runner, in_flight: Callable[[], int]) -> None:
        group = runtime_context.get_metrics_group()
        self._group: Any = None if group is None else group.add_group(GROUP)
        self._counts = Counts(self._group, runner.metrics.counts)
        self._breakers = runner.breakers
        self._levels: dict[str, int] = {}  # as last told
        self._in_flight = in_flight
        self._next = 0.0
        if self._group is not None:
            for name in KNOWN:
                runner.metrics.add(name, 0)
            self._group.gauge("in_flight", self._asked)

    @property
    def untold(self) -> bool:
        """Whether a bundle is to end in `REPORT_MS`, even if nothing arrives: circuits close by themselves."""
        if self._group is None:
            return False
        levels = (*self._levels.values(), *(breaker.level for breaker in self._breakers.values()))
        return self._counts.untold or any(levels)

    def _asked(self) -> int:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + REPORT_MS / 1000
            self._counts.tell()
            for name, breaker in self._breakers.items():
                if name not in self._levels:
                    self._group.add_group("breaker").gauge(name, partial(getattr, breaker, "level"))
                self._levels[name] = breaker.level
        return self._in_flight()
