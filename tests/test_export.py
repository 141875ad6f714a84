"""Export of a tiny random model: measured against its original, refused below the bar, never half there."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime_genai")

from flink_llm.engine import export
from flink_llm.engine.export import export_decoder
from flink_llm.engine.model import open_model_folder
from flink_llm.errors import ExportError

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a Llama of two layers with random weights, byte-level tokenizer, template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_was_exported_opens_and_holds_what_was_measured(source: Path, tmp_path: Path, precision: str) -> None:
    to = tmp_path / "models" / "tiny"

    manifest = export_decoder(source, to, name="tiny", precision=precision)

    opened = open_model_folder(to).manifest
    assert opened == manifest
    assert (opened.kind, opened.precision, opened.context_length) == ("decoder", precision, 256)
    assert (opened.num_layers, opened.num_kv_heads, opened.head_dim, opened.eos_token_ids) == (2, 2, 16, [0])
    assert opened.parity["greedy_match"] == 1.0
    assert opened.parity["max_logit_difference"] <= export.LARGEST_DIFFERENCE[precision]
    assert [path.name for path in to.parent.iterdir()] == ["tiny"]


def test_below_the_bar_nothing_is_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(export.LARGEST_DIFFERENCE, "int4", 1e-6)

    with pytest.raises(ExportError, match=r"refused: int4 is not the original: .* \(bar 1e-06\)"):
        export_decoder(source, tmp_path / "tiny", name="tiny", precision="int4")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_built_leaves_nothing(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((source / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"no weights")

    with pytest.raises(ExportError, match="broken could not be built"):
        export_decoder(broken, tmp_path / "tiny", name="tiny", precision="fp32")

    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_what_stands_there_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")

    with pytest.raises(ExportError, match="exists already"):
        export_decoder(source, tmp_path, name="tiny", precision="fp32")

    assert (tmp_path / "kept").read_text() == "mine"


def test_another_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))

    with pytest.raises(ExportError, match="BertModel cannot be served; these can: LlamaForCausalLM"):
        export_decoder(tmp_path, tmp_path / "out", name="bert", precision="fp32")


def test_no_hugging_face_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a Hugging Face folder"):
        export_decoder(tmp_path, tmp_path / "out", name="nothing", precision="fp32")
