"""What a precision costs in quality, ours and llama.cpp's: perplexity, agreement with fp32, invariance.

Perplexity is the demo model's over the answers of held-out dialogues. Agreement and invariance are those of
a random model of the benchmark's shape: random weights have no outliers and flatter every activation
quantisation, so that the perplexity is what decides.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import shapes
from benchmarks.bare import Bare
from benchmarks.shapes import Shape, prompt
from flink_llm.engine.prompts import Prompts
from flink_llm.engine.tokenizer import Tokenizer
from models.training.dialogues import Generator

DIALOGUES = 40
TEXTS, LENGTH = 4, 128
ROWS = 16
Read = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Tokens [rows, length] to logits [rows, length, vocabulary]."""


def report(shape: Shape, llama: dict[str, Any], *, root: Path, demo: Path) -> dict[str, Any]:
    """By name of precision or form: `perplexity_loss`, `agreement`, `neighbours` (largest change of a logit)."""
    source = shapes.source(shape, root)
    spoken = {name: Bare(shapes.exported(source, name, root)).read for name in shapes.precisions()}
    wanted = _top(spoken["fp32"], shape)
    spoken |= {form: reader(each) for form, each in llama.items()}
    return {
        **_perplexities(demo, list(llama), root),
        "agreement": {name: round(float((_top(read, shape) == wanted).mean()), 4) for name, read in spoken.items()},
        "neighbours": {name: neighbours(read, shape) for name, read in spoken.items()},
    }


def reader(llama: Any) -> Read:
    """A llama.cpp context as a `Read`: rows of one batch."""

    def read(tokens: NDArray[np.int64]) -> NDArray[Any]:
        llama.clear()
        parts = [(row, line.tolist(), 0) for row, line in enumerate(tokens)]
        return llama.read(parts, every=True).reshape(*tokens.shape, -1).copy()  # type: ignore[no-any-return]

    return read


def neighbours(read: Read, shape: Shape) -> float:
    """How far a row's logits move when only the other rows' content changes."""
    mine = prompt(shape, "mine", 32)[0]
    seen = []
    for seed in ("these", "those"):
        others = [prompt(shape, f"{seed}/{row}", 32)[0] for row in range(1, ROWS)]
        seen.append(read(np.array([mine, *others]))[0].astype(np.float64))
    return float(np.abs(seen[0] - seen[1]).max())


def perplexity(read: Read, texts: Sequence[tuple[list[int], int]]) -> float:
    """Of (tokens, where the answer begins): over the answers' tokens."""
    total, count = 0.0, 0
    for tokens, start in texts:
        logits = read(np.array([tokens]))[0, start - 1 : -1].astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        shares = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
        total += float((shares - logits[np.arange(len(logits)), tokens[start:]]).sum())
        count += len(logits)
    return float(np.exp(total / count))


def _top(read: Read, shape: Shape) -> NDArray[np.int64]:
    tokens = np.array([prompt(shape, f"top/{i}", LENGTH)[0] for i in range(TEXTS)])
    return np.array([read(line[None])[0].argmax(axis=-1) for line in tokens])


def _perplexities(demo: Path, forms: Sequence[str], root: Path) -> dict[str, Any]:
    texts = _answers(demo)
    longest = max(len(tokens) for tokens, _ in texts)
    found = {
        name: perplexity(Bare(shapes.exported(demo, name, root), rows=1).read, texts) for name in shapes.precisions()
    }
    if forms:
        from benchmarks.peers.llamacpp import LlamaCpp, convert

        for form in forms:
            found[form] = perplexity(reader(LlamaCpp(convert(demo, form, root), rows=1, context=longest)), texts)
    loss = {name: round(value / found["fp32"] - 1, 5) for name, value in found.items()}
    return {"perplexity": {name: round(value, 5) for name, value in found.items()}, "perplexity_loss": loss}


def _answers(demo: Path) -> list[tuple[list[int], int]]:
    """Held-out dialogues as tokens, and where their answers begin."""
    tokenizer = Tokenizer((demo / "tokenizer.json").read_bytes())
    prompts = Prompts((demo / "chat_template.jinja").read_text(), tokenizer, {})
    made = Generator(2027, "held_out")
    texts = []
    for dialogue in (made.dialogue() for _ in range(DIALOGUES)):
        asked = prompts.chat(dialogue.messages, dialogue.features)
        said = tokenizer.encode_text(dialogue.answer)
        texts.append(([*asked, *said], len(asked)))
    return texts
