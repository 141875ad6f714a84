"""One generation on its way: tokens so far, text so far, and when it ends."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.logprobs import Logprobs
from flink_llm.engine.penalties import penalties
from flink_llm.engine.protocol import Done, FinishReason, Options, Tokens
from flink_llm.engine.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from flink_llm.engine.grammar import Grammar


class Sequence:
    """Prompt and reply of one generation. `take` is told each token; times are monotonic seconds.

    Text is told together where it comes within `told_every` seconds of what was told before.
    """

    def __init__(
        self,
        prompt: list[int],
        options: Options,
        generation: str,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        grammar: "Grammar | None" = None,
        told_every: float = 0.0,
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.generation = generation
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._ends = ends
        self._grammar = grammar
        self._penalties = penalties(options, prompt)
        self._logprobs = Logprobs(options.logprobs, tokenizer.decode) if options.logprobs is not None else None
        self._unread: list[int] = []
        self._held = ""
        self._ready = ""
        self._told_every = told_every
        self._due = 0.0
        self._said: list[str] = []
        self._pieces = 0
        self.arrived = self.began = self.first = self.latest = time.monotonic()

    @property
    def count(self) -> int:
        """Tokens of the reply so far."""
        return len(self.tokens)

    @property
    def last(self) -> int:
        """The latest token, the prompt's before there is one of the reply."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def greedy(self) -> bool:
        """Whether its next token is the largest of the logits as they are."""
        untouched = self._logprobs is None and self._penalties is None and self._grammar is None
        return untouched and self.options.temperature == 0

    def weigh(self, logits: NDArray[np.floating[Any]]) -> None:
        """Changes [vocabulary] by the reply's penalties, and leaves in it what its grammar allows next."""
        if self._logprobs is not None:
            self._logprobs.look(logits)
        if self._penalties is not None:
            self._penalties.apply(logits)
        if self._grammar is not None:
            logits[~self._grammar.allowed()] = -np.inf

    def take(self, token: int, limit: int) -> Tokens | None:
        """The next token; gives the text that it makes certain. `limit` is the context's length."""
        if self._grammar is not None:
            token = self._grammar.take(token)
        if self._logprobs is not None:
            self._logprobs.take(token, self._penalties.before(token) if self._penalties is not None else None)
        if self._penalties is not None:
            self._penalties.add(token)
        self.latest = time.monotonic()
        self.first = self.first if self.tokens else self.latest
        self.tokens.append(token)
        if token in self._ends:
            return self._end("stop")
        self._unread.append(token)
        full = self.count >= self.options.max_tokens or len(self.prompt) + self.count >= limit
        if self.latest < self._due and not (full or self.options.stop or self._grammar):
            return None  # nobody is told of its text yet, nor does it end anything
        self._read()
        if self._cut_at_stop():
            return self._flush()
        if self._grammar is not None and self._grammar.over:
            return self._end("stop")
        if full:
            return self._end("length")
        return self._say(len(self._held) - self._longest_start_of_a_stop())

    def done(self) -> Done:
        """The end, once there is a `finish`."""
        further = max(1, self.count - 1)
        return Done(
            call=0,
            generation=self.generation,
            text="".join(self._said),
            finish=self.finish or "cancelled",
            prompt_tokens=len(self.prompt),
            completion_tokens=self.count,
            queue_ms=(self.began - self.arrived) * 1000,
            first_token_ms=(self.first - self.arrived) * 1000 if self.count else 0.0,
            per_token_ms=(self.latest - self.first) * 1000 / further if self.count else 0.0,
            logprobs=self._logprobs.found if self._logprobs is not None else [],
        )

    def _end(self, finish: FinishReason) -> Tokens | None:
        self.finish = finish
        self._read()
        self._held += self._detokenizer.finish()
        self._cut_at_stop()
        return self._flush()

    def _read(self) -> None:
        if self._unread:
            self._held += self._detokenizer.add(*self._unread)
            self._unread.clear()

    def _cut_at_stop(self) -> bool:
        at = [self._held.find(stop) for stop in self.options.stop]
        found = [position for position in at if position >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.finish = "stop"
        return bool(found)

    def _longest_start_of_a_stop(self) -> int:
        """How many last characters of the held text might still become a stop string."""
        for length in range(min(len(self._held), max(map(len, self.options.stop), default=0)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.options.stop):
                return length
        return 0

    def _flush(self) -> Tokens | None:
        return self._say(len(self._held))

    def _say(self, length: int) -> Tokens | None:
        text, self._held = self._held[:length], self._held[length:]
        self._ready += text
        if not self._ready or (self.finish is None and self.latest < self._due):
            return None
        self._due = self.latest + self._told_every
        text, self._ready = self._ready, ""
        self._said.append(text)
        self._pieces += 1
        return Tokens(call=0, generation=self.generation, sequence=self._pieces - 1, text=text)
