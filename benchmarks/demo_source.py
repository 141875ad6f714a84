"""The demo model as a Hugging Face folder, its weights taken back from the int8 folder it is shipped in.

What precisions lose is measured against these weights. Eight bits with a scale for each column hold them exactly,
so of int8 only the rounding of activations is seen; all others, peers' among them, round weights too.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.shapes import ROOT
from flink_llm.engine.quantize import LEVELS

SHIPPED = Path(__file__).parents[1] / "models" / "support-chat"
HEADS, KEYS, SIZE, MIDDLE = 4, 2, 64, 512
_PARTS = {
    "qkv_proj": (
        ("self_attn.q_proj", HEADS * SIZE),
        ("self_attn.k_proj", KEYS * SIZE),
        ("self_attn.v_proj", KEYS * SIZE),
    ),
    "o_proj": (("self_attn.o_proj", HEADS * SIZE),),
    "gate_proj": (("mlp.gate_proj", MIDDLE),),
    "up_proj": (("mlp.up_proj", MIDDLE),),
    "down_proj": (("mlp.down_proj", HEADS * SIZE),),
}
"""What a product's columns are, in their order."""


def demo_source(shipped: Path = SHIPPED, root: Path = ROOT) -> Path:
    """The folder, made once for each form of the shipped one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    manifest = json.loads((shipped / "manifest.json").read_text())
    folder = root / f"demo-{manifest['files']['model.onnx.data']['sha256'][:8]}"
    if (folder / "config.json").exists():
        return folder
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=manifest["vocab_size"],
            hidden_size=HEADS * SIZE,
            intermediate_size=MIDDLE,
            num_hidden_layers=manifest["num_layers"],
            num_attention_heads=HEADS,
            num_key_value_heads=KEYS,
            max_position_embeddings=manifest["context_length"],
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=manifest["eos_token_ids"][0],
            pad_token_id=0,
        )
    )
    weights = {name: torch.from_numpy(array.copy()) for name, array in _weights(shipped).items()}
    missing = model.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"{shipped} is another model than this takes back: {missing}")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(shipped / name, folder / name)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def _weights(shipped: Path) -> dict[str, NDArray[np.float32]]:
    held = {name: value.const_value for name, value in ir.load(shipped / "model.onnx").graph.initializers.items()}
    arrays = {name: np.asarray(value.numpy()) for name, value in held.items() if value is not None}
    found = {"model.embed_tokens.weight": _matrix(arrays, "lm_head").T}
    for name, array in arrays.items():
        if name.endswith("final_norm_layernorm.weight"):
            found["model.norm.weight"] = array
        elif name.endswith("layernorm.weight"):
            found[name] = array
        elif name.endswith(".MatMul.weight/bytes") and name.startswith("model."):
            layer, _, product = name.removesuffix(".MatMul.weight/bytes").rpartition(".")
            rows, begin = _matrix(arrays, f"{layer}.{product}").T, 0
            for part, count in _PARTS[product]:
                # The scale of the scores is in the queries' weights (ADR 30).
                scale = SIZE**0.5 if part.endswith("q_proj") else 1.0
                found[f"{layer.rpartition('.')[0]}.{part}.weight"] = rows[begin : begin + count] * np.float32(scale)
                begin += count
    return found


def _matrix(arrays: dict[str, NDArray[np.float32]], product: str) -> NDArray[np.float32]:
    """[inputs, outputs]; the scales of columns are of a product with a row in levels of its own."""
    name = f"{product}.MatMul.weight"
    levels = arrays[f"{name}/bytes"].astype(np.float32)
    matrix: NDArray[np.float32] = levels * (arrays[f"{name}/column_scales"] * LEVELS)
    return matrix
