"""The calls of a runner whose time runs: who is cut short when it is over, and how. Lives on the runner's loop."""

import logging
import math
from collections.abc import Callable
from typing import Literal

from flink_llm.call import Call, Failed, Outcome
from flink_llm.clock import RecordClock
from flink_llm.errors import DeadlineExceeded
from flink_llm.handler import Metrics

log = logging.getLogger(__name__)
GRACE_S = 1.0
"""How long a call may take to end once it was cancelled, or its reply cut short."""
BLOCKED_S = 0.5
"""From here on a late tick is worth a word: nobody else was served meanwhile."""


class Deadlines:
    """`end` is told of each call that ends by its deadline, `out` says whether a part is down.

    With `on_deadline` "partial" a call that has a reply under way ends with what that has said.
    """

    def __init__(
        self,
        clock: RecordClock,
        end: Callable[[Call, Outcome], None],
        *,
        out: Callable[[], bool],
        on_deadline: Literal["partial", "failure"],
        name: str,
        metrics: Metrics,
    ) -> None:
        self._clock = clock
        self._end = end
        self._out = out
        self._partial = on_deadline == "partial"
        self._name = name
        self._metrics = metrics
        self._timed: set[Call] = set()
        self._cut_short: set[Call] = set()  # whose replies have ended with what they had said
        self._earliest = math.inf  # no deadline passes before, on the records' clock

    def watch(self, call: Call, seconds: float) -> None:
        """The call has so many seconds left."""
        call.expires_at = self._clock.now() + seconds
        self._timed.add(call)
        self._earliest = min(self._earliest, call.expires_at)

    def forget(self, call: Call) -> None:
        """The call has ended."""
        self._timed.discard(call)
        self._cut_short.discard(call)

    def passed(self, call: Call) -> bool:
        """Whether its time is over."""
        return call.expires_at is not None and self._clock.now() >= call.expires_at

    def late(self) -> Failed:
        """What a call has become whose deadline has passed: while a part is out, that is why."""
        if self._out():
            return Failed("outage", "a part was out until the deadline")
        return Failed("deadline", DeadlineExceeded().message)

    def tick(self) -> None:
        """Called often: ends whose deadline has passed, and tells of a loop that somebody has held."""
        passed = self._clock.tick()
        if passed > BLOCKED_S:
            self._metrics.add("blocked")
            log.warning(
                "the loop of %s stood still for %.1f s: a call blocks it instead of awaiting; asyncio.to_thread "
                "keeps such work off the loop",
                self._name,
                passed,
            )
        self._expire()

    def _expire(self) -> None:
        now = self._clock.now()
        if now < self._earliest:
            return
        for call in [call for call in self._timed if call.expires_at is not None and call.expires_at <= now]:
            generations = [one for one in call.info.open_generations if one.text] if call.info is not None else []
            if call.task is None:
                self._end(call, Failed("deadline", "the deadline passed while the record waited for its turn"))
            elif call.info is None:  # not begun: cancelling it would leave nobody to end it
                call.task.cancel()
                self._end(call, self.late())
            elif now >= (call.expires_at or 0) + GRACE_S:
                self._abandon(call)
            elif generations and self._partial:
                self._cut_short.add(call)
                for generation in generations:
                    generation.expire()
            elif call not in self._cut_short and call.task.cancelling() == 0:
                call.task.cancel()
        self._earliest = min((call.expires_at or now for call in self._timed), default=math.inf)

    def _abandon(self, call: Call) -> None:
        self._metrics.add("abandoned")
        log.warning("%s did not end %s s after its deadline; its call is abandoned", self._name, GRACE_S)
        if call.task is not None:
            call.task.cancel()
        self._end(call, Failed("deadline", DeadlineExceeded().message, call.generation_id))
