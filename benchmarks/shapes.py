"""Models of a known shape with random weights, and texts of a known number of tokens.

Exported folders are kept below build/bench, under a digest of the code that exported them.
"""

import hashlib
import itertools
import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from flink_llm.engine import export

ROOT = Path(__file__).parents[1] / "build" / "bench"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
END = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. Its context is that of the benchmarks, not of the model it is named after."""

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    context: int


SMOLLM2 = Shape("smollm2-135m", 49152, 576, 1536, 30, 9, 3, 2048)
TINY = Shape("tiny", 1024, 64, 128, 2, 4, 2, 512)


def precisions() -> list[str]:
    """Every precision that is shipped for a CPU."""
    return [name for name in get_args(export.Precision) if name not in ("auto", "fp16")]


def source(shape: Shape, root: Path = ROOT) -> Path:
    """A Hugging Face folder of the shape, made once. The end token is never the likeliest: its row is zero."""
    folder = root / shape.name
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context, rope_theta=100_000.0, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    write_tokenizer(folder, shape.vocabulary)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level tokenizer of `size` tokens, most of them a space and one to four letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([END, *alphabet])}
    merges = []
    for word in words(size - len(vocabulary)):
        merges.append(("Ġ" + word[:-1], word[-1]))
        vocabulary["Ġ" + word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def words(count: int) -> list[str]:
    """The first `count` words over the alphabet, shorter ones first: each is made from one before it."""
    letters = (itertools.product(string.ascii_lowercase, repeat=length) for length in range(1, 5))
    return ["".join(word) for word in itertools.islice(itertools.chain.from_iterable(letters), count)]


def prompt(shape: Shape, seed: object, length: int) -> tuple[list[int], str]:
    """`length` random tokens, and the text that is exactly them."""
    first = 257  # behind the end token and the bytes
    drawn = random.Random(str(seed))
    tokens = [drawn.randrange(first, shape.vocabulary) for _ in range(length)]
    known = _words(shape.vocabulary - first)
    return tokens, "".join(" " + known[token - first] for token in tokens)


_known: dict[int, list[str]] = {}


def _words(count: int) -> list[str]:
    if count not in _known:
        _known[count] = words(count)
    return _known[count]


def exported(folder: Path, precision: str, root: Path = ROOT, name: str = "") -> Path:
    """The model folder of a Hugging Face folder at a precision, exported once by this code."""
    weights = next(folder.glob("*.safetensors"))
    stamp = f"{folder.resolve()}/{weights.stat().st_mtime_ns}/{_code()}"
    name = name or folder.name
    to = root / f"{name}-{precision}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}"
    if not to.exists():
        export.export_model(folder, to, export.Order(name, precision))  # type: ignore[arg-type]
    return to


def _code() -> str:
    files = sorted(Path(export.__file__).parent.glob("*.py"))
    relevant = [file.read_bytes() for file in files if file.stem.startswith(("export", "quant", "graph"))]
    return hashlib.sha256(b"".join(relevant)).hexdigest()
