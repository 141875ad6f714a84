"""How long a call waits before it is tried again.

Waits double, and each is drawn: calls that failed together must not come back together.
"""

import math
import random
from collections.abc import Callable, Iterator

from flink_llm.errors import CircuitOpen, Outage, Overloaded, RecordError, Retriable

BACKOFF_S, BACKOFF_LIMIT_S = 0.1, 5.0
OVERLOADED_S, OVERLOADED_LIMIT_S = 0.01, 1.0
"""Whoever has no room says when to come back: what is added to that is small."""
JITTER = 0.5
drawn = random.Random().uniform
"""A number between two. Not `random.uniform`: a handler that seeds that would have all workers come back in step."""
INFRASTRUCTURE = (Outage, ConnectionError, MemoryError)
"""What is an outage: no fault of the record, whoever raises it."""


def wait_before(
    error: BaseException,
    attempt: int,
    left: float | None = None,
    draw: Callable[[float, float], float] = drawn,
) -> float | None:
    """Seconds before the next try after `attempt` tries that failed, the last of them with `error`.

    Never less than the error's `retry_after`, where it has one. Of what is `left` until the deadline beyond
    that, half is left for the try itself; None when there is too little. `draw` gives a number between two.
    """
    told, first, most = 0.0, BACKOFF_S, BACKOFF_LIMIT_S
    if isinstance(error, (Overloaded, Retriable, CircuitOpen)):
        told = _seconds(error.retry_after)
    if isinstance(error, Overloaded):
        first, most = OVERLOADED_S, OVERLOADED_LIMIT_S
    backoff = min(most, first * 2.0 ** min(max(0, attempt - 1), 10))
    more = draw(0.0, told * JITTER) + draw(backoff * (1 - JITTER), backoff)
    if left is None:
        return told + more
    spare = left - told
    return None if spare <= first else told + min(more, spare / 2)


def _seconds(told: object) -> float:
    """What a handler may have taken from an answer's `Retry-After`: a number, its text, a date or nothing."""
    try:
        seconds = float(told)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def foremost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What stands for the errors of an `asyncio.TaskGroup`.

    The first of those for which a call is tried again, unless another says that the record cannot be answered; the
    group itself where there is more to it.
    """
    errors = list(_leaves(group))
    again = (Overloaded, Retriable, *INFRASTRUCTURE)
    if not all(isinstance(error, (RecordError, *again)) for error in errors):
        return group
    return next((error for error in errors if not isinstance(error, again)), errors[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error
