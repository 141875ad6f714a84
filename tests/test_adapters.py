"""LoRA adapters: replies are those of the merged original, whoever shares a step, and what does not fit is refused."""

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime_genai")
pytest.importorskip("safetensors")

import torch
from click.testing import CliRunner
from safetensors.numpy import save, save_file

from benchmarks import small_models
from flink_llm.cli import main
from flink_llm.engine import export as export_module
from flink_llm.engine.decoder import Decoder
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.export import Order, export_model
from flink_llm.engine.export_peft import merged, read_peft
from flink_llm.engine.generation import Model
from flink_llm.engine.model import adapter_file, open_model_folder
from flink_llm.engine.parity import LARGEST_DIFFERENCE
from flink_llm.engine.protocol import Submit
from flink_llm.engine.readers import Embedder
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.stock import needed_bytes
from flink_llm.engine.tensors import read_tensors
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.engine.work import WorkTable
from flink_llm.errors import ExportError, ModelFolderError, RecordError
from tests import tiny

ONE = {"self_attn.q_proj": 4, "self_attn.v_proj": 2}
TWO = {"self_attn.k_proj": 3, "self_attn.o_proj": 3, "mlp.gate_proj": 5, "mlp.up_proj": 3, "mlp.down_proj": 3}
NAMES = ("", "one", "two")
PROMPTS = ["Hello there", "The parcel", "x", "Where is my order 1042? Where is my order 1043?"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("lora") / "llama")


@pytest.fixture(scope="module")
def adapters(source: Path) -> dict[str, Path]:
    return {
        "one": tiny.peft(source.parent / "one", ONE, seed=1),
        "two": tiny.peft(source.parent / "two", TWO, seed=2, use_rslora=True, scale=1.0),
    }


@pytest.fixture(scope="module")
def folders(source: Path, adapters: dict[str, Path]) -> dict[str, Path]:
    made = {}
    for precision in ("fp32", "int8"):
        made[precision] = source.parent / precision
        export_model(source, made[precision], Order("tiny", precision, adapters=adapters))
    return made


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["fp32"]


def run(folder: Path, work, kind=Model, **settings):
    """What `work` says of the folder's model, in an engine of its own."""

    async def whole():
        table = WorkTable(OnnxBackend(HostSettings(device="cpu", threads=1, **({"slots": 4} | settings))))
        model = kind(table, "tiny", str(folder))
        await model.load()
        try:
            return await work(model)
        finally:
            await table.close()

    return asyncio.run(whole())


async def say(model: Model, prompt: str, adapter: str, tokens: int = 24) -> str:
    return (await model.generate(prompt, adapter=adapter, max_tokens=tokens)).text


@pytest.mark.parametrize("name", NAMES)
def test_replies_are_those_of_the_original_with_the_adapter_in_its_weights(source, adapters, folder, name) -> None:
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes(), 320)
    expected = []
    with merged(original, read_peft(name, adapters[name])) if name else contextlib.nullcontext():
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode_marked(prompt)])
            asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
            found = original.generate(ids, attention_mask=torch.ones_like(ids), **asked)
            expected.append(tokenizer.decode([token for token in found[0, ids.shape[1] :].tolist() if token != 2]))

    async def replies(model):
        return [await say(model, prompt, name) for prompt in PROMPTS]

    assert run(folder, replies) == expected


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_whoever_shares_a_step_each_gets_its_own_adapter(folders, precision) -> None:
    asked = [(f"{prompt} {name}"[:40], name) for prompt in PROMPTS for name in NAMES]

    async def alone(model):
        return [await say(model, *each) for each in asked]

    async def together(model):
        return list(await asyncio.gather(*(say(model, *each) for each in asked)))

    expected = run(folders[precision], alone)
    assert run(folders[precision], together, slots=6) == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_without_an_adapter_it_is_the_model_to_the_bit(source, folders, precision, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FLINK_LLM_KERNELS", "off")  # they are for whole layers, which adapters divide
    export_model(source, tmp_path / "plain", Order("tiny", precision))
    plain, adapted = (
        Decoder(open_model_folder(each), device="cpu", threads=1, slots=3)
        for each in (tmp_path / "plain", folders[precision])
    )
    for decoder in (plain, adapted):
        for slot in range(3):
            decoder.prefill(slot, [5 + slot, 6, 7], 0)
    adapted.adapt(1, "two")
    with_others = [plain.step([0, 1, 2], [8, 9, 10]).copy(), adapted.step([0, 1, 2], [8, 9, 10])]
    assert np.array_equal(with_others[0][[0, 2]], with_others[1][[0, 2]])
    assert not np.allclose(with_others[0][1], with_others[1][1])
    adapted.adapt(1, "")
    plain.cut(1, 3), adapted.cut(1, 3)
    assert np.array_equal(plain.step([1], [9])[1], adapted.step([1], [9])[1])
    assert np.array_equal(plain.prefill(0, [5, 6, 7, 8], 0), adapted.prefill(0, [5, 6, 7, 8], 0))


def test_a_beginning_is_shared_by_those_of_one_adapter_alone(folder) -> None:
    prompt = "You are a helpful voice. " * 8
    order = ["", "one", "two", "one", "", "two", "two"]

    expected = {}
    for name in NAMES:

        async def fresh(model, name=name):
            return await say(model, prompt, name)

        expected[name] = run(folder, fresh)

    async def one_after_another(model):
        return [await say(model, prompt, name) for name in order]

    for slots in (1, 4):
        assert run(folder, one_after_another, slots=slots) == [expected[name] for name in order]
    assert len(set(expected.values())) == len(NAMES)


def test_guesses_change_no_reply_of_an_adapter(folder) -> None:
    async def replies(model):
        return [await say(model, "one two one two one two one", name, 64) for name in NAMES]

    assert run(folder, replies, speculation=True) == run(folder, replies, speculation=False)


def test_what_overflows_is_its_own_rows_alone(folder, tmp_path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    path = broken / adapter_file("two")
    tensors = {name: np.full_like(array, 3e38) for name, array in read_tensors(path.read_bytes()).items()}
    save_file(tensors, path)
    found = []
    for each in (folder, tiny.changed(broken)):
        decoder = Decoder(open_model_folder(each), device="cpu", threads=1, slots=3)
        for slot, name in enumerate(NAMES):
            decoder.prefill(slot, [5, 6, 7], 0)
            decoder.adapt(slot, name)
        found.append(decoder.step([0, 1, 2], [8, 8, 8]).copy())
    assert not np.isfinite(found[1][2]).all()
    assert np.array_equal(found[0][:2], found[1][:2])


def test_an_unknown_adapter_is_the_records_failure(folder, tmp_path) -> None:
    async def ask(model):
        await say(model, "hello", "on")

    with pytest.raises(RecordError, match="adapter of tiny: unknown name 'on'; did you mean 'one'") as caught:
        run(folder, ask)
    assert caught.value.code == "unknown_adapter"


def test_an_encoder_has_no_adapters(tmp_path) -> None:
    folder = tiny.encoder(tmp_path / "embedding", "embedding")

    async def ask(embed):
        asked = {"kind": "embed", "work": "w", "request_id": "r", "text": "hello", "adapter": "one"}
        return [event async for event in embed._engine.submit(Submit(call=0, model=embed.loaded.sha256, **asked))]

    [fault] = run(folder, ask, Embedder)
    assert (fault.code, fault.message) == ("unknown_adapter", "embedding is an encoder: it has no adapters")
    with pytest.raises(ExportError, match="BertModel is an encoder: it cannot have adapters"):
        source = small_models.encoder(tmp_path / "bert", "Bert")
        export_model(source, tmp_path / "made", Order("tiny", "fp32", adapters={"one": tmp_path}))


def test_adapters_are_in_the_manifest_and_in_what_the_memory_needs(folder) -> None:
    opened = open_model_folder(folder)
    manifest = opened.manifest
    assert manifest.adapters == ["one", "two"]
    assert set(manifest.parity["adapters"]) == {"one", "two"}
    without = msgspec.structs.replace(manifest, adapters=[])
    held = sum(len(opened.files[adapter_file(name)]) for name in ("one", "two"))
    assert needed_bytes(manifest, 4) - needed_bytes(without, 4) == held


# What is refused at the load.


def spoiled(folder: Path, to: Path, change) -> Path:
    shutil.copytree(folder, to)
    path = to / adapter_file("one")
    tensors = {name: array.copy() for name, array in read_tensors(path.read_bytes()).items()}
    save_file(change(tensors) or tensors, path)
    return tiny.changed(to)


A = "layers.0.attn.qkv_proj.A"


def twice(name, array):
    """A matrix of twice the rank."""
    return np.repeat(array, 2, axis="BA".index(name[-1]))


SPOILED = {
    "another product": (
        lambda t: {"layers.7.mlp.up_proj.A": t[A]},
        "has layers.7.mlp.up_proj.A, of which the graph",
    ),
    "nothing": (lambda t: {"nothing": np.zeros(0, np.float32)}, "has nothing, of which the graph"),
    "half": (lambda t: {name: t[name] for name in t if name != A}, r"is \[64, 0\] and \[6, 128\] at layers.0.attn.qkv"),
    "another size": (
        lambda t: t | {A: t[A][1:].copy()},
        r"is \[63, 6\] and \[6, 128\] at .*qkv_proj, which is 64 to 128",
    ),
    "another rank": (lambda t: {n: twice(n, v) if "layers.1" in n else v for n, v in t.items()}, "other ranks"),
    "half precision": (lambda t: {n: v.astype(np.float16) for n, v in t.items()}, "is float16 and float16"),
    "no number": (lambda t: t[A].fill(np.nan), "is not finite at layers.0.attn.qkv_proj"),
    "doubles": (lambda t: {n: v.astype(np.float64) for n, v in t.items()}, "is F64, not one of F32"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_an_adapter_that_is_not_the_graphs_is_refused_at_the_load(folder, tmp_path, case) -> None:
    change, says = SPOILED[case]
    opened = open_model_folder(spoiled(folder, tmp_path / "spoiled", change))
    with pytest.raises(ModelFolderError, match=f"tiny: .*{says}"):
        Decoder(opened, device="cpu", threads=1, slots=1)


def test_an_adapter_without_its_file_is_refused(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "lost")
    (tmp_path / "lost" / adapter_file("two")).unlink()
    opened = open_model_folder(tiny.changed(tmp_path / "lost"))
    with pytest.raises(ModelFolderError, match=r"the adapter two has no file adapter\.two\.safetensors"):
        Decoder(opened, device="cpu", threads=1, slots=1)
    with pytest.raises(ModelFolderError, match="cannot be read"):
        open_model_folder(tiny.changed(tmp_path / "lost", adapters=["../two"]))


SHAPES = st.lists(st.integers(0, 4), max_size=3)


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), SHAPES, max_size=4))
def test_what_safetensors_writes_is_read(shapes) -> None:
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found = read_tensors(save(arrays))
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


@given(st.binary(max_size=80), st.integers(0, 200), st.binary(max_size=4))
def test_what_is_no_file_of_tensors_is_a_value_error(garbage, at, patch) -> None:
    good = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
    for data in (garbage, good[:at], good[:at] + patch + good[at + len(patch) :]):
        try:
            found = read_tensors(data)
        except ValueError:
            continue
        assert sum(array.nbytes for array in found.values()) <= 2 * len(data)


# What is refused at the export.

REFUSED = {
    "type": ({"peft_type": "IA3"}, "adapter one is of type 'IA3': only LORA"),
    "dora": ({"use_dora": True}, "adapter one has use_dora"),
    "bias": ({"bias": "lora_only"}, "adapter one has bias 'lora_only'"),
    "modules": ({"modules_to_save": ["lm_head"]}, "adapter one has modules_to_save"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "adapter one was begun by 'pissa_niter_4'"),
    "rank": ({"r": 9, "rank_pattern": {}}, "adapter one has rank 4 at .*q_proj, its configuration says 9"),
    "alpha": ({"lora_alpha": "much"}, "lora_alpha of .* is no number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_is_more_than_products_is_refused_by_name(source, tmp_path, case) -> None:
    changes, says = REFUSED[case]
    folder = tiny.peft(tmp_path / "one", ONE, seed=1, **changes)
    with pytest.raises(ExportError, match=says):
        export_model(source, tmp_path / "made", Order("tiny", "fp32", adapters={"one": folder}))
    assert not (tmp_path / "made").exists()


LAYERS = "base_model.model.model.layers"
MISPLACED = {
    "module": (f"{LAYERS}.0.self_attn.rotary.lora_{{}}.weight", (64, 64), "changes model.layers.0.self_attn.rotary"),
    "head": ("base_model.model.lm_head.lora_{}.weight", (64, 320), "changes lm_head, which cannot be served"),
    "layer": (f"{LAYERS}.7.mlp.up_proj.lora_{{}}.weight", (64, 128), "which the model does not have"),
    "size": (f"{LAYERS}.0.mlp.up_proj.lora_{{}}.weight", (32, 128), "is 32 to 128 at .*, the model 64 to 128"),
    "table": ("base_model.model.model.embed_tokens.lora_embedding_{}", (64, 64), "neither A nor B of a LoRA"),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_an_adapter_of_something_else_is_refused_by_name(source, tmp_path, case) -> None:
    name, (inputs, outputs), says = MISPLACED[case]
    folder = tiny.peft(tmp_path / "one", ONE, seed=1)
    tensors = read_tensors((folder / "adapter_model.safetensors").read_bytes())
    extra = {name.format("A"): np.ones((4, inputs), np.float32), name.format("B"): np.ones((outputs, 4), np.float32)}
    save_file(dict(tensors) | extra, folder / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=f"adapter one .*{says}"):
        export_model(source, tmp_path / "made", Order("tiny", "fp32", adapters={"one": folder}))


def test_an_adapter_that_is_not_the_originals_is_refused(source, adapters, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export_module, "merged", lambda original, adapter: contextlib.nullcontext())
    with pytest.raises(ExportError, match="refused: fp32 is not the original: with adapter one logit_difference is "):
        export_model(source, tmp_path / "made", Order("tiny", "fp32", adapters=adapters))
    assert not (tmp_path / "made").exists()


def test_the_command_takes_adapters_by_name(source, adapters, tmp_path) -> None:
    def export(*given: str):
        asked = ["export", str(source), "--to", str(tmp_path / "made"), "--precision", "fp32"]
        return CliRunner().invoke(main, [*asked, *(part for each in given for part in ("--adapter", each))])

    assert "say NAME=FOLDER" in export("one").output
    assert "each name once" in export("one=a", "one=b").output
    assert "'a.b' is no adapter's name" in export(f"a.b={adapters['one']}").output
    assert "is no adapter of PEFT" in export(f"one={tmp_path}").output
    assert export(f"one={adapters['one']}").exit_code == 0
    assert open_model_folder(tmp_path / "made").manifest.adapters == ["one"]
    assert "made has the adapters one" in CliRunner().invoke(main, ["models", str(tmp_path / "made")]).output


@pytest.mark.parametrize(
    "kind",
    [
        each if each in ("Phi3", "Qwen3") else pytest.param(each, marks=pytest.mark.slow)
        for each in small_models.DECODERS
    ],
)
def test_every_module_of_every_architecture_can_be_changed(kind, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    source = small_models.decoder(tmp_path / "source", kind)
    original = AutoModelForCausalLM.from_pretrained(source)
    random = np.random.default_rng(1)
    tensors = {}
    for module, part in original.named_modules():
        if module.endswith("_proj"):
            outputs, inputs = part.weight.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = random.normal(0, 0.2, (4, inputs)).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = random.normal(0, 0.2, (outputs, 4)).astype(np.float32)
    folder = tiny.peft(tmp_path / "all", ONE, seed=1)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    for precision in ("fp32", "int8"):
        made = export_model(source, tmp_path / precision, Order("tiny", precision, adapters={"all": folder}))
        assert made.parity["adapters"]["all"]["logit_difference"] <= LARGEST_DIFFERENCE[precision]
