"""Mixed runs: a part of a prompt and everybody's next tokens in one run, as if in two."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime_genai")

from flink_llm.engine import graphs
from flink_llm.engine import model as model_module
from flink_llm.engine.decoder import Decoder
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.export import export_decoder
from flink_llm.engine.export_mixed import mix
from flink_llm.engine.generation import Model
from flink_llm.engine.model import DATA, MIXED, held_twice, open_model_folder
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.stock import needed_bytes
from flink_llm.engine.work import WorkTable
from flink_llm.errors import ModelFolderError
from tests import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module", params=["fp32", "int8"])
def folder(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("models") / request.param
    export_decoder(source, to, name="tiny", precision=request.param)
    return to


def decoder(folder: Path, slots: int = 6, mixed_mb: int = 1) -> Decoder:
    made = Decoder(open_model_folder(folder), device="cpu", threads=1, slots=slots, mixed_mb=mixed_mb)
    made.warm_up()
    return made


def test_a_mixed_run_is_a_step_and_a_prompts_part(folder: Path) -> None:
    """Slots 1 and 3 decode, 2 between them holds something, 5 is read in three parts."""
    apart, mixed = decoder(folder, mixed_mb=0), decoder(folder)
    assert (apart.mixes, mixed.mixes) == (False, True)
    for each in (apart, mixed):
        each.prefill(1, [5, 6, 7], 0)
        each.prefill(2, [8, 9], 0)
        each.prefill(3, [10, 11, 12, 13], 0)
    prompt = list(range(20, 40))
    start = 0
    for i, count in enumerate((7, 12, 1)):
        chunk = prompt[start : start + count]
        wanted = apart.prefill(5, chunk, start), apart.step([1, 3], [30 + i, 40 + i])[[1, 3]]
        last, every = mixed.step_beside([1, 3], [30 + i, 40 + i], 5, chunk, start)
        np.testing.assert_allclose(last, wanted[0], atol=1e-4)
        np.testing.assert_allclose(every[[1, 3]], wanted[1], atol=1e-4)
        start += count
    for slots in ([1, 2, 3, 5], [5], [2]):
        np.testing.assert_allclose(
            mixed.step(slots, [50] * len(slots))[slots], apart.step(slots, [50] * len(slots))[slots], atol=1e-4
        )


def test_threads_of_sessions_are_told_when_to_sleep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = []
    session = graphs.ort.InferenceSession

    def opened(path: str, options: Any, **other: Any) -> Any:
        entries.append((Path(path).name, options.get_session_config_entry("session.intra_op.spin_duration_us")))
        return session(path, options, **other)

    monkeypatch.setattr(graphs.ort, "InferenceSession", opened)
    decoder(folder)
    assert entries == [("model.onnx", graphs.SPIN_US), (MIXED, graphs.SPIN_US)]


def test_eight_bits_are_the_same_to_the_bit(source: Path, tmp_path: Path) -> None:
    export_decoder(source, tmp_path / "int8", name="tiny", precision="int8")
    apart, mixed = decoder(tmp_path / "int8", mixed_mb=0), decoder(tmp_path / "int8")
    for each in (apart, mixed):
        each.prefill(0, [5, 6, 7], 0)
    wanted = apart.prefill(1, [8, 9, 10], 0), apart.step([0], [11])[0]
    last, every = mixed.step_beside([0], [11], 1, [8, 9, 10], 0)
    assert np.array_equal(last, wanted[0]) and np.array_equal(every[0], wanted[1])


def test_a_prompt_between_those_who_decode_is_read_by_itself(folder: Path) -> None:
    made = decoder(folder)
    assert made.fits_beside([1, 3], 0) and made.fits_beside([1, 3], 4) and made.fits_beside([1], 2)
    assert not made.fits_beside([1, 3], 2)
    assert not decoder(folder, mixed_mb=0).fits_beside([1, 3], 0)
    assert not decoder(folder, slots=1).mixes, "one slot never has both"


def replies(folder: Path, mixed_mb: int, *, failing: int = 0) -> tuple[list[str], int]:
    """Of prompts that come one after another, and how many mixed runs there were; the first ones fail."""
    runs: list[Any] = []

    async def inside() -> list[str]:
        backend = OnnxBackend(HostSettings(device="cpu", slots=8, threads=1, cache_mb=0, mixed_mb=mixed_mb))
        table = WorkTable(backend)
        model = Model(table, "tiny", str(folder))
        try:
            await model.load()
            (served,) = backend._models.values()
            beside = served._decoder.step_beside

            def counted(*given: Any) -> Any:
                runs.append(given)
                if len(runs) <= failing:
                    raise RuntimeError("broken")
                return beside(*given)

            served._decoder.step_beside = counted

            async def one(i: int) -> str:
                await asyncio.sleep(0.005 * i)
                return (await model.generate(f"{i} " * (3 + 40 * (i % 3)), max_tokens=60, temperature=0.0)).text

            return list(await asyncio.gather(*map(one, range(24))))
        finally:
            await table.close()

    return asyncio.run(inside()), len(runs)


def test_replies_are_the_same_with_and_without_mixed_runs(folder: Path) -> None:
    (apart, none), (mixed, some) = replies(folder, 0), replies(folder, 1)
    assert apart == mixed
    assert none == 0 < some


def test_a_run_that_fails_is_done_in_two(folder: Path) -> None:
    assert replies(folder, 1, failing=3)[0] == replies(folder, 0)[0]


def more(graph: onnx_ir.Graph) -> None:
    kind = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.inputs.append(onnx_ir.Value(name="extra", shape=onnx_ir.Shape([1]), type=kind))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (more, "has a surplus input 'extra'"),
        (lambda graph: rename(graph.inputs, "chunk_total"), "has no input 'chunk_total'"),
        (lambda graph: rename(graph.outputs, "chunk_present.0.key"), "has no output 'chunk_present.0.key'"),
    ],
)
def test_a_form_that_is_another_than_the_manifest_says_is_refused(
    folder: Path, tmp_path: Path, change: Any, text: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = onnx_ir.load(copy / MIXED)
    change(model.graph)
    onnx_ir.save(model, copy / MIXED)
    tiny.changed(copy)
    with pytest.raises(ModelFolderError, match=f"^tiny: the graph {text}"):
        decoder(copy)
    assert not decoder(copy, mixed_mb=0).mixes, "what is not used does no harm"


def rename(values: Any, name: str) -> None:
    named(values, name).name = "zz_another"


def named(values: Any, name: str) -> onnx_ir.Value:
    return next(value for value in values if value.name == name)


def test_what_a_graph_must_be_to_have_the_form(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.onnx", tmp_path)
    assert not mix(tmp_path / "model.onnx", tmp_path / MIXED), "its weights lie in no file"
    shutil.copy(folder / DATA, tmp_path)
    assert mix(tmp_path / "model.onnx", tmp_path / MIXED)
    (tmp_path / MIXED).unlink()
    model = onnx_ir.load(tmp_path / "model.onnx")
    mask = named(model.graph.inputs, "attention_mask")
    shape = onnx_ir.node("Shape", [mask])
    shape.outputs[0].name = "looks_at_all"
    model.graph.append(shape)
    model.graph.outputs.append(shape.outputs[0])
    onnx_ir.save(model, tmp_path / "model.onnx")
    assert not mix(tmp_path / "model.onnx", tmp_path / MIXED)
    assert not (tmp_path / MIXED).exists()


def test_four_bits_have_no_such_form(source: Path, tmp_path: Path) -> None:
    manifest = export_decoder(source, tmp_path / "int4", name="tiny", precision="int4")
    assert (MIXED in manifest.files, held_twice(manifest, 512)) == (False, 0)


def test_weights_that_are_held_twice_are_reckoned_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "MB", 1000)  # tiny models have less than a MB
    manifest = open_model_folder(folder).manifest
    weights = manifest.files[DATA].bytes
    most = -(-weights // 1000)
    assert (held_twice(manifest, most), held_twice(manifest, most - 1), held_twice(manifest, 0)) == (weights, 0, 0)
    assert needed_bytes(manifest, 4, most) - needed_bytes(manifest, 4, 0) == weights
