"""Tasks that a handler's call started and left behind.

Nobody waits for them: they go on after their record's outcome, across checkpoints, and are lost at a crash.
"""

import asyncio
import logging
from collections.abc import Coroutine, Generator
from typing import Any

from flink_llm.engine.generation import CallInfo, current_call
from flink_llm.handler import Metrics

log = logging.getLogger(__name__)
_OURS = "flink_llm."


class Leaks:
    """Counts them as `leaked_tasks` and tells of the first. `watch` once, `look` whenever a call has ended."""

    def __init__(self, handler: str, metrics: Metrics) -> None:
        self._handler = handler
        self._metrics = metrics
        self._told = False

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on the tasks that a call starts on this loop are noted in its `CallInfo`."""
        loop.set_task_factory(_noted)

    def look(self, info: CallInfo) -> None:
        """Those of a call that has ended. One that was cancelled is on its way out."""
        left = [task for task in info.tasks if not task.done() and not task.cancelling()]
        info.tasks.clear()
        if not left:
            return
        self._metrics.add("leaked_tasks", len(left))
        if not self._told:
            self._told = True
            log.warning(
                "%s.call has ended and left %d of its tasks running (%s): await them, or cancel them; "
                "they are lost at a crash. Further ones are counted as leaked_tasks",
                self._handler, len(left), left[0].get_coro(),
            )  # fmt: skip


def _noted(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any], **options: Any
) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
    info = current_call.get(None)
    if info is not None and not _is_ours(coro):
        info.tasks.add(task)
        task.add_done_callback(info.tasks.discard)  # a call, and what it left behind, may start any number
    return task


def _is_ours(coro: Any) -> bool:
    """The library's own, which serve many calls: a connection's, a batch's."""
    frame = getattr(coro, "cr_frame", None)
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_OURS)
