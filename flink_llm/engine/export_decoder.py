"""Decoders: onnxruntime-genai's builder, and our own eight bits over what it builds."""

import contextlib
import io
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flink_llm.engine.export_adapters import add_adapters
from flink_llm.engine.export_fused import fuse
from flink_llm.engine.export_logits import slice_logits
from flink_llm.engine.export_mixed import mix
from flink_llm.engine.export_peft import PeftAdapter
from flink_llm.engine.export_scale import fold_scale
from flink_llm.engine.export_source import NEEDS, Source
from flink_llm.engine.model import MIXED, adapter_file
from flink_llm.engine.quantize import EightBits, Form, FourBits, quantize_rows
from flink_llm.errors import ExportError

SERVED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "GraniteForCausalLM",
)
PRECISIONS = ("fp32", "fp16", "int8", "int4")
_BLOCKS = (128, 32)
"""Of int4, the faster first: a product reads its weights and their scales, and unpacks each block by itself."""
_MIXED = ("fp32", "int8")
"""Not fp16, which is for GPUs, nor int4, whose numbers would change by it, see ADR 36."""
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_building = threading.Lock()


def int4_forms(source: Source) -> list[FourBits]:
    """To be tried in turn; a block is no longer than the rows of the smallest product."""
    return [FourBits(block) for block in _BLOCKS if block <= max(_BLOCKS[-1], int(source.config["hidden_size"]))]


def build_decoder(
    source: Source,
    made: Path,
    scratch: Path,
    precision: str,
    form: Form,
    adapters: Sequence[PeftAdapter] = (),
) -> dict[str, Any]:
    """Fills the folder `made` with graph, adapters, tokenizer and chat template; the fields of its manifest.

    `scratch` keeps what other precisions may use again, `form` is that of int8 or int4. Raises ExportError for
    what cannot be built.
    """
    heads = int(source.config["num_attention_heads"])
    head_dim = int(source.config.get("head_dim") or source.config["hidden_size"] // heads)
    base = "fp32" if precision == "int8" else precision
    block = form.block if isinstance(form, FourBits) else None
    built = scratch / f"built-{base}{block or ''}"
    if not built.exists():
        _build(source, built, base, block)
        scales = {} if base == "fp16" else fold_scale(built / "model.onnx", head_dim)
        if adapters:
            add_adapters(built / "model.onnx", adapters, source.config, scales)
    if isinstance(form, EightBits):
        quantize_rows(built / "model.onnx", made, form)
    else:
        for name in ("model.onnx", "model.onnx.data"):
            if (built / name).exists():
                shutil.copyfile(built / name, made / name)
    if precision != "fp16":  # which is for GPUs
        fuse(made / "model.onnx", head_dim)
    if precision in _MIXED and not adapters:
        mix(made / "model.onnx", made / MIXED)
    for adapter in adapters:
        shutil.copyfile(built / adapter_file(adapter.name), made / adapter_file(adapter.name))
    special = _texts(source, made)
    settings = json.loads((built / "genai_config.json").read_text())["model"]
    ends = settings.get("eos_token_id")
    return {
        "context_length": int(source.config["max_position_embeddings"]),
        "vocab_size": int(source.config["vocab_size"]),
        "num_layers": int(source.config["num_hidden_layers"]),
        "num_kv_heads": int(source.config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "eos_token_ids": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "special_tokens": special,
        "adapters": [adapter.name for adapter in adapters],
    }


def _build(source: Source, to: Path, precision: str, block: int | None) -> None:
    try:
        from onnxruntime_genai.models import builder
    except ImportError as error:
        raise ExportError(NEEDS) from error
    # A window's cache is as long as everyone's: the engine's slots are of one length. And a norm of queries
    # and keys stays outside of the attention: ONNX Runtime's own for the CPU has none.
    options = ["windowed_kv_cache=false", "fuse_qk_norm_gqa=false", *([f"block_size={block}"] if block else [])]
    device = "cuda" if precision == "fp16" else "cpu"
    where = (str(source.folder), str(to), precision, device, str(to.parent / "cache"))
    with _building, _hushed():
        try:
            parsed = builder.parse_extra_options(None, *where, options)
            _say_windows(parsed["hf_details"]["hf_config"])
            builder.create_model(None, *where, **parsed)
        except Exception as error:  # the builder raises whatever torch and transformers raise
            raise ExportError(f"{source.name} could not be built: {type(error).__name__}: {error}") from error
    slice_logits(to / "model.onnx")


def _say_windows(config: Any) -> None:
    """The builder believes `layer_types` alone, and would drop the window of models that have it everywhere."""
    if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The builder reports its every step on standard output, and through a logger of ONNX Runtime."""
    told = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            yield
    finally:
        logging.disable(before)


def _texts(source: Source, made: Path) -> dict[str, str]:
    """Copies tokenizer and chat template; the special tokens by their roles, which templates name."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "README.md"):
        if (source.folder / name).exists():
            shutil.copyfile(source.folder / name, made / name)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if template:
        (made / "chat_template.jinja").write_text(template)
    known = tokenizer.special_tokens_map
    return {role: str(known[role]) for role in _ROLES if known.get(role) is not None}
