"""Exactly once, and an outage that outlasts the transactions: loud, never silent. ADR 16.

Flink's Kafka sink logs that a transaction can no longer be committed, and goes on: what was in it is lost.
A transaction that the broker has dropped is one older than its timeout. So nothing may be committed that is
older: checkpoints that fail restart the job within the timeout, and a restored checkpoint that is older is
refused. For the latter, shards write down that they are alive, now and then, in the state itself.
"""

from collections.abc import Callable

from flink_llm.errors import ConfigError, StateError

PARAMETER = "flink_llm.transaction_timeout_ms"
"""The job parameter by which a transactional sink tells the operators."""
BEATS = 20
"""How often in a transaction's time a shard says that it is alive: a checkpoint seems older by one such beat."""
SHORTEST_MS = 1_000
"""A checkpoint that may last less than this fails on any machine."""


def checkpoint_timeout_ms(transaction_timeout_ms: int, interval_ms: int, tolerable: int, chosen_ms: int | None) -> int:
    """How long a checkpoint may last so that its transactions are committed in time, if at all.

    As many as are `tolerable` may fail in a row before the job restarts, each `interval_ms` after the last
    one, and the next one commits what they held. `chosen_ms` is somebody's own choice. Raises ConfigError
    where it, or any, is too long for the transactions.
    """
    longest = transaction_timeout_ms // (tolerable + 1) - interval_ms
    if longest < SHORTEST_MS or (chosen_ms is not None and chosen_ms > longest):
        timeout = SHORTEST_MS if chosen_ms is None else chosen_ms
        raise ConfigError(
            f"kafka.transaction_timeout_ms is {transaction_timeout_ms}, and {tolerable} failed checkpoints that are "
            f"tolerated, of {timeout} ms and {interval_ms} ms apart, may last "
            f"{(tolerable + 1) * (timeout + interval_ms)}: raise it, or lower execution.checkpointing.timeout or "
            f"execution.checkpointing.tolerable-failed-checkpoints"
        )
    return longest if chosen_ms is None else chosen_ms


class AliveWatch:
    """Looks after one operator's restored shards. Times are epoch milliseconds.

    `submitted_ms` is when the job was submitted. A state from before was named by whoever submitted it; where
    that was a savepoint (`of_savepoint`), its transactions were committed when it was taken, however long ago.
    """

    def __init__(
        self, transaction_timeout_ms: int, *, submitted_ms: int, of_savepoint: bool, clock: Callable[[], int]
    ) -> None:
        self.beat_ms = max(1, transaction_timeout_ms // BEATS)
        self._timeout_ms = transaction_timeout_ms
        self._submitted_ms = submitted_ms
        self._of_savepoint = of_savepoint
        self._clock = clock

    def check(self, alive_ms: int | None) -> None:
        """A shard was restored that was last alive at `alive_ms`. Raises StateError when that is too long ago."""
        if alive_ms is None or (self._of_savepoint and alive_ms < self._submitted_ms):
            return
        age_ms = self._clock() - alive_ms
        if age_ms > self._timeout_ms:
            raise StateError(
                f"the checkpoint is {age_ms / 1000:.0f} s old, longer than kafka.transaction_timeout_ms="
                f"{self._timeout_ms}: the broker has dropped what was not committed, so results may be missing. "
                f"Compare the topics, then submit the job from this checkpoint with kafka.resume_after_timeout: true"
            )
