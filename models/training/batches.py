"""Batches for training: dialogues, and drills that teach a small model to copy before it must answer.

Prompts are rendered and tokenised by the same code as in the job. Only answers carry a loss.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch

from flink_llm.engine.prompts import Prompts
from flink_llm.engine.tokenizer import Tokenizer
from models.training.dialogues import MIXES, Dialogue, Generator

IGNORED = -100
CONTEXT = 2048
POOL = 8
"""Batches' worth of examples sorted by length, from which batches of one length are cut."""
LONG_WORDS = (150, 600)


class Example(NamedTuple):
    """Tokens, and for each whether it is part of an answer."""

    tokens: list[int]
    answers: list[bool]


class Batches:
    """Endless batches of about `size` tokens, padding included; the same for a seed.

    From `long_from` (progress) on, `long_share` of the batches are of prompts that nearly fill the
    context. Without `drills` the examples are those of the end from the beginning; `mix` names what the
    dialogues are about.
    """

    def __init__(
        self,
        seed: int,
        prompts: Prompts,
        tokenizer: Tokenizer,
        size: int,
        *,
        long_from: float = 0.7,
        long_share: float = 0.2,
        drills: bool = True,
        mix: str = "usual",
    ) -> None:
        self._long_from, self._long_share, self._drills = long_from, long_share, drills
        self._generator = Generator(seed, mix=MIXES[mix])
        self._random = random.Random(f"batches/{seed}")
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._size = size
        self._end = tokenizer.token("<|end|>") or 0
        self._ready: list[list[Example]] = []

    def next(self, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels [rows, length]; what they hold depends on `progress`, 0 to 1."""
        if progress >= self._long_from and self._random.random() < self._long_share:
            return _padded(self._filled(lambda: self._questions(long=self._random.randint(*LONG_WORDS))))
        if not self._ready:
            self._ready = self._pool(progress)
        return _padded(self._ready.pop())

    def one(self, dialogue: Dialogue) -> Example:
        """A dialogue as an example."""
        return self._answered(self._prompts.chat(dialogue.messages, dialogue.features), dialogue.answer)

    def _pool(self, progress: float) -> list[list[Example]]:
        kinds: list[Callable[[], Example]] = [self._echo, self._lookup, self._questions, self._plain]
        progress = progress if self._drills else 1.0
        weights = [20, 35, 30, 15] if progress < 0.35 else [3, 10, 40, 47] if progress < 0.75 else [0, 3, 27, 70]
        examples: list[Example] = []
        total = 0
        while total < POOL * self._size:
            examples.append(self._random.choices(kinds, weights)[0]())
            total += len(examples[-1].tokens)
        examples.sort(key=lambda example: len(example.tokens))
        batches: list[list[Example]] = [[]]
        for example in examples:
            if (len(batches[-1]) + 1) * len(example.tokens) > self._size and batches[-1]:
                batches.append([])
            batches[-1].append(example)
        self._random.shuffle(batches)
        return batches

    def _filled(self, make: Callable[[], Example]) -> list[Example]:
        examples: list[Example] = []
        longest = 0
        while (len(examples) + 1) * longest <= self._size:
            example = make()
            if len(example.tokens) <= CONTEXT:
                examples.append(example)
                longest = max(longest, len(example.tokens))
        return examples

    def _plain(self) -> Example:
        return self.one(self._generator.dialogue())

    def _echo(self) -> Example:
        """A passage that is to be said again."""
        passage = self._generator.passage(self._random.randint(2, 8))
        return self._answered(self._prompts.chat([{"role": "user", "content": passage}], None), passage)

    def _lookup(self) -> Example:
        """Features that are to be said again, each by its name, in another order."""
        features = self._generator.dialogue("status", missing=False).features
        if self._random.random() < 0.5:
            features = {name: self._generator.passage(self._random.choice([1, 1, 2])) for name in features}
        names = self._random.sample(list(features), self._random.randint(3, min(8, len(features))))
        prompt = self._prompts.chat([{"role": "user", "content": ", ".join(names)}], features)
        return self._answered(prompt, "\n".join(f"{name}: {features[name]}" for name in names))

    def _questions(self, long: int = 0) -> Example:
        """Several questions about one order, one after another."""
        first, *others = self._generator.about_one_order(self._random.randint(2, 5), long=long)
        tokens, answers = self.one(first)
        for dialogue in others:
            more = self._answered(self._prompts.chat(dialogue.messages[-1:], None)[1:], dialogue.answer)
            tokens, answers = tokens + more.tokens, answers + more.answers
        return Example(tokens, answers)

    def _answered(self, prompt: list[int], answer: str) -> Example:
        said = [*self._tokenizer.encode_text(answer), self._end]
        return Example([*prompt, *said], [False] * len(prompt) + [True] * len(said))


def _padded(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(example.tokens) for example in examples)
    inputs = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED)
    for row, (tokens, answers) in enumerate(examples):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        wanted = [token if answer else IGNORED for token, answer in zip(tokens, answers, strict=True)]
        labels[row, : len(tokens)] = torch.tensor(wanted)
    return inputs, labels
