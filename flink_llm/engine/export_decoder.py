"""Decoders: onnxruntime-genai's builder, and our own eight bits over what it builds."""

import contextlib
import errno
import io
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flink_llm.engine.export_adapters import add_adapters
from flink_llm.engine.export_fused import fuse
from flink_llm.engine.export_logits import slice_logits
from flink_llm.engine.export_mixed import mix
from flink_llm.engine.export_peft import PeftAdapter
from flink_llm.engine.export_scale import fold_scale
from flink_llm.engine.export_source import NEEDS, PrecisionError, Source, first_line, read_by_transformers
from flink_llm.engine.model import MIXED, adapter_file
from flink_llm.engine.quantize import EightBits, Form, FourBits, quantize_rows, sweep
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
_HEAD = 16
"""Of what a head's size is a multiple: ONNX Runtime's attention takes no other."""
_LONG_ROPE = ("longrope", "su")
"""By its names in transformers, now and once."""
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_building = threading.Lock()


def int4_forms(source: Source) -> list[FourBits]:
    """To be tried in turn; a block is no longer than the rows of the smallest product."""
    return [FourBits(block) for block in _BLOCKS if block <= max(_BLOCKS[-1], source.number("hidden_size"))]


def sizes(source: Source) -> dict[str, int]:
    """What a manifest says of them. Raises ExportError for one that is missing, or cannot be served."""
    heads, hidden = source.number("num_attention_heads"), source.number("hidden_size")
    head_dim = int(source.config.get("head_dim") or hidden // heads)
    if head_dim % _HEAD:
        raise ExportError(f"{source.name} has heads of size {head_dim}: multiples of {_HEAD} can be served")
    return {
        "context_length": _context(source),
        "vocab_size": source.number("vocab_size"),
        "num_layers": source.number("num_hidden_layers"),
        "num_kv_heads": int(source.config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
    }


def _context(source: Source) -> int:
    """The longest text; of LongRoPE that of its short factors. Where a text outgrows them, all of its positions are
    rotated by others, those that the cache holds too."""
    positions = source.number("max_position_embeddings")
    rope = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) not in _LONG_ROPE:
        return positions
    short = source.config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return min(positions, int(short or source.number("original_max_position_embeddings")))


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
    fields = sizes(source)
    head_dim = fields["head_dim"]
    base = "fp32" if precision == "int8" else precision
    block = form.block if isinstance(form, FourBits) else None
    built = scratch / f"built-{base}{block or ''}"
    if not built.exists():
        half = scratch / f"half-{built.name}"
        shutil.rmtree(half, ignore_errors=True)
        _build(source, half, base, block)
        scales = {} if base == "fp16" else fold_scale(half / "model.onnx", head_dim)
        if adapters:
            add_adapters(half / "model.onnx", adapters, source.config, scales)
        half.rename(built)
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
        **fields,
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
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            kind = ExportError if precision == "fp32" else PrecisionError  # fp32 is what int8 is made of, too
            raise kind(f"{source.name} could not be built: {type(error).__name__}: {first_line(error)}") from error
    _keep_short(to / "model.onnx")
    slice_logits(to / "model.onnx")


def _say_windows(config: Any) -> None:
    """The builder believes `layer_types` alone, and would drop the window of models that have it everywhere."""
    if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def _keep_short(path: Path) -> None:
    """LongRoPE's graph chooses rotations by the longest row of a run, for all of them: here the short ones stay."""
    model = ir.load(path)
    graph = model.graph
    chosen = [node for node in graph if node.op_type == "If"]
    if not chosen:
        return
    for node in chosen:
        for old, short in zip(node.outputs, node.attributes["else_branch"].as_graph().outputs, strict=True):
            tensor = _constant(short)
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            new = ir.Value(name=old.name, const_value=tensor, shape=shape, type=kind)
            old.replace_all_uses_with(new)
            graph.register_initializer(new)
    sweep(graph)
    ir.save(model, path)  # what lies outside of the graph's file stays where it is


def _constant(value: ir.Value) -> ir.TensorProtocol:
    node = value.producer()
    if node is None or node.op_type != "Constant":
        raise ValueError(f"{value.name} is no constant")
    return node.attributes["value"].as_tensor()


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
    with read_by_transformers(source.name):
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if template:
        (made / "chat_template.jinja").write_text(template)
    known = tokenizer.special_tokens_map
    return {role: str(known[role]) for role in _ROLES if known.get(role) is not None}
