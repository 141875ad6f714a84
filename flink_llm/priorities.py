"""What a priority is worth: the order in which a host serves what waits, and an operator counts who is ahead."""

AGEING_S = 2.0
"""Waiting for so long counts as one step of priority, so that no lane starves."""
LANES = 10


def lane_of(priority: int) -> int:
    """The lane of a priority, 0 (first) to 9."""
    return max(0, min(priority, LANES - 1))


def rank_of(at: float, priority: int) -> float:
    """Whoever has less goes first: its arrival at `at`, later by `AGEING_S` for each step of priority."""
    return at + lane_of(priority) * AGEING_S
