"""Whose turn it is: one call of a key at a time where it keeps state, outcomes in order where that is asked for,
and one run for all records of one request id. Lives on the runner's loop.
"""

from bisect import bisect_left
from collections.abc import Callable
from operator import attrgetter

from flink_llm.call import Call, Failed, Lane, Outcome, Result


class Turns:
    """The lanes of keys. `begin` is told of each call whose turn has come.

    `one_by_one`: calls of a key run one after another, since each begins with the state that the one before
    left. `ordered`: outcomes of a key leave in the order in which its records came.
    """

    def __init__(self, begin: Callable[[Call, Lane | None], None], *, one_by_one: bool, ordered: bool) -> None:
        self._begin = begin
        self._one_by_one = one_by_one
        self._ordered = ordered
        self._lanes: dict[tuple[int, str], Lane] = {}

    def enter(self, call: Call) -> None:
        """A call has come: it has its place in the order of its key."""
        if self._one_by_one or self._ordered:
            lane = self._lanes.setdefault(_key(call), Lane(call.committed_state))
            if self._ordered:
                lane.order.append(call)

    def take(self, call: Call) -> None:
        """Begins the call, or has it wait for its turn."""
        lane = self._lanes.get(_key(call))
        if self._one_by_one and lane is not None:
            if lane.running is not None:  # one that runs in the place of an earlier record goes before later ones
                lane.waiting.insert(bisect_left(lane.waiting, call.sequence, key=attrgetter("sequence")), call)
                return
            lane.running = call
        self._begin(call, lane)

    def leave(self, call: Call, outcome: Outcome) -> list[Call]:
        """The call has ended: begins the next of its key; whose outcomes may be handed over now."""
        lane = self._lanes.get(_key(call))
        if lane is None:
            return [call]
        if isinstance(outcome, Result) and outcome.state is not None:
            lane.state = outcome.state
        if lane.running is call:
            lane.running = None
            while lane.waiting and lane.running is None:
                waiting = lane.waiting.popleft()
                if not waiting.ended:
                    self.take(waiting)
        if not self._ordered:
            return [call]
        ready = []
        while lane.order and lane.order[0].ended:
            ready.append(lane.order.popleft())
        return ready

    def forget(self, call: Call) -> None:
        """Nothing of the call's key is in flight any more."""
        self._lanes.pop(_key(call), None)


class Repeats:
    """The first record of each request id, and those that repeat it meanwhile.

    `run` is told of who has to run, `end` of who is answered with another's outcome.
    """

    def __init__(self, run: Callable[[Call], None], end: Callable[[Call, Outcome], None]) -> None:
        self._run = run
        self._end = end
        self._first: dict[tuple[int, bytes], Call] = {}

    def admit(self, call: Call) -> None:
        """Runs the call, unless it repeats one that has ended or will."""
        first = self._first.get(call.identity) if call.identity is not None else None
        if first is None:
            if call.identity is not None:
                self._first[call.identity] = call
            self._run(call)
        elif first.payload_hash != call.payload_hash:
            self._end(call, conflict(call.request_id))
        elif first.ended and isinstance(first.outcome, Result):
            self._end(call, first.outcome.again())
        else:
            first.repeats.append(call)

    def answer(self, call: Call, outcome: Outcome) -> None:
        """The call has ended, and its repeats with it; of a failure the next repeat runs in its place."""
        repeats, call.repeats = call.repeats, []
        if isinstance(outcome, Result):
            for repeat in repeats:
                self._end(repeat, outcome.again())
        elif self.forget(call):
            for repeat in repeats:
                if not repeat.ended:
                    self.admit(repeat)

    def forget(self, call: Call) -> bool:
        """The outcome is in Flink's hands, or is none to repeat; whether the call was the first of its id."""
        if call.identity is None or self._first.get(call.identity) is not call:
            return False
        del self._first[call.identity]
        return True


def conflict(request_id: str | None) -> Failed:
    """The outcome of a request id that was used before with another payload."""
    return Failed("conflicting_request", f"request id {request_id!r} was used before with another payload")


def _key(call: Call) -> tuple[int, str]:
    return call.shard.number, call.key
