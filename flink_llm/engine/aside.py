"""What takes long is done beside the engine's thread, whose steps everybody's tokens wait for."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from flink_llm.engine.job import Job
from flink_llm.errors import Overloaded

R = TypeVar("R")


class Aside(Generic[R]):
    """Calls for jobs, one after another on a thread that is there while there are any; at most `limit` of them.

    One thread: most of what is done here is compiled code that lets go of the interpreter, and two of it would
    take the cores that the models' steps run on. All methods are for the engine's thread. A call cannot be
    broken off, but whoever is cancelled meanwhile is gone at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: dict[Job, None] = {}
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Job, Callable[[], R]]] = deque()
        self._done: deque[tuple[Job, R | BaseException]] = deque()
        self._runs = False

    def put(self, job: Job, call: Callable[[], R]) -> None:
        """Has `call` done for a job, then wakes the job's engine. Raises Overloaded beyond the limit."""
        if len(self._jobs) >= self._limit:
            raise Overloaded(f"{self._limit} requests are being prepared", 0.5)
        self._jobs[job] = None
        with self._lock:
            self._waiting.append((job, call))
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
                self._waiting = deque(each for each in self._waiting if each[0] not in gone)
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
                job, call = self._waiting.popleft()
            try:
                made: R | BaseException = call()
            except BaseException as error:  # a panic of compiled code is no Exception
                made = error
            self._done.append((job, made))
            job.wake()
