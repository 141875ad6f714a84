"""Which slot of the cache a request gets, and how much of its prompt some slot holds already.

A slot keeps what it holds when its request ends, until another needs it: the next turn of a session, or
another request with the same system prompt, begins where that ends (prefix reuse; SGLang's RadixAttention
and vLLM's automatic prefix caching are the same idea over blocks). Decisions only: the decoder copies.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SHARED_LEAST = 16
"""Tokens below which a shared beginning is not worth looking at."""
OWN_SHARE = 0.75
"""A free slot of which so much would be used is taken as it is; of another the beginning is copied."""


class Placement(NamedTuple):
    """A slot whose first `shared` tokens are the prompt's, once those of `source` are copied into it."""

    slot: int
    shared: int
    source: int


@dataclass
class _Slot:
    held: list[int] = field(default_factory=list)
    key: str = ""
    busy: bool = False
    used: int = 0


class Slots:
    """`count` slots. `copies` says that what one holds can be copied to another.

    Busy slots are kept close together, since a step runs over all rows from the first to the last of them.
    A prompt has a `key`, what besides its tokens decides what is held: nothing is shared across keys.
    """

    def __init__(self, count: int, *, copies: bool = True) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._copies = copies
        self._busy: set[int] = set()
        self._turn = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._slots)

    @property
    def free(self) -> int:
        """How many slots no request has."""
        return len(self._slots) - len(self._busy)

    def held(self, slot: int) -> Sequence[int]:
        """The tokens in a slot."""
        return self._slots[slot].held

    def tokens(self, busy: bool) -> int:
        """How many tokens the busy slots hold, or the free ones."""
        return sum(len(slot.held) for slot in self._slots if slot.busy == busy)

    def take(self, prompt: Sequence[int], key: str = "") -> Placement:
        """A slot for a prompt. At least the prompt's last token is left to be read. Raises IndexError when full."""
        source, shared = self._longest(prompt, key)
        whole = not self._slots[source].busy and shared >= OWN_SHARE * len(self._slots[source].held)
        if shared < SHARED_LEAST:
            slot, shared = self._best(), 0
        elif whole or (not self._copies and not self._slots[source].busy):
            slot = source
        elif self._copies:
            slot = self._best(but=source)
        else:
            slot, shared = self._best(), 0
        found = self._slots[slot]
        found.held, found.key = list(prompt[:shared]), key
        found.busy = True
        self._busy.add(slot)
        return Placement(slot, shared, source if shared else slot)

    def gap(self, used: Collection[int], most: int) -> tuple[int, int] | None:
        """One of the slots `used` that is apart from most of them, and another between these; None where there is
        none, or where one holds more than `most`.

        Which of them: those that hold least.
        """
        count = len(used)
        if not self._copies or not count or max(used) - min(used) < count:
            return None
        windows = [range(first, first + count) for first in range(len(self._slots) - count + 1)]
        window = max(windows, key=lambda window: sum(number in used for number in window))
        apart = [number for number in used if number not in window]
        return self._pair(apart, [number for number in window if number not in used], most)

    def beside(self, used: Collection[int], slot: int, most: int) -> tuple[int, int] | None:
        """A slot, and the one before or behind those that are `used` that it is to change places with.

        None where it is there, or where one holds more than `most`.
        """
        edges = [number for number in (min(used) - 1, max(used) + 1) if 0 <= number < len(self._slots)] if used else []
        return self._pair([slot], edges, most) if self._copies and edges and slot not in edges else None

    def _pair(self, some: Collection[int], others: Collection[int], most: int) -> tuple[int, int] | None:
        one, other = (min(each, key=lambda number: len(self._slots[number].held)) for each in (some, others))
        return (one, other) if max(len(self._slots[one].held), len(self._slots[other].held)) <= most else None

    def swap(self, one: int, other: int) -> None:
        """What is said of one slot holds of the other from now on."""
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]
        self._busy = {number for number, slot in enumerate(self._slots) if slot.busy}

    def add(self, slot: int, tokens: Sequence[int]) -> None:
        """These tokens were read into the slot."""
        self._slots[slot].held += tokens

    def release(self, slot: int, *, keep: bool = True) -> None:
        """The slot's request has ended; what it holds stays, unless it is not to be kept."""
        self._turn += 1
        found = self._slots[slot]
        found.busy, found.used = False, self._turn
        self._busy.discard(slot)
        if not keep:
            found.held = []

    def _longest(self, prompt: Sequence[int], key: str) -> tuple[int, int]:
        """The slot that holds the longest beginning of the prompt, a free one before a busy one."""
        best, longest = 0, -1
        for number, slot in enumerate(self._slots):
            shared = min(_shared(slot.held, prompt), len(prompt) - 1) if slot.key == key else 0
            if (shared, not slot.busy) > (longest, longest >= 0 and not self._slots[best].busy):
                best, longest = number, shared
        return best, longest

    def _best(self, but: int = -1) -> int:
        """The free slot that stretches the busy ones least, the one longest unused among those alike."""
        free = [number for number, slot in enumerate(self._slots) if not slot.busy]
        others = [number for number in free if number != but] or free
        if not others:
            raise IndexError("no slot is free")
        first, last = min(self._busy, default=0), max(self._busy, default=-1)
        return min(
            others,
            key=lambda number: (
                max(first - number, number - last, 0) if self._busy else 0,
                self._slots[number].used,
                number,
            ),
        )


def _shared(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many first tokens are the same."""
    low, high = 0, min(len(held), len(prompt))
    if not high or held[0] != prompt[0]:
        return 0
    while low < high:  # slices compare fast, tokens one by one do not
        middle = (low + high + 1) // 2
        if held[low:middle] == prompt[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
