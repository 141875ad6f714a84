"""From a Hugging Face folder to a model folder: built, measured against the original, or refused.

Needs the `export` extra (torch, transformers, onnxruntime-genai); nothing else of the library does.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flink_llm.engine.decoder import Decoder
from flink_llm.engine.model import Manifest, open_model_folder, write_manifest
from flink_llm.engine.prompts import Prompts
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import ExportError, ModelFolderError

Precision = Literal["fp32", "int8", "int4"]
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM")
TOKENS = 32
LARGEST_DIFFERENCE = {"fp32": 1e-2, "int8": 0.25, "int4": 1.5}
"""How far a logit may be from the original's, in units of the original's standard deviation."""

TEXTS = (
    "Where is my order 1042?",
    "The quick brown fox jumps over the lazy dog.",
    "In 2026 the delivery date was 2026-11-24, and the parcel arrived.",
    "def add(a, b):\n    return a + b\n",
)
_building = threading.Lock()


def export_decoder(source: Path, to: Path, *, name: str, precision: Precision, license_name: str = "") -> Manifest:
    """Exports a decoder with its tokenizer and chat template; `to` must not exist.

    Raises ExportError: architecture not served, tools missing, disk full, or parity below the bar. No
    half folder is left behind.
    """
    config = _config(source)
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in SERVED:
        raise ExportError(f"{architecture} cannot be served; these can: {', '.join(SERVED)}")
    if to.exists():
        raise ExportError(f"{to} exists already: choose another folder, or remove it")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _build(source, Path(scratch) / "built", precision)
            _gather(source, Path(scratch) / "built", made)
            fields = _fields(config, name, architecture, precision, license_name, source, made)
            write_manifest(made, **fields)
            parity = _measure(source, made, precision)
            manifest = write_manifest(made, **fields, parity=parity)
            made.rename(to)
    except OSError as error:
        raise ExportError(f"{to} cannot be written: {error.strerror or error}") from error
    return manifest


def _config(source: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{source} is not a Hugging Face folder: config.json: {error}") from error
    return config


def _build(source: Path, to: Path, precision: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from onnxruntime_genai.models import builder
    except ImportError as error:
        raise ExportError("export needs more packages: pip install 'flink-llm[cpu,export]'") from error
    cache = str(to.parent / "cache")
    told = io.StringIO()
    with _building, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            options = builder.parse_extra_options(None, str(source), str(to), precision, "cpu", cache, [])
            builder.create_model(None, str(source), str(to), precision, "cpu", cache, **options)
        except Exception as error:  # the builder raises whatever torch and transformers raise
            raise ExportError(f"{source} could not be built: {type(error).__name__}: {error}") from error


def _gather(source: Path, built: Path, made: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        if (built / name).exists():
            shutil.copyfile(built / name, made / name)
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        if (source / name).exists():
            shutil.copyfile(source / name, made / name)
    if not (made / "tokenizer.json").exists():
        raise ExportError(f"{source} has no tokenizer.json")


def _fields(
    config: dict[str, Any], name: str, architecture: str, precision: str, license_name: str, source: Path, made: Path
) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    ends = config.get("eos_token_id")
    special = {}
    with contextlib.suppress(OSError, ValueError):
        tokens = json.loads((source / "tokenizer_config.json").read_text())
        for role in ("bos_token", "eos_token", "pad_token"):
            token = tokens.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[role] = token
    return {
        "name": name,
        "kind": "decoder",
        "architecture": architecture,
        "precision": precision,
        "context_length": int(config["max_position_embeddings"]),
        "vocab_size": int(config["vocab_size"]),
        "num_layers": int(config["num_hidden_layers"]),
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "eos_token_ids": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "special_tokens": special,
        "source": source.name,
        "license": license_name,
    }


def _measure(source: Path, made: Path, precision: str) -> dict[str, Any]:
    """Compares with transformers: the logits over prompt and reply, and the greedy tokens.

    A greedy token counts as different where the original's two best logits are further apart than the
    largest difference allowed; a text's comparison ends at its first excused difference.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        folder = open_model_folder(made)
        decoder = Decoder(folder, device="cpu", threads=0, slots=1)
    except ModelFolderError as error:
        raise ExportError(str(error)) from error
    tokenizer = Tokenizer(folder.files["tokenizer.json"], folder.manifest.vocab_size)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    bar = LARGEST_DIFFERENCE[precision]
    worst, compared, equal = 0.0, 0, 0
    for prompt in _prompts(folder.files, tokenizer):
        with torch.no_grad():
            tokens = original.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)[
                0
            ].tolist()
            wanted = original(torch.tensor([tokens])).logits[0].numpy()
        scale = float(wanted.std())
        found = [decoder.prefill(0, prompt, 0).copy()]
        found += [decoder.step([0], [token])[0].copy() for token in tokens[len(prompt) : -1]]
        for row, logits in enumerate(found):
            reference = wanted[len(prompt) - 1 + row]
            worst = max(worst, float(np.abs(logits - reference).max()) / scale)
            best = np.partition(reference, -2)[-2:]
            compared += 1
            if int(logits.argmax()) == int(reference.argmax()):
                equal += 1
            elif abs(float(best[1] - best[0])) <= bar * scale:
                compared -= 1
                break
    return _judge(precision, worst, equal / max(1, compared))


def _prompts(files: dict[str, bytes], tokenizer: Tokenizer) -> Sequence[list[int]]:
    plain = [tokenizer.encode_text(text) for text in TEXTS]
    if "chat_template.jinja" not in files:
        return plain
    prompts = Prompts(files["chat_template.jinja"].decode(), tokenizer, {})
    return [prompts.chat([{"role": "user", "content": text}], None) for text in TEXTS] + plain


def _judge(precision: str, worst: float, match: float) -> dict[str, Any]:
    bar = LARGEST_DIFFERENCE[precision]
    if not np.isfinite(worst) or worst > bar or match < 1.0:
        raise ExportError(
            f"refused: {precision} is not the original: a logit is {worst:.3f} standard deviations off "
            f"(bar {bar}), greedy tokens agree to {match:.1%} (bar 100%)"
        )
    return {"max_logit_difference": round(worst, 6), "greedy_match": match, "against": "transformers, fp32"}
