"""One generation on its way: tokens so far, text so far, and when it ends."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.protocol import Done, FinishReason, Options, Tokens
from flink_llm.engine.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from flink_llm.engine.grammar import Grammar


class Sequence:
    """Prompt and reply of one generation. `take` is told each token; times are monotonic seconds."""

    def __init__(
        self,
        prompt: list[int],
        options: Options,
        generation: str,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        grammar: "Grammar | None" = None,
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.generation = generation
        self.count = 0
        self.last = prompt[-1]
        self.finish: FinishReason | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._ends = ends
        self._grammar = grammar
        self._held = ""
        self._said: list[str] = []
        self._pieces = 0
        self.arrived = self.began = self.first = self.latest = time.monotonic()

    def restrict(self, logits: NDArray[np.floating[Any]]) -> None:
        """Leaves in [vocabulary] what the text's grammar allows next."""
        if self._grammar is not None:
            logits[~self._grammar.allowed()] = -np.inf

    def take(self, token: int, limit: int) -> Tokens | None:
        """The next token; gives the text that it makes certain. `limit` is the context's length."""
        if self._grammar is not None:
            token = self._grammar.take(token)
        self.latest = time.monotonic()
        self.first = self.latest if self.count == 0 else self.first
        self.count += 1
        self.last = token
        if token in self._ends:
            return self._end("stop")
        self._held += self._detokenizer.add(token)
        if self._cut_at_stop():
            return self._flush()
        if self._grammar is not None and self._grammar.over:
            return self._end("stop")
        if self.count >= self.options.max_tokens or len(self.prompt) + self.count >= limit:
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
        )

    def _end(self, finish: FinishReason) -> Tokens | None:
        self.finish = finish
        self._held += self._detokenizer.finish()
        self._cut_at_stop()
        return self._flush()

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
        if not text:
            return None
        self._said.append(text)
        self._pieces += 1
        return Tokens(call=0, generation=self.generation, sequence=self._pieces - 1, text=text)
