"""One piece of work inside the engine, and what a step has to say of it."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from flink_llm.engine.faults import MODEL_ERROR, fault_of
from flink_llm.engine.metrics import ModelMetrics, RequestMetrics
from flink_llm.engine.protocol import Done, Event, Fault, Submit
from flink_llm.errors import Overloaded, RecordError

log = logging.getLogger(__name__)
Emit = Callable[[Event], None]
Said = list[tuple[Emit, Event]]
"""The events of a step, each with whom it is for."""


class Job:
    """Work, the id of its generation, and who hears of it. `cancelled` is set by the loop's thread.

    `wake` has its engine make a step, and may be called on any thread.
    """

    __slots__ = ("cancelled", "emit", "generation", "metrics", "wake", "work")

    def __init__(
        self,
        work: Submit,
        generation: str,
        emit: Emit,
        metrics: RequestMetrics,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.work = work
        self.generation = generation
        self.emit = emit
        self.metrics = metrics
        self.wake = wake
        self.cancelled = False

    def left(self) -> float | None:
        """Seconds until its client gives it up, as far as that is known; None for never."""
        deadline = self.work.deadline
        return None if deadline is None else self.metrics.arrived + deadline - time.monotonic()

    def say(self, event: Event, said: Said) -> None:
        """One event of this work."""
        said.append((self.emit, event))
        if isinstance(event, Done):
            self.metrics.ended(event.finish)
        elif isinstance(event, Fault):
            invalid = event.kind == "record" and event.code != MODEL_ERROR
            self.metrics.ended("outage" if event.kind == "outage" else "invalid" if invalid else "failed")

    def fail(self, error: BaseException, said: Said) -> None:
        """The end of this work, and of no other."""
        if not isinstance(error, (RecordError, Overloaded)):
            about = {"request_id": self.work.request_id}
            log.error("a piece of work for the model %s failed", self.work.model[:12], exc_info=error, extra=about)
        if isinstance(error, Overloaded):
            self.metrics.ended(f"refused_{error.reason}")
        self.say(fault_of(error), said)

    def leave(self) -> None:
        """The end of cancelled work: nobody hears of it."""
        self.metrics.ended("cancelled")


class ServedModel(Protocol):
    """A model with what waits for it. All methods are called on the engine's thread."""

    name: str
    metrics: ModelMetrics

    def add(self, job: Job) -> None:
        """Queues a job. Whatever it raises is the job's end."""

    def step(self, said: Said) -> bool:
        """One step; whether anything ran. What fails ends in a fault of its own."""

    def drop(self) -> list[Job]:
        """Forgets all work, and tells which it was."""
