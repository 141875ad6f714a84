"""llama.cpp through the low-level interface of its Python package, over the same weights as GGUF.

Continuous batching by hand, as its own server does it: prompts of new requests in one batch, then one
token for every sequence per `llama_decode`, the likeliest picked over the rows of logits it gives.
"""

import ctypes
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from benchmarks.load import Request, rate, wait_until
from benchmarks.machine import CORES
from benchmarks.shapes import ROOT

FORMS: dict[str, dict[str, Any]] = {
    "Q4_0": {"ftype": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0},
    "Q4_0-pure": {"ftype": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "pure": True},
    "Q8_0": {"ftype": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0},
}
BATCH = 2048


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    pass


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def convert(source: Path, form: str, root: Path = ROOT) -> Path:
    """The GGUF file of a Hugging Face Llama at one of `FORMS`, made once."""
    to = root / f"{source.name}-{form}.gguf"
    if to.exists():
        return to
    plain = root / f"{source.name}-F32.gguf"
    if not plain.exists():
        _write(source, plain)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = CORES
    for name, value in FORMS[form].items():
        setattr(params, name, value)
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(to).encode(), ctypes.byref(params)):
        to.unlink(missing_ok=True)
        raise RuntimeError(f"llama.cpp could not quantise to {form}")
    return to


_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _write(source: Path, to: Path) -> None:
    """The weights in fp32 under llama.cpp's names, without a vocabulary."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(to), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_theta(config))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in load_file(source / "model.safetensors").items():
        array = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _rotary_order(array, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(_renamed(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _theta(config: dict[str, Any]) -> float:
    """Where transformers keeps the base of its rotary positions, since 5 and before."""
    return float((config.get("rope_parameters") or config).get("rope_theta", 10_000.0))


def _renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.{kind}"


def _rotary_order(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows as llama.cpp rotates them: pairs next to each other, not half a head apart."""
    size, width = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, size // heads // 2, width).swapaxes(1, 2)).reshape(size, width)


class LlamaCpp:
    """One GGUF file with a context for `rows` sequences of at most `context` tokens."""

    def __init__(self, path: Path, rows: int = 16, context: int = 512) -> None:
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * context, rows
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = CORES
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._rows = rows

    def run(self, requests: Sequence[Request]) -> float:
        """Tokens per second over the makespan; prompts of one moment are read together."""
        self.clear()
        began = time.perf_counter()
        coming, running = list(requests), _Running(self._rows)
        while coming or running.rows:
            new = []
            while coming and running.free and coming[0].at <= time.perf_counter() - began:
                new.append((running.free.pop(), coming.pop(0)))
            if not new and not running.rows:
                wait_until(began + coming[0].at)
                continue
            if new:
                best = self.read([(row, request.tokens, 0) for row, request in new]).argmax(axis=-1)
                for (row, request), token in zip(new, best, strict=True):
                    running.begin(row, request, int(token))
            if running.rows:
                self._step(running)
        return rate(requests, began)

    def read(self, parts: Sequence[tuple[int, Sequence[int], int]], every: bool = False) -> NDArray[np.float32]:
        """Reads (row, tokens, position) in one batch; logits after each part's last token, or after every one."""
        batch, count = self._batch, 0
        for row, tokens, position in parts:
            for i, token in enumerate(tokens):
                batch.token[count] = token
                batch.pos[count] = position + i
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = row
                batch.logits[count] = every or i == len(tokens) - 1
                count += 1
        batch.n_tokens = count
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode a batch")
        rows = count if every else len(parts)
        found = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (rows * self._vocabulary,)).reshape(rows, self._vocabulary)

    def clear(self) -> None:
        """Forgets everything read."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def _step(self, running: "_Running") -> None:
        parts = [(row, [token], position) for row, (token, position, _) in running.rows.items()]
        best = self.read(parts).argmax(axis=-1)
        for (row, _, _), token in zip(parts, best, strict=True):
            if running.said(row, int(token)):
                self._forget(row)

    def _forget(self, row: int) -> None:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), row, -1, -1)


class _Running:
    """Which sequence reads which token next: `rows` maps to (token, position, tokens still to say)."""

    def __init__(self, rows: int) -> None:
        self.free = list(range(rows - 1, -1, -1))
        self.rows: dict[int, tuple[int, int, int]] = {}

    def begin(self, row: int, request: Request, token: int) -> None:
        """A sequence whose prompt was read, and its first token."""
        self.rows[row] = (token, len(request.tokens), request.reply)
        self.said(row, token, 0)

    def said(self, row: int, token: int, read: int = 1) -> bool:
        """The next token of a row; whether it was the last."""
        _, position, left = self.rows[row]
        if left == 1:
            del self.rows[row]
            self.free.append(row)
            return True
        self.rows[row] = (token, position + read, left - 1)
        return False
