"""What waits for a feature read, and the thread that reads."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from typing import Any

from flink_llm.errors import Outage, RecordError
from flink_llm.feature_keys import Key, StoredRow

Waiter = asyncio.Future[StoredRow]
Waiters = dict[Key, list[Waiter]]
Batch = list[tuple[str, Waiters]]


class Waiting:
    """What waits for the next read: view → key → those who wait for it."""

    def __init__(self) -> None:
        self._views: dict[str, dict[Key, list[Waiter]]] = {}

    def add(self, view: str, key: Key, waiter: Waiter) -> None:
        self._views.setdefault(view, {}).setdefault(key, []).append(waiter)

    def take(self, limit: int) -> Batch:
        """Up to `limit` keys of each view, oldest first; keys that nobody waits for any more are dropped."""
        batch: Batch = []
        for view, keys in list(self._views.items()):
            taken: dict[Key, list[Waiter]] = {}
            while keys and len(taken) < limit:
                key = next(iter(keys))
                waiters = [waiter for waiter in keys.pop(key) if not waiter.done()]
                if waiters:
                    taken[key] = waiters
            if not keys:
                del self._views[view]
            if taken:
                batch.append((view, taken))
        return batch


class ReaderThread:
    """One daemon thread that works off calls in order. Cancelled calls are passed over."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[ThreadFuture[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="flink-llm features", daemon=True)

    def submit(self, call: Callable[[], Any]) -> ThreadFuture[Any]:
        if self._thread.ident is None:
            self._thread.start()
        future: ThreadFuture[Any] = ThreadFuture()
        self._calls.put((future, call))
        return future

    def stop(self) -> None:
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


def answer(waiters: list[Waiter], row: StoredRow | RecordError | Outage) -> None:
    """Gives each waiter the row, or an error of its own: an exception raised twice collects tracebacks."""
    for waiter in waiters:
        if waiter.done():
            continue
        if isinstance(row, RecordError):
            waiter.set_exception(RecordError(row.code, row.message))
        elif isinstance(row, Outage):
            waiter.set_exception(Outage(str(row)))
        else:
            waiter.set_result(row)


def cancel(batch: Batch) -> None:
    """Cancels whoever still waits."""
    for waiter in (waiter for _, keys in batch for waiters in keys.values() for waiter in waiters):
        waiter.cancel()
