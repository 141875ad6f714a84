"""What takes long is done beside the engine's thread, whose steps everybody's tokens wait for."""

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from operator import itemgetter
from typing import Generic, TypeVar

from flink_llm.engine.job import Job
from flink_llm.errors import Overloaded
from flink_llm.priorities import rank_of

R = TypeVar("R")


class Aside(Generic[R]):
    """Calls for jobs, one after another on a thread that is there while there are any; at most `limit` ahead of one.

    They go by priority and age, as whatever waits for the model does.

    One thread: most of what is done here is compiled code that lets go of the interpreter, and two of it would
    take the cores that the models' steps run on. All methods are for the engine's thread. A call cannot be
    broken off, but whoever is cancelled meanwhile is gone at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: dict[Job, None] = {}
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, Job, Callable[[], R]]] = []  # by rank
        self._done: deque[tuple[Job, R | BaseException]] = deque()
        self._runs = False

    def put(self, job: Job, call: Callable[[], R]) -> None:
        """Has `call` done for a job, then wakes the job's engine. Raises Overloaded beyond the limit."""
        rank = rank_of(time.monotonic(), job.work.priority)
        with self._lock:
            place = bisect_right(self._waiting, rank, key=itemgetter(0))
            if len(self._jobs) - len(self._waiting) + place >= self._limit:
                raise Overloaded(f"{self._limit} requests are being prepared", 0.5)
            self._waiting.insert(place, (rank, job, call))
            self._jobs[job] = None
            start, self._runs = not self._runs, True
        if start:
            threading.Thread(target=self._run, name="flink-llm aside", daemon=True).start()

    def take(self) -> list[tuple[Job, R | BaseException]]:
        """What has been done since the last time: each job with what its call returned or raised.

        Whose client has gone is let go of and not among them.
        """
        if not self._jobs:
            return []
        gone = {job for job in self._jobs if job.cancelled}
        for job in gone:
            del self._jobs[job]
            job.leave()
        if gone:
            with self._lock:
                self._waiting = [each for each in self._waiting if each[1] not in gone]
        taken = []
        while self._done:
            job, made = self._done.popleft()
            if job in self._jobs:
                del self._jobs[job]
                taken.append((job, made))
        return taken

    def drop(self) -> list[Job]:
        """Forgets all jobs, and tells which they were."""
        with self._lock:
            self._waiting.clear()
        jobs, self._jobs = self._jobs, {}
        return list(jobs)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._runs = False
                    return
                _, job, call = self._waiting.pop(0)
            try:
                made: R | BaseException = call()
            except BaseException as error:  # a panic of compiled code is no Exception
                made = error
            self._done.append((job, made))
            job.wake()
