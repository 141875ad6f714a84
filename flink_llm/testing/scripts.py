"""Models that do what a script says."""

import asyncio
import hashlib
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from flink_llm.engine.faults import fault_of
from flink_llm.engine.protocol import Done, Entity, Event, Fault, Loaded, Submit, Tokens
from flink_llm.errors import ConfigError, Outage

RETRY_AFTER_S = 0.05
"""What an overloaded model asks for."""


class Script(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a scripted model does.

    A decoder says `text` (`{last}` stands for the last message, `{adapter}` for the one that was asked for;
    it has every adapter; `{now}` for the epoch seconds at which its piece is said) in `tokens` pieces: the
    first after `first_ms`, the others `gap_ms` apart; a list
    of `tokens` is what it says instead of `text`, one of `gap_ms` the wait before each but the first.
    `answers` maps words to another text, said where the last message holds them. `delay` "exponential"
    draws `first_ms` from that distribution, decided by the request id. `rate_per_s` bounds how many pieces
    of work the model completes a second. `fault` ends every piece of work with that code instead, of a
    decoder's after `fault_after` tokens; "overloaded", "outage" and "hang" are not codes but what they say.

    An embedding has `dimension` numbers that depend on the text; a classifier gives the label that `answers`
    has for the text 0.9, and finds all `labels` equally likely without one; a token classifier finds the
    words of `entities`, each with its label, wherever they stand; a reranker's score is the share of the
    query's words that a document has. Each refuses what has no text, as a real one does.
    """

    kind: Literal["decoder", "embedding", "classifier", "token_classifier", "reranker"] = "decoder"
    text: str = "{last}"
    tokens: int | list[str] = 1
    first_ms: float = 0.0
    gap_ms: float | list[float] = 0.0
    delay: Literal["fixed", "exponential"] = "fixed"
    rate_per_s: float | None = None
    fault: str | None = None
    fault_after: int = 0
    answers: dict[str, str] = {}
    labels: list[str] = []
    dimension: int = 8
    entities: dict[str, str] = {}


class ScriptedBackend:
    """A backend whose models are scripts, by the last part of the folder they are loaded from.

    Of several scripts of a model each piece of work takes the next, and then the last again and again.
    `started` and `cancelled` count pieces of work.
    """

    def __init__(self, scripts: Mapping[str, Script | Sequence[Script]]) -> None:
        self._scripts = {name: [one] if isinstance(one, Script) else list(one) for name, one in scripts.items()}
        self._turn: dict[str, int] = {}
        self._by_hash: dict[str, str] = {}
        self._free_at: dict[str, float] = {}
        self._playing: set[_Playing] = set()
        self.started = 0
        self.cancelled = 0

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        """See `Backend.load`."""
        loaded, _ = await self.look(folder, sha256)
        self._by_hash[loaded.sha256] = loaded.name
        return loaded

    async def look(self, folder: str, sha256: str | None) -> tuple[Loaded, int]:
        """See `Shelf.look`. A script takes no memory."""
        name = Path(folder).name
        if not self._scripts.get(name):
            raise ConfigError(
                f"no script for the model {name!r}, only for {', '.join(sorted(self._scripts)) or 'none'}"
            )
        script, digest = self._scripts[name][0], hashlib.sha256(name.encode()).hexdigest()
        plain = Loaded(call=0, name=name, sha256=digest, kind=script.kind, context_length=2048, labels=script.labels)
        return plain, 0

    async def unload(self, sha256: str) -> None:
        """See `Shelf.unload`."""
        del self._by_hash[sha256]

    def start(self, work: Submit, generation: str, emit: Callable[[Event], None]) -> Callable[[], None]:
        """See `Backend.start`."""
        self.started += 1
        name = self._by_hash[work.model]
        turn = self._turn[name] = self._turn.get(name, -1) + 1
        script = self._scripts[name][min(turn, len(self._scripts[name]) - 1)]
        now = asyncio.get_running_loop().time()
        began = now + self._delay(script, work)
        if script.rate_per_s is not None:
            began = max(began, self._free_at.get(work.model, 0.0) + 1 / script.rate_per_s)
            self._free_at[work.model] = began
        playing = _Playing(name, _timeline(script, work, generation, began, now), emit, self._playing.discard)
        self._playing.add(playing)
        playing.play()

        def cancel() -> None:
            self.cancelled += 1
            playing.stop()

        return cancel

    def interrupt(self, name: str | None, why: str) -> None:
        """What the model, or any if None, is saying ends as an outage."""
        for playing in [each for each in self._playing if name in (None, each.name)]:
            playing.stop()
            playing.emit(fault_of(Outage(why)))

    async def close(self) -> None:
        """See `Backend.close`."""

    @staticmethod
    def _delay(script: Script, work: Submit) -> float:
        if script.delay == "fixed" or script.first_ms == 0:
            return script.first_ms / 1000
        return random.Random(work.request_id).expovariate(1000 / script.first_ms)


class _Playing:
    """Emits a timeline's events when they are due. No task: it outlives the runner that asked, as a host does."""

    def __init__(
        self, name: str, timeline: Iterator[tuple[float, Event]], emit: Callable[[Event], None],
        ended: Callable[["_Playing"], None],
    ) -> None:  # fmt: skip
        self.name = name
        self.emit = emit
        self._timeline = timeline
        self._ended = ended
        self._timer: asyncio.TimerHandle | None = None

    def play(self, event: Event | None = None) -> None:
        if event is not None:
            self._say(event)
        loop = asyncio.get_running_loop()
        for due, event in self._timeline:
            if due > loop.time():
                self._timer = loop.call_at(due, self.play, event)
                return
            self._say(event)

    def _say(self, event: Event) -> None:
        if not isinstance(event, Tokens):
            self.stop()
        elif "{now}" in event.text:
            event = msgspec.structs.replace(event, text=event.text.replace("{now}", f"{time.time():.6f}"))
        self.emit(event)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timeline = iter(())
        self._ended(self)


def _timeline(
    script: Script, work: Submit, generation: str, began: float, asked: float
) -> Iterator[tuple[float, Event]]:
    """Each event and when it is due. A piece of work that hangs has no last one."""
    due, said = began, 0
    for event in _events(script, work, generation):
        if script.fault is not None and (said >= script.fault_after or isinstance(event, Done)):
            break
        if isinstance(event, Tokens) and event.sequence > 0:
            gaps = script.gap_ms
            due += (
                gaps if isinstance(gaps, float | int) else ([*gaps, 0.0])[min(event.sequence - 1, len(gaps))]
            ) / 1000
        if isinstance(event, Done) and said:
            event = _timed(event, (began - asked) * 1000, (due - began) * 1000 / max(1, said - 1))
        yield due, event
        said += isinstance(event, Tokens)
    if script.fault == "overloaded":
        full = Fault(call=0, kind="overloaded", code="overloaded", message="full", retry_after=RETRY_AFTER_S)
        yield due, full
    elif script.fault == "outage":
        yield due, fault_of(Outage("scripted"))
    elif script.fault not in (None, "hang"):
        yield due, Fault(call=0, kind="record", code=script.fault, message="scripted")


def _gap(script: Script, sequence: int) -> float:
    if isinstance(script.gap_ms, list):
        return script.gap_ms[sequence - 1] if sequence <= len(script.gap_ms) else 0.0
    return script.gap_ms


def _timed(done: Done, first_token_ms: float, per_token_ms: float) -> Done:
    return msgspec.structs.replace(
        done, first_token_ms=round(first_token_ms, 3), per_token_ms=round(per_token_ms, 3)
    )  # fmt: skip


def _events(script: Script, work: Submit, generation: str) -> Iterator[Event]:
    text = work.text or ""
    refused = _refused(script, work)
    if refused is not None:
        yield Fault(call=0, kind="record", code=refused[0], message=refused[1])
    elif script.kind == "embedding":
        yield _embedding(script, work, generation)
    elif script.kind == "classifier":
        yield Done(call=0, generation=generation, scores=_scores(script, text))
    elif script.kind == "token_classifier":
        yield Done(call=0, generation=generation, entities=_found(script, text))
    elif script.kind == "reranker":
        asked = set(text.lower().split())
        scores = [len(asked & set(each.lower().split())) / max(1, len(asked)) for each in work.documents]
        yield Done(call=0, generation=generation, scores=scores)
    else:
        pieces = _pieces(script, work)
        for sequence, piece in enumerate(pieces):
            yield Tokens(call=0, generation=generation, sequence=sequence, text=piece)
        yield Done(call=0, generation=generation, text="".join(pieces), completion_tokens=len(pieces))


def _refused(script: Script, work: Submit) -> tuple[str, str] | None:
    """Code and message of what an encoder refuses, see `Encoding`; a decoder says something to everything."""
    if script.kind == "decoder":
        return None
    if script.kind == "embedding" and work.dimensions is not None and not 1 <= work.dimensions <= script.dimension:
        return "bad_option", f"dimensions is {work.dimensions}"
    if not (work.text or "").strip():
        return "empty_text", "there is no text"
    if script.kind == "reranker" and not work.documents:
        return "empty_text", "there are no documents"
    empty = [i for i, document in enumerate(work.documents) if not document.strip()]
    return ("empty_text", f"there is no text in document {empty[0]}") if empty else None


def _pieces(script: Script, work: Submit) -> list[str]:
    last = work.messages[-1]["content"] if work.messages else work.prompt or ""
    answer = _answer(script, last)
    if answer is None and isinstance(script.tokens, list):
        return script.tokens
    text = (answer or script.text).replace("{adapter}", work.adapter).replace("{last}", last)
    count = script.tokens if isinstance(script.tokens, int) else len(script.tokens)
    size = max(1, -(-len(text) // max(1, count)))
    return [text[i * size : (i + 1) * size] for i in range(count)]


def _answer(script: Script, text: str) -> str | None:
    return next((answer for words, answer in script.answers.items() if words in text), None)


def _scores(script: Script, text: str) -> list[float]:
    label, labels = _answer(script, text), script.labels
    if label is None or len(labels) < 2:
        return [1 / len(labels)] * len(labels)
    return [0.9 if each == label else 0.1 / (len(labels) - 1) for each in labels]


def _embedding(script: Script, work: Submit, generation: str) -> Done:
    seed = int.from_bytes(hashlib.sha256((work.text or "").encode()).digest()[:4], "big")
    vector = np.random.default_rng(seed).standard_normal(script.dimension).astype("<f4")
    return Done(call=0, generation=generation, vector=vector[: work.dimensions].tobytes())


def _found(script: Script, text: str) -> list[Entity]:
    found = [
        Entity(label, 1.0, match.start(), match.end())
        for words, label in script.entities.items()
        for match in re.finditer(re.escape(words), text)
    ]
    return sorted(found, key=lambda entity: entity.start)
