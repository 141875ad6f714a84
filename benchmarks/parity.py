"""Does the engine say what the original says, whoever shares the batch and however large it is?

Small models with random weights, one of each architecture that is served. `greedy_match` is the share of
prompts whose greedy tokens, alone and in a full batch, are those of transformers; a difference counts
where the original's two best logits are more than 1e-3 apart, and a prompt's comparison ends at its first
excused one. `neighbour_invariant` is the share of requests whose tokens stay when all that shares their
batch changes, in every precision, with the largest difference of their logits; `size_invariant` the share
whose tokens alone are those in a full batch.
"""

import argparse
import json
import random
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import small_models
from benchmarks.machine import isa
from flink_llm.engine.decoder import Decoder
from flink_llm.engine.encoder import Encoder
from flink_llm.engine.export import Order, export_model
from flink_llm.engine.model import ModelFolder, open_model_folder
from flink_llm.engine.parity import SLOTS, Said, refer

DECIDED = 1e-3
SHIPPED = ("fp32", "int8", "int4")
"""What runs on a CPU; fp16 needs a GPU."""
ENCODER = ("fp32", "int8")
EXACT = ("fp32", "int8")
"""int4 has another kernel for a single row: its `size` is reported, and not part of the figure."""
SHAPE = {**small_models.DECODERS["Llama"], "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
LONGEST = 64


def texts(count: int, seed: int) -> list[list[int]]:
    """Prompts of 4 to 64 tokens: bytes of random words."""
    rng = random.Random(seed)
    offset = len(small_models.SPECIAL)
    made = []
    for _ in range(count):
        words = " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) for _ in range(20))
        made.append([offset + ord(c) - 33 for c in words[: rng.randint(4, LONGEST)].replace(" ", "!")])
    return made


def export(source: Path, precision: str) -> ModelFolder:
    """The source in a precision, opened."""
    to = source.parent / f"{source.name}-{precision}"
    export_model(source, to, Order(source.name, precision))  # type: ignore[arg-type]
    return open_model_folder(to)


def say(decoder: Decoder, prompts: Sequence[list[int]], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Greedy tokens [prompts, count] of prompts in slots 0 and up, and the logits they were chosen by."""
    rows = [[decoder.prefill(slot, prompt, 0).copy()] for slot, prompt in enumerate(prompts)]
    slots = range(len(prompts))
    for _ in range(count - 1):
        logits = decoder.step(slots, [int(row[-1].argmax()) for row in rows])
        for slot in slots:
            rows[slot].append(logits[slot].copy())
    for slot in slots:
        decoder.release(slot)
    found = np.stack([np.stack(row) for row in rows])
    return found.argmax(axis=-1), found


def matches(tokens: NDArray[Any], said: Said) -> bool:
    """Whether the tokens are what was said, up to where it was not decided."""
    for token, expected, logits in zip(tokens, said.tokens, said.logits, strict=True):
        if token != expected:
            best = np.partition(logits, -2)[-2:]
            return bool(best[1] - best[0] <= DECIDED)
    return True


def greedy(folder: Path, kind: str, prompts: int, tokens: int) -> dict[str, float]:
    """Shares of prompts that one architecture answers as transformers does, alone and in a full batch."""
    import torch
    from transformers import AutoModelForCausalLM

    source = small_models.decoder(folder / kind, kind)
    decoder = Decoder(export(source, "fp32"), device="cpu", threads=0, slots=SLOTS)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    asked = texts(prompts, seed=5)
    said = refer(original, asked, [], tokens).said
    together = [
        row for start in range(0, prompts, SLOTS) for row in say(decoder, asked[start : start + SLOTS], tokens)[0]
    ]
    alone = [say(decoder, [prompt], tokens)[0][0] for prompt in asked]
    return {
        "alone": float(np.mean([matches(*pair) for pair in zip(alone, said, strict=True)])),
        "batch": float(np.mean([matches(*pair) for pair in zip(together, said, strict=True)])),
    }


def invariance(folder: ModelFolder, tokens: int) -> dict[str, float]:
    """What other contents in the batch, and another size of it, do to a decoder's requests."""
    decoder = Decoder(folder, device="cpu", threads=0, slots=SLOTS)
    asked, others = texts(SLOTS, seed=6), texts(SLOTS, seed=7)
    first_tokens, first = say(decoder, asked, tokens)
    neighbour, size, same, alike = 0.0, 0.0, [], []
    for slot, prompt in enumerate(asked):
        found_tokens, found = say(decoder, [*others[:slot], prompt, *others[slot + 1 :]], tokens)
        same.append(bool((found_tokens[slot] == first_tokens[slot]).all()))
        neighbour = max(neighbour, _apart(found[slot], first[slot]))
        alone_tokens, alone = say(decoder, [prompt], tokens)
        said = Said(prompt, first_tokens[slot].tolist(), first[slot])
        alike.append(matches(alone_tokens[0], said))
        size = max(size, _apart(alone[0], first[slot]))
    return {
        "neighbour_invariant": float(np.mean(same)),
        "neighbour_logits": neighbour,
        "size_invariant": float(np.mean(alike)),
        "size_logits": size,
    }


def encoder_invariance(folder: ModelFolder) -> dict[str, float]:
    """The same of an encoder's vectors: neighbours of the same lengths and other contents, and none."""
    encoder = Encoder(folder, device="cpu", threads=0)
    rng = np.random.default_rng(8)
    asked = texts(SLOTS, seed=6)
    first = _vectors(encoder, asked)
    same, neighbour, size = [], 0.0, 0.0
    for i, text in enumerate(asked):
        others = [rng.integers(len(small_models.SPECIAL), 250, len(each)).tolist() for each in asked]
        found = _vectors(encoder, [*others[:i], text, *others[i + 1 :]])[i]
        same.append(bool((found == first[i]).all()))
        neighbour = max(neighbour, float(np.abs(found - first[i]).max()))
        size = max(size, float(np.abs(_vectors(encoder, [text])[0] - first[i]).max()))
    return {"neighbour_invariant": float(np.mean(same)), "neighbour_vector": neighbour, "size_vector": size}


def _vectors(encoder: Encoder, asked: list[list[int]]) -> list[NDArray[np.float32]]:
    found = encoder.run(asked)
    for answer in found:
        if isinstance(answer, Exception):
            raise answer
    return found  # type: ignore[return-value]


def _apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference of logits as long as the tokens before were the same."""
    differs = np.flatnonzero(one.argmax(axis=-1) != other.argmax(axis=-1))
    until = differs[0] + 1 if len(differs) else len(one)
    return float(np.abs(one[:until] - other[:until]).max())


def measure(folder: Path, kinds: Sequence[str], prompts: int, tokens: int) -> dict[str, Any]:
    """All figures, with their parts."""
    by_kind = {}
    for kind in kinds:
        by_kind[kind] = greedy(folder, kind, prompts, tokens)
        print(f"greedy, {kind}: {by_kind[kind]}", flush=True)
    by_precision: dict[str, dict[str, float]] = {}
    source = small_models.decoder(folder / "shape", "Llama", SHAPE)
    for precision in SHIPPED:
        by_precision[precision] = invariance(export(source, precision), tokens)
        print(f"invariance, {precision}: {by_precision[precision]}", flush=True)
    source = small_models.encoder(folder / "encoder", "Bert")
    for precision in ENCODER:
        by_precision[f"encoder {precision}"] = encoder_invariance(export(source, precision))
        print(f"invariance, encoder {precision}: {by_precision[f'encoder {precision}']}", flush=True)
    return {
        "greedy_match": min(min(shares.values()) for shares in by_kind.values()),
        "neighbour_invariant": min(found["neighbour_invariant"] for found in by_precision.values()),
        "neighbour_largest_difference": max(
            found.get("neighbour_logits", found.get("neighbour_vector", 0.0)) for found in by_precision.values()
        ),
        "size_invariant": min(by_precision[precision]["size_invariant"] for precision in EXACT),
        "prompts": prompts,
        "tokens": tokens,
        "greedy_by_architecture": by_kind,
        "by_precision": by_precision,
        "isa": isa(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 prompts of 24 tokens instead of 64 of 64")
    args = parser.parse_args()
    prompts, tokens = (8, 24) if args.quick else (64, 64)
    with tempfile.TemporaryDirectory(prefix="flink-llm-parity-") as folder:
        print(json.dumps(measure(Path(folder), list(small_models.DECODERS), prompts, tokens)))


if __name__ == "__main__":
    main()
