"""Tiny random models: a Llama and two BERTs, made in a second, exported as users' models are."""

import json
from pathlib import Path
from typing import Any

import pytest

LABELS = {
    "classifier": ["good", "bad", "other"],
    "token_classifier": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
}


def tokenizer_json(folder: Path) -> Path:
    """A byte-level tokenizer with three special tokens, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    return folder / "tokenizer.json"


def llama(folder: Path) -> Path:
    """A Hugging Face folder of a random Llama with a context of 512."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_json(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if features %}{{ features | tojson }}{% endif %}<s>"
    )
    return folder


def encoder(folder: Path, kind: str) -> Path:
    """A model folder of a tiny random encoder: an embedding table, one mixing layer, mean or logits.

    A token classifier tags by first letters: P begins a person, Q goes on with one, L is a place. A reranker
    adds up the documents' tokens and takes away the query's.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save
    from tokenizers import Tokenizer, pre_tokenizers, processors

    from flink_llm.engine.model import write_manifest

    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    labels = LABELS.get(kind, [])
    outputs = {"embedding": 16, "reranker": 1}.get(kind, len(labels))
    weights = {
        "table": random.standard_normal((320, 16)).astype(np.float32),
        "mix": random.standard_normal((16, outputs)).astype(np.float32),
    }
    if kind == "token_classifier":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        weights["table"] = np.eye(320, 16, 400, dtype=np.float32)
        weights["table"][:, 0] = 1
        for letter, label in (("P", 1), ("Q", 2), ("L", 3)):
            weights["table"][3 + alphabet.index(letter), label] = 4
        weights["mix"] = np.eye(16, outputs, dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "mix"], ["last_hidden_state"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
    ]
    shape: list[str | int] = ["batch", "tokens", outputs]
    name = "last_hidden_state"
    if kind == "token_classifier":
        nodes[1].output[0] = name = "logits"
    if kind in ("classifier", "reranker"):
        weights["axis"] = np.array([1])
        weights["last"] = np.array([2])
        nodes += [
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
            helper.make_node("Mul", ["last_hidden_state", "mask3"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "axis"], ["logits"], keepdims=0),
        ]
        name, shape = "logits", ["batch", outputs]
    given = ["input_ids", "attention_mask"]
    if kind == "reranker":
        given.append("token_type_ids")
        weights |= {"two": np.float32([2]), "one": np.float32([1])}
        nodes += [
            helper.make_node("Cast", ["token_type_ids"], ["type"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["type", "two"], ["twice"]),
            helper.make_node("Sub", ["twice", "one"], ["sign"]),
            helper.make_node("Mul", ["mask", "sign"], ["signed"]),
        ]
        nodes[3].input[0] = "signed"
        nodes = [*nodes[:3], *nodes[6:], *nodes[3:6]]
    inputs = [helper.make_tensor_value_info(each, TensorProto.INT64, ["batch", "tokens"]) for each in given]
    graph = helper.make_graph(
        nodes,
        "encoder",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    save(model, str(folder / "model.onnx"))
    path = tokenizer_json(folder)
    if kind == "reranker":
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
        tokenizer.save(str(path))
    write_manifest(
        folder,
        name=kind,
        kind=kind,
        architecture="Tiny",
        precision="fp32",
        context_length=64,
        vocab_size=320,
        labels=labels,
    )
    return folder


def decoder(folder: Path) -> Path:
    """A model folder of the tiny Llama."""
    from flink_llm.engine.export import export_decoder

    export_decoder(llama(folder.with_name(f"{folder.name}-source")), folder, name="tiny", precision="fp32")
    return folder


def changed(folder: Path, **fields: Any) -> Path:
    """The folder, with a manifest that says otherwise and names the files as they are now."""
    from flink_llm.engine.model import write_manifest

    says = json.loads((folder / "manifest.json").read_text())
    del says["files"], says["format"]
    write_manifest(folder, **(says | fields))
    return folder


def peft(folder: Path, modules: dict[str, int], *, seed: int, scale: float = 2.0, **config: Any) -> Path:
    """A PEFT folder of a random adapter of the tiny Llama: its modules (`self_attn.q_proj`) with their ranks."""
    import numpy as np

    save_file = pytest.importorskip("safetensors.numpy").save_file
    sizes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (64, 32),
        "self_attn.v_proj": (64, 32),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (64, 128),
        "mlp.up_proj": (64, 128),
        "mlp.down_proj": (128, 64),
    }
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        for module, rank in modules.items():
            inputs, outputs = sizes[module]
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = random.normal(0, 0.2, (rank, inputs)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(0, 0.2, (outputs, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(modules.values()))
    says = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted({module.partition(".")[2] for module in modules}),
        "rank_pattern": {module.partition(".")[2]: each for module, each in modules.items() if each != rank},
        "alpha_pattern": {module.partition(".")[2]: scale * each for module, each in modules.items() if each != rank},
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(says))
    return folder
