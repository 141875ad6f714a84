"""The loop is woken as seldom as may be, and order is kept."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm.inbox import Inbox


class Loop:
    """Runs what it was woken for when told to."""

    def __init__(self):
        self.woken = []

    def call_soon_threadsafe(self, callback):
        self.woken.append(callback)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["start", "forget", "hold", "release", "wake", "loop", "tick"])))
def test_all_is_worked_off_in_order(steps):
    loop, posted, done = Loop(), [], []
    inbox = Inbox(loop, lambda call: done.append(("start", call)), lambda call, last: done.append((last, call)))
    for step in steps:
        call = SimpleNamespace()
        if step == "start":
            posted.append(("start", call))
            inbox.start(call)
            assert inbox.held or loop.woken
        elif step == "forget":
            posted.append((len(posted) % 2 == 0, call))
            inbox.forget(call, last_of_key=posted[-1][0])
        elif step in ("hold", "release"):
            inbox.held = step == "hold"
        elif step == "wake":
            inbox.wake()
            assert loop.woken or done == posted
        elif step == "tick":
            inbox.work_off()
        elif loop.woken:
            loop.woken.pop()()
        assert done == posted[: len(done)]
    inbox.work_off()
    assert done == posted


def test_many_starts_wake_once_and_forgetting_wakes_nobody():
    loop = Loop()
    inbox = Inbox(loop, lambda call: None, lambda call, last: None)
    inbox.forget(SimpleNamespace(), last_of_key=True)
    assert loop.woken == []
    inbox.held = True
    for _ in range(100):
        inbox.start(SimpleNamespace())
    assert loop.woken == []
    inbox.wake()
    inbox.wake()
    assert len(loop.woken) == 1
