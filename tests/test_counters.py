"""Counts are told where Beam hears them: when a gauge is asked, at the end of a bundle."""

from types import SimpleNamespace

from flink_llm.handler import Metrics
from flink_llm.udfs import counters


class Group:
    """A metric group that hears of a count only while its gauges are asked."""

    def __init__(self):
        self.gauges, self.heard, self.groups, self.asking = {}, {}, {}, False

    def add_group(self, name):
        return self.groups.setdefault(name, Group())

    def gauge(self, name, asked):
        self.gauges[name] = asked

    def counter(self, name):
        def inc(count):
            if self.asking:
                self.heard[name] = self.heard.get(name, 0) + count

        return SimpleNamespace(inc=inc)

    def end_bundle(self):
        self.asking = True
        values = {name: asked() for name, asked in self.gauges.items()}
        self.asking = False
        return values | {name: group.end_bundle() for name, group in self.groups.items()}


ZEROS = dict.fromkeys(counters.KNOWN, 0)


def made(monkeypatch, counts, breakers):
    root, now = Group(), SimpleNamespace(value=100.0)
    monkeypatch.setattr(counters.time, "monotonic", lambda: now.value)
    metrics = Metrics()
    metrics.counts = counts
    runner = SimpleNamespace(metrics=metrics, breakers=breakers)
    context = SimpleNamespace(get_metrics_group=lambda: root)
    return counters.Counters(context, runner, lambda: 7), root.groups["flink_llm"], now


def test_all_counts_are_heard_once_a_second_also_those_of_an_operator_that_has_fallen_still(monkeypatch):
    counts = {"results": 1}
    told, group, now = made(monkeypatch, counts, {})
    assert told.untold
    assert group.end_bundle() == {"in_flight": 7}
    assert (group.heard, told.untold) == (ZEROS | {"results": 1}, False)
    counts |= {"results": 3, "failures.invalid": 1}
    now.value += 0.5
    group.end_bundle()
    assert (group.heard, told.untold) == (ZEROS | {"results": 1}, True), "too early: a timer comes again"
    now.value += 0.5
    group.end_bundle()
    assert (group.heard, told.untold) == (ZEROS | {"results": 3, "failures.invalid": 1}, False)


def test_a_breaker_that_is_made_later_has_its_gauge(monkeypatch):
    breakers = {}
    told, group, now = made(monkeypatch, {}, breakers)
    group.end_bundle()
    assert not told.untold
    breakers["models.large"] = SimpleNamespace(level=2)
    assert told.untold
    now.value += 1
    assert group.end_bundle() == {"in_flight": 7, "breaker": {"models.large": 2}}
    breakers["models.large"].level = 0
    assert told.untold, "nobody has heard that it is closed"
    now.value += 1
    assert group.end_bundle() == {"in_flight": 7, "breaker": {"models.large": 0}}
    assert not told.untold


def test_without_a_metric_group_nothing_is_to_be_told():
    runner = SimpleNamespace(metrics=SimpleNamespace(counts={"results": 1}), breakers={})
    assert not counters.Counters(SimpleNamespace(get_metrics_group=lambda: None), runner, lambda: 0).untold
