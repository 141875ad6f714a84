"""Who is told how long the stages of a call take: nobody, unless a job asks for latencies or spans.

A watch follows one record from its arrival until its outcome is emitted. `current_watch` is that of the
call that is running, for whoever works on its behalf; `during` tells it of a stage.
"""

from contextvars import ContextVar
from typing import Any


class Watch:
    """Told of one record, and does nothing about it. Times are seconds of the loop's clock."""

    __slots__ = ()

    def began(self) -> None:
        """Its call runs."""

    def ended(self) -> None:
        """Its call has an outcome."""

    def emitted(self, call: Any) -> None:
        """The outcome of `call` is in Flink's hands."""

    def passed(self, stage: str, since: float, until: float, **facts: Any) -> None:
        """A stage of its call is over; `facts` are what a span says of it."""

    def now(self) -> float:
        """The second it is."""
        return 0.0


NOBODY = Watch()
current_watch: ContextVar[Watch] = ContextVar("current_watch", default=NOBODY)


class during:
    """`with during("features", view=name):` tells the call's watch how long that took, whatever came of it."""

    __slots__ = ("_facts", "_since", "_stage", "_watch")

    def __init__(self, stage: str, **facts: Any) -> None:
        self._stage = stage
        self._facts = facts
        self._watch = current_watch.get()

    def __enter__(self) -> None:
        self._since = self._watch.now()

    def __exit__(self, *error: object) -> None:
        self._watch.passed(self._stage, self._since, self._watch.now(), **self._facts)
