"""Small models with random weights, one for each architecture that is served, as Hugging Face folders."""

import copy
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "<pad>", "</s>", "<mask>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCABULARY = 320

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_DECODER: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512}

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {**_DECODER, "tie_word_embeddings": True},
    "Qwen2": {**_DECODER, "tie_word_embeddings": True},
    "Qwen3": {**_DECODER, "head_dim": 32, "tie_word_embeddings": False},
    "Mistral": {**_DECODER, "sliding_window": 48},
    "Phi3": {**_DECODER, "original_max_position_embeddings": 512, "sliding_window": None},
    "Phi3 LongRoPE": {
        **_DECODER, "original_max_position_embeddings": 384, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "longrope", "type": "longrope", "rope_theta": 10_000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [4.0] * 8,
        },
    },
    "Gemma": {**_DECODER, "head_dim": 32},
    "Gemma2": {**_DECODER, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 48},
    "Granite": {**_DECODER, "logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
}  # fmt: skip
"""Configurations by the prefix of their classes in transformers, and what else is theirs."""

ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {**_SMALL, "max_position_embeddings": 128},
    "Roberta": {**_SMALL, "max_position_embeddings": 130, "type_vocab_size": 1},
    "XLMRoberta": {**_SMALL, "max_position_embeddings": 130, "type_vocab_size": 1},
    "ModernBert": {
        **_SMALL, "max_position_embeddings": 128, "global_attn_every_n_layers": 2, "local_attention": 16,
        "cls_token_id": 0, "sep_token_id": 2,
    },
    "DistilBert": {
        "vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "pad_token_id": 1,
        "initializer_range": 0.1, "max_position_embeddings": 128,
    },
    "Electra": {**_SMALL, "embedding_size": 32, "max_position_embeddings": 128},
    "MPNet": {**_SMALL, "max_position_embeddings": 130},
    "Camembert": {**_SMALL, "max_position_embeddings": 130},
}  # fmt: skip


def write_tokenizer(folder: Path, *, marks: bool = False) -> None:
    """A byte-level tokenizer without merges; `marks` puts <s> and </s> around a text, as encoders want."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if marks:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}'
    )


def decoder(folder: Path, kind: str, config: dict[str, Any] | None = None, seed: int = 1) -> Path:
    """A folder of a random decoder: `kind` is one of DECODERS, `config` stands in for its small one."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    prefix = kind.partition(" ")[0]
    settings = getattr(transformers, f"{prefix}Config")(**copy.deepcopy(config or DECODERS[kind]))  # which it changes
    model = getattr(transformers, f"{prefix}ForCausalLM")(settings)
    _vary(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def encoder(folder: Path, kind: str, head: str = "Model", seed: int = 1, **more: Any) -> Path:
    """A folder of a random encoder; `head` is Model, ForSequenceClassification or ForTokenClassification."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    settings = getattr(transformers, f"{kind}Config")(**{**ENCODERS[kind], **more})
    model = getattr(transformers, f"{kind}{head}")(settings)
    _vary(model)
    model.save_pretrained(folder)
    write_tokenizer(folder, marks=True)
    return folder


def _vary(model: Any) -> None:
    """Biases and norms of a fresh model are all zero and one, which hides faults in their export."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
