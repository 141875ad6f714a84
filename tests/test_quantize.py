"""Eight bits with one scale per row: near the original, exact whoever shares the batch, never saturated."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnxruntime as ort
from onnx import TensorProto, helper, load, numpy_helper, save

from flink_llm.engine.quantize import LEVELS, SIGNED_LEVELS, EightBits, quantize_rows

WIDTH, VOCABULARY = 64, 40


def graph(folder: Path, nodes, weights, inputs, outputs) -> Path:
    """Writes a graph of fp32 tensors; `inputs` and `outputs` are shapes by name."""

    def declared(shapes):
        kinds = {"input_ids": TensorProto.INT64}
        return [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
            for name, shape in shapes.items()
        ]

    made = helper.make_graph(
        nodes,
        "graph",
        declared(inputs),
        declared(outputs),
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "model.onnx")
    return folder / "model.onnx"


def random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(path: Path, **feeds):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in load(path, load_external_data=False).graph.node]


FORMS = {"signed": SIGNED_LEVELS, "unsigned": LEVELS}


@pytest.fixture(params=FORMS)
def form(request):
    return EightBits(request.param)


@pytest.fixture
def pair(tmp_path, form):
    """Two products of one input."""
    nodes = [helper.make_node("MatMul", ["x", name], [f"y_{name}"], name=name) for name in ("a", "b")]
    weights = {"a": random(WIDTH, 32), "b": random(WIDTH, 16, seed=2)}
    source = graph(
        tmp_path / "source",
        nodes,
        weights,
        {"x": ["batch", "tokens", WIDTH]},
        {"y_a": ["batch", "tokens", 32], "y_b": ["batch", "tokens", 16]},
    )
    assert quantize_rows(source, tmp_path / "made", form) == 2
    return source, tmp_path / "made" / "model.onnx", weights


def by_hand(x: np.ndarray, weights: np.ndarray, levels: int) -> np.ndarray:
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scales = np.abs(weights).max(axis=0) / levels
    return (np.rint(x / largest * 127) @ np.rint(weights / scales)) * scales * largest / 127


def test_it_is_what_it_says(pair, form):
    source, made, weights = pair
    x = random(3, 5, WIDTH, seed=3) * np.array([0.01, 1, 300])[:, None, None].astype(np.float32)

    for found, exact, matrix in zip(run(made, x=x), run(source, x=x), weights.values(), strict=True):
        wanted = by_hand(x.astype(np.float64), matrix, FORMS[form.weights])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(x).max())
        for row in range(3):
            cosine = (found[row] * exact[row]).sum() / (np.linalg.norm(found[row]) * np.linalg.norm(exact[row]))
            assert cosine > 0.999


def test_products_of_one_input_round_it_once(pair, tmp_path):
    _, made, _ = pair
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(made), options, providers=["CPUExecutionProvider"])

    assert kinds(tmp_path / "run.onnx").count("QuantizeLinear") == 1
    assert kinds(tmp_path / "run.onnx").count("MatMulIntegerToFloat") == 2
    assert "MatMul" not in kinds(made)


def test_a_row_does_not_feel_the_others(pair):
    _, made, _ = pair
    x = random(16, 1, WIDTH, seed=4)
    first = run(made, x=x)

    others = random(16, 1, WIDTH, seed=5) * 1000
    others[3] = x[3]
    alone = run(made, x=x[3:4])

    for before, after, single in zip(first, run(made, x=others), alone, strict=True):
        np.testing.assert_array_equal(after[3], before[3])
        np.testing.assert_array_equal(single[0], before[3])


def test_a_row_of_zeros_is_zeros(pair):
    _, made, _ = pair
    x = random(2, 3, WIDTH)
    x[1, 1] = 0

    for found in run(made, x=x):
        np.testing.assert_array_equal(found[1, 1], 0)
        assert np.isfinite(found).all()


def test_the_largest_values_do_not_saturate(tmp_path, form):
    """255 * 127 * 2 is beyond the 16 bits in which machines with AVX2 and no VNNI add pairs of signed products."""
    weights = np.ones((WIDTH, 8), dtype=np.float32)
    weights[:, 4:] = -1
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    source = graph(tmp_path, nodes, {"w": weights}, {"x": ["rows", WIDTH]}, {"y": ["rows", 8]})
    quantize_rows(source, tmp_path / "made", form)

    made = load(tmp_path / "made" / "model.onnx")
    held = next(numpy_helper.to_array(tensor) for tensor in made.graph.initializer if tensor.name == "w/bytes")
    if form.weights == "signed":
        assert 255 * int(np.abs(held.astype(int)).max()) * 2 < 2**15
    for sign in (1, -1):
        x = np.full((5, WIDTH), sign, dtype=np.float32)
        np.testing.assert_allclose(run(tmp_path / "made" / "model.onnx", x=x)[0], x @ weights, rtol=1e-6)


@pytest.fixture
def tied(tmp_path):
    """An embedding and logits by one matrix, as the builder writes them."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["table"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "input_ids"], ["x"], name="embedding"),
        helper.make_node("MatMul", ["x", "w"], ["logits"], name="head"),
    ]
    return graph(
        tmp_path / "source",
        nodes,
        {"w": random(WIDTH, VOCABULARY)},
        {"input_ids": ["batch", "tokens"]},
        {"logits": ["batch", "tokens", VOCABULARY]},
    )


def test_embedding_and_logits_share_one_tensor_of_bytes(tied, tmp_path, form):
    quantize_rows(tied, tmp_path / "made", form)

    made = tmp_path / "made" / "model.onnx"
    tensors = {value.name: value.data_type for value in load(made).graph.initializer if len(value.dims) == 2}
    assert len([kind for kind in tensors.values() if kind in (TensorProto.INT8, TensorProto.UINT8)]) == 1
    ids = np.arange(12).reshape(3, 4)
    found, exact = run(made, input_ids=ids)[0], run(tied, input_ids=ids)[0]
    assert np.abs(found - exact).max() < 0.05 * exact.std() * 3
    assert [value.name for value in load(made).graph.output] == ["logits"]


def test_without_the_head_the_matrix_of_the_logits_stays(tied, tmp_path):
    assert quantize_rows(tied, tmp_path / "made", EightBits(head=False)) == 0

    ids = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(run(tmp_path / "made" / "model.onnx", input_ids=ids)[0], run(tied, input_ids=ids)[0])


def test_the_head_stays_behind_what_scales_and_caps_its_logits(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["inner"], name="body"),
        helper.make_node("MatMul", ["inner", "head"], ["product"], name="head"),
        helper.make_node("Div", ["product", "cap"], ["small"]),
        helper.make_node("Tanh", ["small"], ["capped"]),
        helper.make_node("Mul", ["capped", "cap"], ["logits"]),
    ]
    weights = {"w": random(WIDTH, WIDTH), "head": random(WIDTH, VOCABULARY), "cap": np.array(30, np.float32)}
    source = graph(
        tmp_path / "source", nodes, weights, {"x": ["rows", WIDTH]}, {"logits": ["rows", VOCABULARY], "inner": None}
    )

    assert quantize_rows(source, tmp_path / "made", EightBits(head=False)) == 1
    made = load(tmp_path / "made" / "model.onnx")
    assert [node.name for node in made.graph.node if node.op_type == "MatMul"] == ["head"]


def test_products_of_two_inputs_are_left_alone(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "z"], ["y"])]
    source = graph(tmp_path, nodes, {}, {"x": ["rows", WIDTH], "z": [WIDTH, "columns"]}, {"y": ["rows", "columns"]})

    assert quantize_rows(source, tmp_path / "made", EightBits()) == 0
    assert kinds(tmp_path / "made" / "model.onnx") == ["MatMul"]
