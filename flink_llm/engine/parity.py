"""How far a model folder is from the original in torch, and whether that is near enough to ship.

A decoder is read along what the original says by itself, many texts in a batch: its logits there, whether
its greedy token is the original's, and the perplexity of plain texts. An encoder is asked all texts in one
padded batch, the original each alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.decoder import Decoder
from flink_llm.engine.graphs import open_session
from flink_llm.engine.model import MIXED_MB, ModelFolder

LARGEST_DIFFERENCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.15, "int4": 0.6}
"""Bar of the logits: root mean square of the difference, in standard deviations of the original's."""
PERPLEXITY = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.02, "int4": 0.15}
"""Bar of the perplexity's rise, as a share."""
LARGEST_MIXED_DIFFERENCE = 0.01
"""Bar of mixed runs: of the logits, as a share of their own root mean square."""
SMALLEST_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.99}
"""Bar of an embedding, of the worst text."""
LARGEST_SHIFT = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.05}
"""Bar of a class's probability, of the worst text and class."""

TOKENS = 32
LONGEST = 256
"""Tokens of a text or prompt that are compared; what is longer is cut."""
MOST = 64
SLOTS = 16
_STREAMS, _PARTS = 3, 6
"""Of a mixed run: slots, and parts in which the last one's prompt is read."""
DECIDED = 3.0
"""A greedy token must be the original's where its two best logits are so many allowed differences apart."""

TEXTS = (
    "Where is my order 1042?",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "In 2026 the delivery date was 2026-11-24, and the parcel arrived two days late because of the snow.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, 2 * i))",
    'The customer\'s record is {"name": "Ada", "orders": [17, 42], "balance": -3.50, "active": true}.',
    "Water boils at a lower temperature on a mountain, since the air above presses on it with less weight. "
    "That is why an egg takes longer there, although the water bubbles as fiercely as anywhere else.",
    "Le train de nuit pour Lisbonne part à 21 h 43 de la voie 7. Die Fahrkarten gibt es am Schalter. 東京は雨です。",
    "First wash the rice until the water runs clear. Then add one and a half cups of water for each cup of rice, "
    "bring it to the boil, cover it, and let it stand on a low flame for twelve minutes without lifting the lid.",
)


@dataclass(frozen=True)
class Said:
    """A prompt and what the original answers: its greedy tokens and the logits each was chosen by."""

    prompt: list[int]
    tokens: list[int]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """The original, as far as decoders are compared with it."""

    said: list[Said]
    texts: list[list[int]]
    loss: float


def refer(original: Any, prompts: Sequence[list[int]], texts: Sequence[list[int]], tokens: int = TOKENS) -> Reference:
    """Asks a decoder in torch: `tokens` greedy ones after each prompt, and how likely it finds the texts."""
    import torch

    said = []
    losses: list[float] = []
    texts = [text[:LONGEST] for text in texts if len(text) > 1]
    with torch.inference_mode():
        for prompt in (prompt[:LONGEST] for prompt in prompts):
            found = original(torch.tensor([prompt]), use_cache=True)
            rows = [found.logits[0, -1].float().numpy()]
            for _ in range(tokens - 1):
                token = torch.tensor([[int(rows[-1].argmax())]])
                found = original(token, past_key_values=found.past_key_values, use_cache=True)
                rows.append(found.logits[0, -1].float().numpy())
            said.append(Said(prompt, [int(row.argmax()) for row in rows], np.stack(rows)))
        for text in texts:
            logits = original(torch.tensor([text])).logits[0].float().numpy()
            losses += [_loss(row, token) for row, token in zip(logits[:-1], text[1:], strict=True)]
    return Reference(said, texts, float(np.mean(losses)) if losses else 0.0)


def measure_decoder(folder: ModelFolder, reference: Reference, precision: str, adapter: str = "") -> dict[str, Any]:
    """What the manifest says of a decoder's parity, with an adapter or without.

    No perplexity where no text has two tokens. Raises ModelFolderError for a graph that is none.
    """
    decoder = open_decoder(folder, SLOTS)
    for slot in range(SLOTS):
        decoder.adapt(slot, adapter)
    squares, worst, compared, equal, same, rows = 0.0, 0.0, 0, 0, 0, 0
    for batch in _waves(reference.said):
        found = _along(decoder, [said.prompt for said in batch], [said.tokens for said in batch])
        for said, logits in zip(batch, found, strict=True):
            scale = float(said.logits.std())
            difference = (logits - said.logits) / scale
            squares += float(np.square(difference).mean(axis=1).sum())
            worst = max(worst, float(np.abs(difference).max()))
            agreed = logits.argmax(axis=1) == said.logits.argmax(axis=1)
            apart = np.partition(said.logits, -2)[:, -2:]
            decided = (apart[:, 1] - apart[:, 0]) > DECIDED * LARGEST_DIFFERENCE[precision] * scale
            compared += int((decided | agreed).sum())
            equal += int(agreed.sum())
            same, rows = same + int(agreed.sum()), rows + len(agreed)
    measured = {
        "against": "transformers, fp32",
        "logit_difference": _rounded(math.sqrt(squares / rows)),
        "max_logit_difference": _rounded(worst),
        "greedy_match": round(equal / max(1, compared), 6),
        "greedy_same": round(same / rows, 6),
    }
    if reference.texts:
        rise = math.exp(_text_loss(decoder, reference.texts) - reference.loss) - 1
        measured["perplexity_change"] = _rounded(rise)
    return measured


def measure_mixed(folder: ModelFolder, reference: Reference) -> float:
    """How far mixed runs are from the same model's steps and prompts: the worst row's root mean square of the
    difference, as a share of their own. `folder` is held twice with `MIXED_MB`. Raises ModelFolderError.

    Two replies go on while a third prompt is read in parts beside them; then all three go on.
    """
    decoder = open_decoder(folder, 2 * _STREAMS, mixed_mb=MIXED_MB)
    apart, mixed = list(range(_STREAMS)), list(range(_STREAMS, 2 * _STREAMS))
    *streams, reader = (reference.said * _STREAMS)[:_STREAMS]
    for slots in (apart, mixed):
        for slot, said in zip(slots, streams, strict=False):
            decoder.prefill(slot, said.prompt, 0)
    differences: list[float] = []

    def compare(found: NDArray[np.floating[Any]], wanted: NDArray[np.floating[Any]]) -> None:
        each = np.square(found - wanted).mean(axis=-1) / np.square(wanted).mean(axis=-1)
        differences.append(math.sqrt(float(each.max())))

    size = math.ceil(len(reader.prompt) / _PARTS)
    for step, start in enumerate(range(0, len(reader.prompt), size)):
        part = reader.prompt[start : start + size]
        latest = [said.tokens[step] for said in streams]
        after, every = decoder.step_beside(mixed[:-1], latest, mixed[-1], part, start)
        compare(every[mixed[:-1]], decoder.step(apart[:-1], latest)[apart[:-1]])
        compare(after, decoder.prefill(apart[-1], part, start))
    latest = [said.tokens[-1] for said in (*streams, reader)]
    wanted = decoder.step(apart, latest)[apart].copy()
    compare(decoder.step(mixed, latest)[mixed], wanted)
    return _rounded(float(np.max(differences)))  # NaN if one is


def open_decoder(folder: ModelFolder, slots: int, mixed_mb: int = 0) -> Decoder:
    """A decoder on the CPU whose cache holds what is measured, not the whole context. Raises ModelFolderError."""
    length = min(folder.manifest.context_length, LONGEST + 2 * TOKENS)
    manifest = msgspec.structs.replace(folder.manifest, context_length=length)
    opened = msgspec.structs.replace(folder, manifest=manifest)
    return Decoder(opened, device="cpu", threads=0, slots=slots, mixed_mb=mixed_mb)


def measure_encoder(folder: ModelFolder, original: Any, tokens: Sequence[list[int]], task: str) -> dict[str, Any]:
    """What the manifest says of an encoder's parity."""
    import torch

    manifest = folder.manifest
    output = "last_hidden_state" if task == "embedding" else "logits"
    tokens = [text[: min(LONGEST, manifest.context_length)] for text in tokens]
    found = _padded(folder, tokens, output)
    values = []
    for text, ours in zip(tokens, found, strict=True):
        with torch.inference_mode():
            theirs = getattr(original(torch.tensor([text])), output)[0].float().numpy()
        if task == "embedding":
            one, other = (_pooled(hidden[: len(text)], manifest.pooling) for hidden in (ours, theirs))
            values.append(float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other))))
        else:
            ours = ours[: len(text)] if task == "token_classifier" else ours
            values.append(float(np.abs(_scores(ours, manifest.scores) - _scores(theirs, manifest.scores)).max()))
    name = "cosine" if task == "embedding" else "probability_shift"
    worst = min(values) if name == "cosine" else max(values)
    return {"against": "transformers, fp32", name: round(worst, 6)}


def faults(precision: str, parity: Mapping[str, Any]) -> list[str]:
    """What of a measured parity is beyond its bar, with the bar. NaN is beyond every bar."""
    most = {"logit_difference": LARGEST_DIFFERENCE, "perplexity_change": PERPLEXITY, "probability_shift": LARGEST_SHIFT}
    least = {"cosine": SMALLEST_COSINE, "greedy_match": dict.fromkeys(LARGEST_DIFFERENCE, 1.0)}
    beyond = [
        *(name for name, bar in most.items() if name in parity and not parity[name] <= bar[precision]),
        *(name for name, bar in least.items() if name in parity and not parity[name] >= bar[precision]),
    ]
    return [f"{name} is {parity[name]} (bar {(most | least)[name][precision]})" for name in beyond]


def _waves(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + SLOTS] for start in range(0, len(items), SLOTS)]


def _along(decoder: Decoder, prompts: list[list[int]], answers: list[list[int]]) -> list[NDArray[np.float32]]:
    """Logits [answer, vocabulary] by which each token of the answers would be chosen, all in one batch."""
    rows = [[decoder.prefill(slot, prompt, 0).astype(np.float32)] for slot, prompt in enumerate(prompts)]
    for step in range(max(map(len, answers)) - 1):
        slots = [slot for slot, answer in enumerate(answers) if step < len(answer) - 1]
        logits = decoder.step(slots, [answers[slot][step] for slot in slots])
        for slot in slots:
            rows[slot].append(logits[slot].astype(np.float32))
    for slot in range(len(prompts)):
        decoder.release(slot)
    return [np.stack(each) for each in rows]


def _text_loss(decoder: Decoder, texts: Sequence[list[int]]) -> float:
    losses: list[float] = []
    for batch in _waves(sorted(texts, key=len)):
        for text, logits in zip(batch, _along(decoder, [t[:1] for t in batch], [t[1:] for t in batch]), strict=True):
            losses += [_loss(row, token) for row, token in zip(logits, text[1:], strict=True)]
    return float(np.mean(losses))


def _loss(logits: NDArray[np.float32], token: int) -> float:
    top = float(logits.max())
    return top + math.log(float(np.exp(logits - top).sum())) - float(logits[token])


def _padded(folder: ModelFolder, tokens: Sequence[list[int]], output: str) -> NDArray[np.float32]:
    longest = max(map(len, tokens))
    ids = np.zeros((len(tokens), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(tokens):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    session = open_session(folder, "cpu", 0)
    names = {value.name for value in session.get_inputs()}
    found = session.run([output], {k: v for k, v in feeds.items() if k in names})[0]
    return np.asarray(found, dtype=np.float32)


def _pooled(hidden: NDArray[np.float32], pooling: str) -> NDArray[np.float32]:
    """The vector of one text; how long it is does not matter here."""
    if pooling == "mean":
        return np.asarray(hidden.mean(axis=0))
    return np.asarray(hidden[0 if pooling == "cls" else -1])


def _scores(logits: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """Probabilities along the last axis; of a single class, or of each by itself, against its absence."""
    if logits.shape[-1] == 1 or kind == "sigmoid":
        alone: NDArray[np.float32] = 1 / (1 + np.exp(-logits))
        return alone
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    normed: NDArray[np.float32] = shares / shares.sum(axis=-1, keepdims=True)
    return normed


def _rounded(value: float) -> float:
    """Four digits, however small: 0.0 in a manifest shall mean none."""
    return float(f"{value:.4g}")
