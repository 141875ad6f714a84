"""Who runs next, and who is refused: pure decisions over requests and slots, on a clock that is handed in.

A request waits in its lane (priority 0 to 9), is given a free slot with what some slot holds of its prompt
already, is prefilled in chunks that alternate with everybody's decode steps, then decodes until it ends. No
tensor and no thread here.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

from flink_llm.engine.pace import Pace
from flink_llm.engine.slots import Slots
from flink_llm.engine.tempo import UNKNOWN, Tempo
from flink_llm.priorities import rank_of

T = TypeVar("T")
_RANK = attrgetter("rank")
HOLD_S = 0.5
"""How long, in all, a reply that has begun may stand still while others' prompts are read in one go."""
HOLD_SHARE = 3
"""Replies that may stand still so for each prompt that is being read."""
DELAY_LEAST, DELAY_MOST = 0.2, 0.4
"""How much longer a reply may take, in all, for the prompts of others: for one that comes alone, and once as many more
wait, to be read or for a slot, as there are slots; evenly between.

A prompt that comes alone is read a little later; of a burst everybody is done later where its prompts wait, since a
step of a few rows takes little less than one of all."""
DELAY_OLD, DELAY_OLD_S = 6.0, 10.0
"""How much longer still for a prompt that has been being read for so many seconds, by the square of how long: a long
one is not to wait for ever behind a long reply."""
FORESEEN = 64
"""Tokens of a reply to come that are counted on, where it may say so many: it may end before."""
SWAP_MOST = 512
"""Tokens up to which what slots hold is moved: others wait meanwhile."""
SWAP_WORTH = 4
"""For a prompt so many tokens are moved for each of its own that is to be read: a tenth of what that takes, or two."""
CHUNK, CHUNK_LEAST = 512, 16
"""Tokens of a prompt that are read at once: while nobody waits for the next token, and at the least."""
STEPS_WAITED, PROMPTS_MOST = 1.25, 3
"""How many of their own steps others wait while a chunk is read, for each prompt that is to be read, up to so many.

A run takes long by itself: of many prompts everybody is through earlier by longer chunks. A chunk has `CHUNK_LEAST`
tokens whatever they take; a prompt's last ones are read with it where they take less than half a run by itself."""


@dataclass(eq=False)
class Entry(Generic[T]):
    """One request. Of its `prompt` `filled` tokens are in the cache; `slot` None while it waits, given at `began`.

    The first `shared` of them were there before. `key`: see `Slots`. The reply has
    `said` tokens of at most `limit`, and has waited for others' prompts for `delayed` seconds.
    """

    item: T
    prompt: Sequence[int]
    rank: tuple[float, int]
    key: str = ""
    filled: int = 0
    slot: int | None = None
    shared: int = 0
    began: float = 0.0
    limit: int = FORESEEN
    said: int = 0
    delayed: float = 0.0
    gone: bool = False

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.prompt) - self.filled

    def may_wait(self, step_s: float, share: float) -> float:
        """Seconds of `share` of its reply, at so long a step, for which that may still wait for others' prompts."""
        to_come = min(FORESEEN, max(0, self.limit - self.said))
        return share * step_s * (self.said + to_come) - self.delayed


@dataclass(eq=False)
class Plan(Generic[T]):
    """One step: from which slot to which how many tokens are copied; pairs of slots that change places, and how many
    tokens they hold at the most, in this order; then one run over prompts, and everybody who decodes.

    The run reads a chunk of one prompt, or the whole prompts of it and of those `beside` it, in neighbouring slots.
    With `mixed` it is to be that of those who decode too.
    """

    copies: list[tuple[int, int, int]] = field(default_factory=list)
    swaps: list[tuple[int, int, int]] = field(default_factory=list)
    prefill: tuple[Entry[T], int, int] | None = None
    beside: list[Entry[T]] = field(default_factory=list)
    mixed: bool = False
    decode: list[Entry[T]] = field(default_factory=list)

    @property
    def reads(self) -> list[Entry[T]]:
        """Whose prompts its run reads. Where others decode, those that it reads to their end do so with them."""
        return [] if self.prefill is None else [self.prefill[0], *self.beside]

    @property
    def tokens(self) -> int:
        """Of prompts that its run reads, padding included."""
        if self.prefill is None:
            return 0
        count = self.prefill[2]
        return max([count, *(entry.left for entry in self.beside)]) * (1 + len(self.beside))


class Scheduler(Generic[T]):
    """Slots 0 to `slots` - 1, a queue of at most `limit` ahead of whoever comes; `copies` says that a slot can be
    copied to another, `together` that prompts can be read in one run, `mixes` that a prompt can be read in the run of
    a step.

    Both who is given a slot and who is prefilled is decided by rank: arrival, later by `AGEING_S` for each
    step of priority. It never changes, so whoever comes more than that later is behind. `clock` gives
    seconds; how long slots are held tells how long whoever comes next will wait for one.
    """

    def __init__(
        self,
        slots: int,
        limit: int,
        *,
        copies: bool = True,
        together: bool = True,
        mixes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = Slots(slots, copies=copies)
        self._limit = limit
        self._together = together
        self._mixes = mixes
        self._arrivals = 0
        self._queue: list[Entry[T]] = []  # by rank
        self._clock = clock
        self._pace = Pace(slots)
        self._running: list[Entry[T]] = []
        self._decoding: list[Entry[T]] = []

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    @property
    def decoding(self) -> int:
        """Requests that decoded when the latest plan was made."""
        return len(self._decoding)

    def held(self, busy: bool) -> int:
        """Tokens in slots that are busy, or in those that are free and kept for reuse. May be asked by any thread."""
        return self._slots.tokens(busy)

    def add(
        self,
        item: T,
        prompt: Sequence[int],
        *,
        priority: int,
        now: float,
        left: float | None = None,
        key: str = "",
        tokens: int = FORESEEN,
    ) -> Entry[T]:
        """Queues a request that arrived at `now` and has `left` seconds, None for ever; what is shared has its `key`.

        Its reply has `tokens` at most.

        Raises Overloaded, with a time to come again, when `limit` wait ahead of it, or when its wait for a slot
        is known to be longer than what is left. While a slot is free nobody is refused, nor for those behind.
        """
        rank = (rank_of(now, priority), self._arrivals + 1)
        ahead = bisect_left(self._queue, rank, key=_RANK)
        free = self._slots.free
        self._pace.admit(ahead + 1 - free, left, full=ahead - free >= self._limit)
        self._arrivals += 1
        entry = Entry(item, prompt, rank, key, limit=tokens)
        self._queue.insert(ahead, entry)
        return entry

    def remove(self, entry: Entry[T], *, keep: bool = True) -> None:
        """Ends a request, wherever it is; its slot is free at once. Twice does no harm.

        What its slot holds may be another's beginning, unless it is not to be kept.
        """
        if entry.gone:
            return
        entry.gone = True
        if entry.slot is None:
            del self._queue[bisect_left(self._queue, entry.rank, key=_RANK)]
        else:
            self._pace.took(self._clock() - entry.began)
            self._running.remove(entry)
            self._slots.release(entry.slot, keep=keep)

    def plan(self, most: int = CHUNK, tempo: Tempo = UNKNOWN) -> Plan[T]:
        """What to do in the next step, `most` tokens of a prompt where nobody waits for them.

        No prompt is read where that would delay a reply by more than a share of its own time (`DELAY_LEAST` to
        `DELAY_MOST`, and what `DELAY_OLD` adds), as far as `tempo` tells. The caller runs the plan, then says `waited`
        and `advance` of all that it prefilled, and `decoded` of each token.
        """
        plan: Plan[T] = Plan(self._admit(), self._close_up())
        decoding = self._decoding = [entry for entry in self._running if not entry.left]
        filling = [entry for entry in self._running if entry.left]
        if not filling:
            plan.decode = decoding
            return plan
        share = self._share(filling)
        spare = min((entry.may_wait(tempo.step_s, share) for entry in decoding), default=0.0)
        hold = self._hold(decoding, len(filling))
        for held in (True, False) if hold else (False,):
            plan.decode = [] if held else decoding
            plan.mixed = bool(self._mixes and plan.decode)
            at = tempo.mixed if plan.mixed else tempo
            self._read(plan, filling, most, at)
            if held and self._mixes and not plan.beside:
                continue  # it can be read in the runs of their steps
            if not (plan.prefill and decoding and tempo.known) or at.reading(plan.tokens) <= spare:
                return plan
        plan.prefill, plan.beside = None, []
        return plan

    def _share(self, filling: list[Entry[T]]) -> float:
        """Of its own time, how much longer a reply may take for these prompts."""
        others = len(self._queue) + len(filling) - 1
        age = self._clock() - min(entry.began for entry in filling)
        share = DELAY_LEAST + (DELAY_MOST - DELAY_LEAST) * min(1.0, others / self._slots.count)
        return share + DELAY_OLD * min(1.0, age / DELAY_OLD_S) ** 2

    def _read(self, plan: Plan[T], filling: list[Entry[T]], most: int, tempo: Tempo) -> None:
        first = min(filling, key=lambda entry: entry.rank)
        if plan.decode and tempo.known:
            prompts = min(len(filling), PROMPTS_MOST)
            chunk = tempo.tokens_in(STEPS_WAITED * prompts * tempo.step_s)
            most = min(most, max(CHUNK_LEAST, chunk))
        count = first.left if first.left <= most + tempo.worth_a_run // 2 else most  # the rest is not worth a run
        plan.prefill = (first, first.filled, count)
        plan.beside = []
        if self._together and not plan.mixed and not first.filled and first.left < most:
            plan.beside = _beside(first, filling, most, max(CHUNK_LEAST, tempo.worth_a_run))

    def _close_up(self) -> list[tuple[int, int, int]]:
        """Has those who decode lie side by side, and whose prompt is read next at one of their ends.

        A step runs over all rows from the first to the last of them, and no prompt between them can be read in its run.
        One moves for about each request that begins or ends, which takes a small part of what reading its prompt did.
        What lies where it goes may be another's beginning, or a prompt that is half read: they change places.
        """
        swaps = []
        used = {entry.slot for entry in self._running if entry.slot is not None and not entry.left}
        found = self._slots.gap(used, SWAP_MOST)
        if found is not None:
            swaps.append(self._swap(*found))
            used = used - {found[0]} | {found[1]}
        filling = [entry for entry in self._running if entry.left]
        if self._mixes and used and filling and (first := min(filling, key=_RANK)).slot is not None:
            found = self._slots.beside(used, first.slot, min(SWAP_MOST, SWAP_WORTH * first.left))
            if found is not None:
                swaps.append(self._swap(*found))
        return swaps

    def _swap(self, one: int, other: int) -> tuple[int, int, int]:
        self._slots.swap(one, other)
        places = {one: other, other: one}
        for entry in self._running:
            if entry.slot in places:
                entry.slot = places[entry.slot]
        return one, other, max(len(self._slots.held(slot)) for slot in places)

    def _hold(self, decoding: list[Entry[T]], filling: int) -> bool:
        """Whether those who decode stand still for prompts of a burst.

        A step of a few costs little less than one of all, and short chunks of prompts cost more than long
        ones: a burst is through earlier if its first replies wait for the others' prompts. Where one can be read in the
        runs of their steps, they wait for several that are read together.
        """
        few = 0 < len(decoding) <= HOLD_SHARE * filling
        return few and all(entry.delayed < HOLD_S for entry in decoding)

    def waited(self, seconds: float) -> None:
        """The prompts of the latest plan were read for so long: whoever decodes has waited for them."""
        for entry in self._decoding:
            entry.delayed += seconds

    def advance(self, entry: Entry[T], count: int) -> None:
        """`count` more tokens of the prompt are in the cache."""
        if entry.slot is not None:
            self._slots.add(entry.slot, entry.prompt[entry.filled : entry.filled + count])
        entry.filled += count

    def decoded(self, entry: Entry[T], token: int) -> None:
        """A token behind the prompt is in the cache."""
        entry.said += 1
        if entry.slot is not None:
            self._slots.add(entry.slot, [token])

    def _admit(self) -> list[tuple[int, int, int]]:
        """Gives slots to whoever is next; from which slot to which how many tokens are to be copied."""
        copies = []
        while self._slots.free and self._queue:
            best = self._queue.pop(0)
            best.began = self._clock()
            best.slot, best.shared, source = self._slots.take(best.prompt, best.key)
            best.filled = best.shared
            self._running.append(best)
            if best.shared:
                copies.append((source, best.slot, best.shared))
        return copies


def _beside(first: Entry[T], filling: Sequence[Entry[T]], most: int, spread: int) -> list[Entry[T]]:
    """Who can be read in one run with `first`: whole prompts of about its length, in the slots next to it.

    All rows of a run are as long as the longest: so long, they are `most` tokens together. Lengths differ by
    `spread` at the most: reading so many tokens takes about what a run does by itself.
    """
    fresh = {entry.slot: entry for entry in filling if not entry.filled}
    found = [first]
    for step in (1, -1):
        slot = (first.slot or 0) + step
        while (entry := fresh.get(slot)) is not None:
            lengths = [one.left for one in (*found, entry)]
            if max(lengths) - min(lengths) > spread or max(lengths) * len(lengths) > most:
                break
            found.append(entry)
            slot += step
    return found[1:]
