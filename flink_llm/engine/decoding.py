"""A decoder at work: prompts and tokens of many generations, step by step."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.aside import Aside
from flink_llm.engine.decoder import Decoder
from flink_llm.engine.job import Job, Said
from flink_llm.engine.lookup import CERTAIN, Costs, Lookup, Payoff
from flink_llm.engine.metrics import ModelMetrics
from flink_llm.engine.model import ModelFolder
from flink_llm.engine.preparing import Prepared, Preparing
from flink_llm.engine.sampling import sample
from flink_llm.engine.scheduler import Entry, Scheduler
from flink_llm.engine.sequence import Sequence
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.tempo import TempoMeter
from flink_llm.errors import RecordError

Chunk = tuple[Entry["_Generation"], int, int]
"""Whose prompt, from which position, how many tokens."""


@dataclass(eq=False)
class _Generation:
    job: Job
    sequence: Sequence
    lookup: Lookup | None = None
    payoff: Payoff = field(default_factory=Payoff)


class Decoding:
    """A `ServedModel` over a decoder."""

    def __init__(self, folder: ModelFolder, settings: HostSettings, device: str, metrics: ModelMetrics) -> None:
        manifest = folder.manifest
        self.name = manifest.name
        self.metrics = metrics
        self._preparing = Preparing(folder)
        self._aside: Aside[Prepared] = Aside(settings.queue)
        self._context = manifest.context_length
        self._decoder = Decoder(
            folder, device=device, threads=settings.threads, slots=settings.slots, mixed_mb=settings.mixed_mb
        )
        self._decoder.warm_up()
        self._settings = settings
        self._scheduler = self._new_scheduler()
        self._meter = TempoMeter()
        self._costs = Costs()
        self._entries: dict[int, Entry[_Generation]] = {}
        self._due: list[Entry[_Generation]] = []
        metrics.watch_cache(settings.slots, self._context, self._held)

    def _held(self, busy: bool) -> int:
        """Of whichever scheduler there is: `drop` makes another."""
        return self._scheduler.held(busy)

    def _new_scheduler(self) -> Scheduler[_Generation]:
        able = self._decoder
        slots, queue = self._settings.slots, self._settings.queue
        return Scheduler(slots, queue, copies=able.copies, together=able.together, mixes=able.mixes)

    def add(self, job: Job) -> None:
        """See `ServedModel.add`. Raises RecordError, Overloaded, and what a tokenizer or a template raise."""
        work = job.work
        self._preparing.check(work)
        if self._preparing.takes_long(work):
            self._aside.put(job, lambda: self._preparing.prepare(work))
        else:
            self._enqueue(job, self._preparing.prepare(work))

    def _enqueue(self, job: Job, made: Prepared) -> None:
        tokenizer, ends = self._preparing.tokenizer, self._preparing.ends
        work = job.work
        sequence = Sequence(made.prompt, work.options, job.generation, tokenizer, ends, made.grammar, work.told_every)
        sequence.arrived = job.metrics.arrived
        entry = self._scheduler.add(
            _Generation(job, sequence),
            made.prompt,
            priority=work.priority,
            now=job.metrics.arrived,
            left=job.left(),
            key=work.adapter,
            tokens=work.options.max_tokens,
        )
        self._entries[id(entry)] = entry

    def step(self, said: Said) -> bool:
        """See `ServedModel.step`."""
        self._take_prepared(said)
        for entry in [entry for entry in self._entries.values() if entry.item.job.cancelled]:
            entry.item.job.leave()
            self._leave(entry)
        if self._due:  # first tokens have been told before: nobody waits for another's step
            self._go_on(said)
            return True
        plan = self._scheduler.plan(tempo=self._meter.tempo)
        for copy in plan.copies:
            self._decoder.copy(*copy)
        for swap in plan.swaps:
            self._decoder.swap(*swap)
        if plan.mixed and plan.prefill is not None:
            self._due = plan.decode
            self._go_on(said, plan.prefill)
            return True
        if plan.prefill is not None:
            began = time.monotonic()
            if plan.beside:
                self._prefill_together(plan.reads, said)
            else:
                self._prefill(*plan.prefill, said)
            self._scheduler.waited(time.monotonic() - began)
        if plan.decode:
            self._due = [*plan.decode, *(entry for entry in plan.reads if not entry.left)]
            if not said:
                self._go_on(said)
        return bool(plan.prefill or plan.decode)

    def _take_prepared(self, said: Said) -> None:
        for job, made in self._aside.take():
            try:
                if isinstance(made, BaseException):
                    raise made
                self._enqueue(job, made)
            except BaseException as error:  # a panic of llguidance is no Exception
                job.fail(error, said)

    def drop(self) -> list[Job]:
        """See `ServedModel.drop`."""
        entries, self._entries = self._entries, {}
        self._due = []
        self._scheduler = self._new_scheduler()
        return [*self._aside.drop(), *(entry.item.job for entry in entries.values())]

    def _prefill(self, entry: Entry[_Generation], start: int, count: int, said: Said, *, guessing: bool = True) -> None:
        began = time.monotonic()
        if start == entry.shared:
            self._begin(entry, began)
        guess = self._guess_beyond(entry) if guessing and start + count == len(entry.prompt) else []
        tokens = [*entry.prompt[start : start + count], *guess]
        try:
            logits = self._decoder.read(_slot(entry), tokens, start, count - 1)
        except Exception as error:  # its prompt's, whatever it is: the others go on
            if guess:  # perhaps it was too long with that
                return self._prefill(entry, start, count, said, guessing=False)
            return self._fail(entry, error, said)
        self._meter.read(len(tokens), time.monotonic() - began, start)
        if not guess:
            return self._have_read(entry, count, logits[0], said)
        self._scheduler.advance(entry, count)
        entry.item.job.metrics.read(count)
        cost = self._costs.tokens(1, self._meter.tempo.token_s * len(guess))
        self._accept(entry, logits, guess, cost, said)

    def _begin(self, entry: Entry[_Generation], at: float) -> None:
        entry.item.sequence.began = at
        entry.item.job.metrics.began(at, reused=entry.shared)
        self._decoder.adapt(_slot(entry), entry.key)

    def _prefill_together(self, entries: list[Entry[_Generation]], said: Said) -> None:
        entries = sorted(entries, key=_slot)
        began = time.monotonic()
        for entry in entries:
            self._begin(entry, began)
        try:
            logits = self._decoder.read_together(_slot(entries[0]), [entry.prompt for entry in entries])
        except Exception:  # one by one shows whose fault it was
            for entry in entries:
                self._prefill(entry, 0, entry.left, said)
            return
        self._meter.read(len(entries) * max(entry.left for entry in entries), time.monotonic() - began)
        for entry, row in zip(entries, logits, strict=True):
            self._have_read(entry, entry.left, row, said)

    def _have_read(self, entry: Entry[_Generation], count: int, logits: NDArray[np.floating[Any]], said: Said) -> None:
        self._scheduler.advance(entry, count)
        entry.item.job.metrics.read(count)
        if not entry.left:
            self._next(entry, logits, said)

    def _go_on(self, said: Said, chunk: Chunk | None = None) -> None:
        """The next token of everybody who is due, and the next few of those whose text can be guessed.

        `chunk` of a prompt is read in the run of those tokens, or by itself where there are none.
        """
        entries, self._due = [entry for entry in self._due if not entry.gone], []
        plain = []
        for entry in entries:
            guess = self._guess(entry, len(entries))
            if guess:
                self._verify(entry, guess, len(entries), said)
            else:
                plain.append(entry)
        if chunk is not None and plain and self._decode_beside(plain, chunk, said):
            return
        if chunk is not None:
            began = time.monotonic()
            self._prefill(*chunk, said)
            self._scheduler.waited(time.monotonic() - began)
        if plain:
            self._decode(plain, said)

    def _decode_beside(self, entries: list[Entry[_Generation]], chunk: Chunk, said: Said) -> bool:
        """The next tokens and a chunk of a prompt in one run; False where that has to be done in two."""
        entry, start, count = chunk
        slots = [_slot(each) for each in entries]
        last = [each.item.sequence.last for each in entries]
        began = time.monotonic()
        if not self._decoder.fits_beside(slots, _slot(entry)):
            return False
        if start == entry.shared:
            self._begin(entry, began)
        try:
            read, logits = self._decoder.step_beside(
                slots, last, _slot(entry), entry.prompt[start : start + count], start
            )
        except Exception:  # one by one shows whose fault it was
            return False
        self._scheduler.waited(self._meter.mixed(count, time.monotonic() - began))
        self._have_decoded(entries, slots, last, logits, said)
        self._have_read(entry, count, read, said)
        return True

    def _guess(self, entry: Entry[_Generation], size: int) -> list[int]:
        if not self._settings.speculation or not self._costs.allow_any(size):
            return []
        lookup, room = self._lookup(entry), self._room(entry)
        if room <= 0 or not entry.item.payoff.worth_it():
            return []
        guess = lookup.guess(room)
        return guess if self._costs.allow(size, len(guess)) else []

    def _guess_beyond(self, entry: Entry[_Generation]) -> list[int]:
        """What a reply may begin with, to be read with the last of its prompt: of a question that was asked before."""
        tempo, room = self._meter.tempo, self._room(entry)
        if not self._settings.speculation or self._scheduler.decoding or room <= 0 or tempo.step_s <= tempo.token_s:
            return []
        return self._lookup(entry).guess(room, CERTAIN)

    def _lookup(self, entry: Entry[_Generation]) -> Lookup:
        one = entry.item
        if one.lookup is None:
            one.lookup = Lookup([*one.sequence.prompt, *one.sequence.tokens], self._preparing.ends)
        return one.lookup

    def _room(self, entry: Entry[_Generation]) -> int:
        """Tokens of a guess at most: the run that reads them yields one more."""
        sequence = entry.item.sequence
        return min(sequence.options.max_tokens, self._context - len(sequence.prompt)) - sequence.count - 1

    def _verify(self, entry: Entry[_Generation], guess: list[int], size: int, said: Said) -> None:
        """Reads a guess in one run, and takes of it what the model would have said one by one."""
        sequence = entry.item.sequence
        start = len(sequence.prompt) + sequence.count - 1
        began = time.monotonic()
        try:
            logits = self._decoder.read(_slot(entry), [sequence.last, *guess], start)
        except Exception as error:
            return self._fail(entry, error, said)
        self.metrics.step(1)
        cost = self._costs.run(size, len(guess), time.monotonic() - began)
        self._scheduler.decoded(entry, sequence.last)
        self._accept(entry, logits, guess, cost, said)

    def _accept(
        self, entry: Entry[_Generation], logits: NDArray[np.floating[Any]], guess: list[int], cost: float, said: Said
    ) -> None:
        """Takes of a guess what is right, and the token behind: from logits [guess + 1, vocabulary]."""
        one, sequence, slot = entry.item, entry.item.sequence, _slot(entry)
        start, count = len(sequence.prompt) + sequence.count, len(logits)
        chosen = sample(logits, [*range(count)], [sequence.options] * count, [0] * count) if sequence.greedy else []
        right = 0
        for number, guessed in enumerate([*guess, None]):
            if chosen:
                self._take(entry, chosen[number], said)
            else:
                self._next(entry, logits[number], said)
            if entry.gone or sequence.last != guessed:
                break
            self._scheduler.decoded(entry, sequence.last)
            right += 1
        self._decoder.cut(slot, start + right)
        one.payoff.record(right, cost)
        self.metrics.guess(right, len(guess) - right)

    def _next(self, entry: Entry[_Generation], logits: NDArray[np.floating[Any]], said: Said) -> None:
        """The next token of one, from its logits [vocabulary]."""
        sequence = entry.item.sequence
        sequence.weigh(logits)
        self._take(entry, sample(logits[None], [0], [sequence.options], [sequence.count])[0], said)

    def _decode(self, entries: list[Entry[_Generation]], said: Said) -> None:
        slots = [_slot(entry) for entry in entries]
        last = [entry.item.sequence.last for entry in entries]
        began = time.monotonic()
        try:
            logits = self._decoder.step(slots, last)
        except Exception as error:
            if len(entries) == 1:
                return self._fail(entries[0], error, said)
            for entry in entries:  # one by one shows whose fault it was
                self._decode([entry], said)
            return
        took = time.monotonic() - began
        self._meter.stepped(took)
        self._costs.step(len(entries), took)
        self._have_decoded(entries, slots, last, logits, said)

    def _have_decoded(
        self,
        entries: list[Entry[_Generation]],
        slots: list[int],
        last: list[int],
        logits: NDArray[np.floating[Any]],
        said: Said,
    ) -> None:
        """`last` was read in these slots: the tokens behind, from their logits [any, vocabulary] by slot."""
        self.metrics.step(len(entries))
        sequences = [entry.item.sequence for entry in entries]
        for entry, slot, token, sequence in zip(entries, slots, last, sequences, strict=True):
            self._scheduler.decoded(entry, token)
            sequence.weigh(logits[slot])
        options = [sequence.options for sequence in sequences]
        tokens = sample(logits, slots, options, [sequence.count for sequence in sequences])
        for entry, chosen in zip(entries, tokens, strict=True):
            self._take(entry, chosen, said)

    def _take(self, entry: Entry[_Generation], token: int | None, said: Said) -> None:
        job, sequence = entry.item.job, entry.item.sequence
        if token is None:
            return self._fail(entry, RecordError("model_error", "the model's logits are not finite"), said)
        try:
            text = sequence.take(token, self._context)
        except BaseException as error:  # a panic of the tokenizer is no Exception
            return self._fail(entry, error, said)
        job.metrics.token(sequence.latest)
        if entry.item.lookup is not None:
            entry.item.lookup.add(sequence.last)
        if text is not None:
            job.say(text, said)
        if sequence.finish is not None:
            job.say(sequence.done(), said)
            self._leave(entry)

    def _fail(self, entry: Entry[_Generation], error: BaseException, said: Said) -> None:
        entry.item.job.fail(error, said)
        self._leave(entry, keep=False)

    def _leave(self, entry: Entry[_Generation], *, keep: bool = True) -> None:
        self._entries.pop(id(entry), None)
        self._scheduler.remove(entry, keep=keep)


def _slot(entry: Entry[_Generation]) -> int:
    if entry.slot is None:
        raise RuntimeError("a generation without a slot is to run: this is a bug")
    return entry.slot
