"""Whom to refuse at arrival, since the answer would come too late: a pure decision over what was seen lately.

A service under load answers its n-th waiting record after about n times what one costs it, however many it
works on at a time. So for each record that was answered two numbers are kept: how many were in flight when
it came, itself included, and how long it then took. Their ratio says what a record in flight costs; where a
longer queue was seen to cost more than that, more is expected of a queue that is longer still.

In flight before a record are those that the host serves before it, by priority and age. What that costs is
learnt for each priority by itself: whoever comes later overtakes the low ones alone.
"""

from bisect import bisect_left, bisect_right
from threading import Lock

from flink_llm.call import Call, Failed, Outcome, Result
from flink_llm.priorities import LANES, lane_of, rank_of

WEIGHT = 1 / 16
"""Of the latest record in the moving means."""
MARGIN, MARGIN_MOST = 1.25, 2.0
LATE, IN_TIME = 0.1, 0.0005
"""What an answer that came too late adds to the margin, and one in time takes off: one late in 200 is held."""
STEEPEST = 4.0
"""How many times the mean cost a further record in flight is believed to cost at the most."""


class Shedder:
    """Estimates in seconds. One thread calls `answered`; any may ask."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._took = 0.0
        self._spread = 0.0
        self._together = 0.0
        self._seen = 0
        self._margin = MARGIN
        self._line: tuple[float, float, float] | None = None

    def estimate(self, ahead: int) -> float:
        """Seconds until the answer of a record that comes while `ahead` are in flight; 0 before the first answer."""
        line = self._line
        if line is None:
            return 0.0
        mean, cost, further = line
        place = ahead + 1
        return cost * min(place, mean) + further * max(0.0, place - mean)

    def refuses(self, ahead: int, left: float) -> bool:
        """Whether a record with `left` seconds cannot be answered in time behind `ahead` others.

        One that nobody is ahead of is taken while it has time: only answers can prove an estimate wrong.
        """
        return left <= 0 or (ahead > 0 and self._margin * self.estimate(ahead) > left)

    def answered(self, ahead: int, took: float, left: float) -> None:
        """A record that came with `left` seconds behind `ahead` others was answered after `took`, or given up then."""
        self._seen += 1
        weight = max(WEIGHT, 1 / self._seen)
        place, kept = ahead + 1, 1 - weight
        from_place, from_took = place - self._ahead, took - self._took
        self._ahead += weight * from_place
        self._took += weight * from_took
        self._spread = kept * (self._spread + weight * from_place * from_place)
        self._together = kept * (self._together + weight * from_place * from_took)
        cost = self._took / self._ahead
        slope = self._together / self._spread if self._spread > 0 else 0.0
        self._line = self._ahead, cost, min(max(cost, slope), STEEPEST * cost)
        late = took > left
        self._margin = min(self._margin + LATE, MARGIN_MOST) if late else max(self._margin - IN_TIME, MARGIN)


class Shedding:
    """Who is in flight, in the order in which a host serves them, and what each priority has learnt. Any thread may
    call it."""

    def __init__(self) -> None:
        self._shedders = [Shedder() for _ in range(LANES)]
        self._ranks: list[float] = []
        self._lock = Lock()

    def shedder(self, priority: int) -> Shedder:
        """What records of this priority have learnt."""
        return self._shedders[lane_of(priority)]

    def ahead(self, now: float, priority: int) -> int:
        """How many are served before a record that comes now."""
        return bisect_right(self._ranks, rank_of(now, priority))

    def join(self, now: float, priority: int) -> float:
        """A record comes; its rank, to `leave` with."""
        rank = rank_of(now, priority)
        with self._lock:
            self._ranks.insert(bisect_right(self._ranks, rank), rank)
        return rank

    def leave(self, rank: float) -> None:
        """One of this rank has ended."""
        with self._lock:
            del self._ranks[bisect_left(self._ranks, rank)]

    def refusal(self, call: Call, left: float, now: float) -> Failed | None:
        """Why a call that comes with `left` seconds is refused, None for one that is let in."""
        ahead, shedder = self.ahead(now, call.priority), self.shedder(call.priority)
        if shedder.refuses(ahead, left):
            took = shedder.estimate(ahead)
            return Failed("shed", f"{left:.3g} s were left, and the answer would have taken about {took:.3g} s")
        call.admitted = ahead, left, now
        return None

    def ended(self, call: Call, outcome: Outcome, now: float) -> None:
        """What a call took tells what others will; what fails at once tells nothing."""
        if call.rank is not None:
            self.leave(call.rank)
        if call.admitted is not None:
            ahead, left, since = call.admitted
            if isinstance(outcome, Result) or outcome.code in ("deadline", "overloaded"):
                self.shedder(call.priority).answered(ahead, now - since, left)
