"""The records' clock: it goes as time goes, less what some part was out."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flink_llm.clock import RecordClock


class World:
    at = 0.0
    since = None


STEPS = st.lists(st.tuples(st.sampled_from(["pass", "out", "back"]), st.floats(0.001, 5)), max_size=40)


def run(steps, stops):
    """What the clock shows at the end, and how long no part was out."""
    world = World()
    clock = RecordClock(lambda: world.since, stops=stops, clock=lambda: world.at)
    up = 0.0
    shown = [clock.now()]
    for what, seconds in steps:
        if what == "out" and world.since is None:
            world.since = world.at
        elif what == "back":
            clock.tick()
            world.since = None
        world.at += seconds
        up += seconds if world.since is None else 0.0
        shown += [clock.now()]
        clock.tick()
        shown += [clock.now()]
    assert all(later - earlier > -1e-9 for earlier, later in pairwise(shown))
    return clock.now(), up, world.at


@given(STEPS)
def test_it_stands_still_while_a_part_is_out(steps):
    shown, up, _ = run(steps, stops=True)
    assert abs(shown - up) < 1e-6


@given(STEPS)
def test_it_runs_on_when_it_is_told_to(steps):
    shown, _, at = run(steps, stops=False)
    assert abs(shown - at) < 1e-6
