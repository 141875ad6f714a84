"""Kernels of our own say what the functions of the graph say, row by row, whoever shares the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

import onnx_ir as ir
import onnxruntime as ort
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.machine import cpu_flags
from flink_llm.engine import native
from flink_llm.engine.functions import BLOCK_ATTRIBUTES, DOMAIN, complete

AVX512, AMX = "avx512_vnni" in cpu_flags(), "amx_int8" in cpu_flags()
needs_kernels = pytest.mark.skipif(
    native.library() is None or "avx2" not in cpu_flags(), reason="the kernels are for AVX2 and AVX-512"
)
WAYS = ["on", "avx2"] if AVX512 else ["avx2"]
EVERY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.integers(1, 150)
rows = st.one_of(st.integers(1, 37), st.integers(60, 130))


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the kernels run by, each in turn where the processor has both."""
    monkeypatch.setenv(native.VARIABLE, request.param)
    return request.param


@pytest.fixture
def bytes_are_ours(way: str) -> None:
    if AMX and way == "on":
        pytest.skip("products of bytes are ONNX Runtime's with AMX")


class Graph:
    """One node of our domain over weights that the graph holds; run by its kernel, and as the function."""

    def __init__(
        self, kind: str, weights: dict[str, np.ndarray], inputs: dict[str, Any], outputs: int, **own: Any
    ) -> None:
        values = {
            name: ir.Value(name=name, shape=ir.Shape([None] * rank), type=ir.TensorType(dtype))
            for name, (rank, dtype) in inputs.items()
        }
        held = []
        for name, array in weights.items():
            tensor = ir.tensor(array, name=name)
            held.append(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
        node = ir.node(kind, [*values.values(), *held], own, domain=DOMAIN, num_outputs=outputs)
        for number, output in enumerate(node.outputs):
            output.name, output.type = f"y{number}", ir.TensorType(ir.DataType.FLOAT)
        imports = {"": 20, "com.microsoft": 1, DOMAIN: 1}
        graph = ir.Graph(
            list(values.values()), node.outputs, nodes=[node], initializers=held, opset_imports=imports, name="g"
        )
        model = ir.Model(graph, ir_version=10)
        complete(model)
        self._bytes = ir.to_proto(model).SerializeToString()
        self.kernel, self.function = self._session(True), self._session(False)

    def _session(self, kernels: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 2
        if kernels:
            native.register(options)
        return ort.InferenceSession(self._bytes, options, providers=["CPUExecutionProvider"])

    def both(self, **feeds: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.kernel.run(None, feeds), self.function.run(None, feeds), strict=True))


FLOAT = ir.DataType.FLOAT


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Some large, some small, and a few lines of zeros."""
    draw = np.random.default_rng(seed)
    made = draw.standard_normal(shape) * 10.0 ** draw.integers(-3, 3, (*shape[:-1], 1))
    made[draw.random(shape[:-1]) < 0.05] = 0
    return made.astype(np.float32)


def in_bytes(seed: int, columns: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return (
        draw.integers(-64, 65, (columns, inputs)).astype(np.int8),
        draw.random(columns).astype(np.float32) * 1e-3,
    )


@needs_kernels
@EVERY
@given(count=rows, inputs=st.integers(1, 300), columns=sizes, more=st.integers(0, 2), seed=st.integers(0, 2**16))
def test_products_in_bytes_are_the_functions_to_the_bit(
    count: int, inputs: int, columns: int, more: int, seed: int
) -> None:
    weights = {}
    for number in range(more + 1):
        weights[f"w{number}"], weights[f"s{number}"] = in_bytes(seed + number, columns + 5 * number, inputs)
    graph = Graph(f"RowLinear{more + 1 if more else ''}", weights, {"x": (3, FLOAT)}, more + 1)

    for found, wanted in graph.both(x=numbers(seed, 1, count, inputs)):
        np.testing.assert_array_equal(found, wanted)


@needs_kernels
@pytest.mark.usefixtures("bytes_are_ours")
@pytest.mark.parametrize("count", [1, 3, 5, 40])
def test_weights_of_more_levels_are_no_less_exact(count: int) -> None:
    weights, scales = in_bytes(3, 9, 200)
    weights[4, 7] = 127
    weights[5] = -128
    graph = Graph("RowLinear", {"w": weights, "s": scales}, {"x": (3, FLOAT)}, 1)
    x = numbers(5, 1, count, 200)
    x[0, 0] = 1e3
    largest = np.abs(x[0]).max(axis=-1, keepdims=True)
    levels = np.rint(np.divide(x[0] * 127, largest, where=largest > 0, out=np.zeros_like(x[0])).astype(float))

    ((found, _),) = graph.both(x=x)  # ONNX Runtime's product may saturate there
    wanted = levels @ weights.T.astype(float) * scales * largest
    one = largest * scales.max() * 128  # a level that is rounded to either side
    np.testing.assert_array_less(np.abs(found[0] - wanted), one + 1e-5 * np.abs(wanted) + 1e-9)


@needs_kernels
@pytest.mark.usefixtures("bytes_are_ours")
def test_extremes_of_bytes_do_not_saturate() -> None:
    weights = np.array([[64], [-64]], np.int8).repeat(640, axis=1)
    x = np.ones((1, 6, 640), np.float32)
    x[0, 1::2] = -1
    graph = Graph("RowLinear", {"w": weights, "s": np.full(2, 1 / 127, np.float32)}, {"x": (3, FLOAT)}, 1)

    ((found, function),) = graph.both(x=x)
    np.testing.assert_array_equal(found, function)
    np.testing.assert_array_equal(np.abs(found), np.float32(64 * 640))


def in_blocks(seed: int, columns: int, inputs: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    blocks = -(-inputs // block)
    return (
        draw.integers(0, 256, (columns, blocks, block // 2)).astype(np.uint8),
        (draw.random(columns * blocks) * 1e-2).astype(np.float32),
    )


def by_blocks(x: np.ndarray, weights: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """What the product is, with x rounded to 127 levels each way in each block."""
    columns, blocks, _ = weights.shape
    padded = np.zeros((len(x), blocks * block))
    padded[:, : x.shape[1]] = x
    parts = padded.reshape(len(x), blocks, block)
    largest = np.abs(parts).max(axis=-1, keepdims=True)
    levels = np.rint(np.divide(parts * 127, largest, where=largest > 0, out=np.zeros_like(parts)))
    held = np.stack([weights & 15, weights >> 4], axis=-1).reshape(columns, blocks, block).astype(float) - 8
    sums = np.einsum("rbk,cbk->rcb", levels, held)
    return (sums * scales.reshape(columns, blocks) * (largest[:, None, :, 0] / 127)).sum(axis=-1)


@needs_kernels
@EVERY
@given(
    count=rows,
    inputs=st.integers(1, 300),
    columns=sizes,
    block=st.sampled_from([128, 256]),
    seed=st.integers(0, 99),
)
def test_products_in_four_bits_are_what_they_say(count: int, inputs: int, columns: int, block: int, seed: int) -> None:
    weights, scales = in_blocks(seed, columns, inputs, block)
    own = dict(zip(BLOCK_ATTRIBUTES, (inputs, columns, 4, block, 4), strict=True))
    graph = Graph("BlockLinear", {"w": weights, "s": scales}, {"x": (3, FLOAT)}, 1, **own)
    x = numbers(seed, 1, count, inputs)

    ((found, _),) = graph.both(x=x)
    wanted = by_blocks(x[0].astype(float), weights, scales, block)
    # A number half way between two levels may be rounded to either: one level of one input.
    near = np.abs(x[0]).max(axis=-1, keepdims=True) / 127 * 8 * scales.max() * 2
    np.testing.assert_array_less(np.abs(found[0] - wanted), near + 1e-5 * np.abs(wanted) + 1e-9)


@needs_kernels
@EVERY
@given(
    kind=st.sampled_from(["SkipRowLinear", "SkipGatedRowLinear", "SkipBlockLinear", "SkipGatedBlockLinear"]),
    count=rows,
    columns=sizes,
    seed=st.integers(0, 99),
)
def test_a_norm_and_its_products_are_near_the_function(kind: str, count: int, columns: int, seed: int) -> None:
    inputs, matrices, own = 192, 2 if "Gated" in kind else 1, {"epsilon": 1e-6}
    weights: dict[str, np.ndarray] = {}
    for number in range(matrices):
        made = (
            in_bytes(seed + number, columns, inputs)
            if "Row" in kind
            else in_blocks(seed + number, columns, inputs, block=128)
        )
        weights[f"w{number}"], weights[f"s{number}"] = made
    if "Block" in kind:
        own |= dict(zip(BLOCK_ATTRIBUTES, (inputs, columns, 4, 128, 4), strict=True))
    graph = Graph(kind, weights, {"x": (3, FLOAT), "skip": (3, FLOAT), "gain": (1, FLOAT)}, 2, **own)
    x, skip = numbers(seed, 1, count, inputs), numbers(seed + 1, 1, count, inputs)

    (made, both) = graph.both(x=x, skip=skip, gain=1 + numbers(seed + 2, 1, inputs)[0] / 100)
    np.testing.assert_array_equal(both[0], both[1])
    # A norm whose last bit differs may round a number to the level beside.
    near = 0.02 * np.abs(made[1]).max(axis=-1, keepdims=True) + 0.02 * np.abs(made[1]).max() + 1e-6
    np.testing.assert_array_less(np.abs(made[0] - made[1]), np.broadcast_to(near, made[1].shape))


HEADS = st.sampled_from([(1, 1), (3, 1), (4, 2), (9, 3)])


def attention(heads: int, kv_heads: int, size: int, scale: float, places: int) -> Graph:
    angles = np.arange(places)[:, None] * 10000.0 ** -(np.arange(size // 2) / (size // 2))
    inputs = {
        "packed": (3, FLOAT),
        "keys": (4, FLOAT),
        "values": (4, FLOAT),
        "lengths": (1, ir.DataType.INT32),
        "longest": (1, ir.DataType.INT32),
    }
    turns = {"cosines": np.cos(angles).astype(np.float32), "sines": np.sin(angles).astype(np.float32)}
    return Graph("RotaryAttention", turns, inputs, 3, num_heads=heads, kv_num_heads=kv_heads, scale=scale)


@needs_kernels
@EVERY
@given(
    heads=HEADS,
    size=st.sampled_from([16, 48, 64, 128]),
    scale=st.sampled_from([0.0, 1.0, 0.1]),
    queries=st.integers(1, 40),
    pasts=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    first=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_an_attention_is_near_the_function(
    heads: tuple[int, int], size: int, scale: float, queries: int, pasts: list[int], first: bool, seed: int
) -> None:
    """A prompt from its beginning, several of them padded behind; a part of one with a past; a token of everybody."""
    if first:
        lengths = [min(queries, 1 + past) for past in pasts]
        lengths[0] = queries
        total = queries
    else:
        queries = 1 if len(pasts) > 1 else queries
        lengths = [past + queries for past in pasts]
        total = max(lengths)
    draw, places, (many, few) = np.random.default_rng(seed), 128, heads
    graph = attention(many, few, size, scale, places)
    packed = draw.standard_normal((len(pasts), queries, (many + 2 * few) * size)).astype(np.float32)
    cache = draw.standard_normal((2, len(pasts), few, places, size)).astype(np.float32)
    feeds = {
        "packed": packed,
        "keys": cache[0],
        "values": cache[1],
        "lengths": np.array(lengths, np.int32) - 1,
        "longest": np.array([total], np.int32),
    }

    (made, keys, values) = graph.both(**feeds)
    for row, length in enumerate(lengths):
        new = length if first else queries
        close = {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(made[0][row, :new], made[1][row, :new], **close)
        np.testing.assert_allclose(keys[0][row, :, :length], keys[1][row, :, :length], **close)
        np.testing.assert_array_equal(values[0][row, :, :length], values[1][row, :, :length])


@needs_kernels
@EVERY
@given(
    heads=HEADS,
    size=st.sampled_from([16, 48, 64, 128]),
    past=st.integers(0, 40),
    parts=st.lists(st.integers(1, 45), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_a_query_does_not_feel_how_many_there_are(
    heads: tuple[int, int], size: int, past: int, parts: list[int], seed: int
) -> None:
    """Many have their keys turned, few have not: the same numbers, to the bit."""
    draw, places, (many, few) = np.random.default_rng(seed), 256, heads
    graph = attention(many, few, size, 0.0, places)
    packed = draw.standard_normal((1, sum(parts), (many + 2 * few) * size)).astype(np.float32)
    keys, values = draw.standard_normal((2, 1, few, places, size)).astype(np.float32)

    def run(first: int, end: int, keys: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
        feeds = {"packed": packed[:, first:end], "keys": keys, "values": values}
        total = past + end
        lengths = {"lengths": np.array([total - 1], np.int32), "longest": np.array([total], np.int32)}
        found: list[np.ndarray] = graph.kernel.run(None, {**feeds, **lengths})
        return found

    whole, *_ = run(0, sum(parts), keys, values)
    begin = 0
    for part in parts:
        made, keys, values = run(begin, begin + part, keys, values)
        np.testing.assert_array_equal(made, whole[:, begin : begin + part])
        begin += part


def mixed_attention(heads: int, kv_heads: int, size: int, places: int) -> Graph:
    angles = np.arange(places)[:, None] * 10000.0 ** -(np.arange(size // 2) / (size // 2))
    cache = [(4, FLOAT), (4, FLOAT), (1, ir.DataType.INT32), (1, ir.DataType.INT32)]
    parts = ("keys", "values", "lengths", "longest")
    inputs = {"packed": (3, FLOAT)}
    inputs |= {f"{of}{part}": kind for of in ("", "chunk_") for part, kind in zip(parts, cache, strict=True)}
    turns = {"cosines": np.cos(angles).astype(np.float32), "sines": np.sin(angles).astype(np.float32)}
    inputs["split"] = (1, ir.DataType.INT64)
    return Graph("MixedAttention", turns, inputs, 5, num_heads=heads, kv_num_heads=kv_heads, scale=0.0)


def mixed_feeds(heads: int, kv_heads: int, size: int, pasts: list[int], chunk: int, start: int, seed: int) -> Any:
    draw = np.random.default_rng(seed)
    made = draw.standard_normal((1, chunk + len(pasts), (heads + 2 * kv_heads) * size)).astype(np.float32)
    rows, one = (draw.standard_normal((2, count, kv_heads, 128, size)).astype(np.float32) for count in (len(pasts), 1))
    return {
        "packed": made,
        "keys": rows[0],
        "values": rows[1],
        "lengths": np.array(pasts, np.int32),
        "longest": np.array([max(pasts) + 1], np.int32),
        "chunk_keys": one[0],
        "chunk_values": one[1],
        "chunk_lengths": np.array([start + chunk - 1], np.int32),
        "chunk_longest": np.array([start + chunk], np.int32),
        "split": np.array([chunk, len(pasts)], np.int64),
    }


@needs_kernels
@EVERY
@given(
    heads=HEADS,
    size=st.sampled_from([16, 64]),
    pasts=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    chunk=st.integers(1, 40),
    start=st.integers(0, 60),
    seed=st.integers(0, 2**16),
)
def test_a_mixed_attention_is_two(
    heads: tuple[int, int], size: int, pasts: list[int], chunk: int, start: int, seed: int
) -> None:
    feeds = mixed_feeds(*heads, size, pasts, chunk, start, seed)
    both = mixed_attention(*heads, size, 128).both(**feeds)
    for found, wanted in both[:1]:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    for (found, wanted), ends in zip(
        both[1:], ([each + 1 for each in pasts],) * 2 + ([start + chunk],) * 2, strict=True
    ):
        for row, end in enumerate(ends):
            np.testing.assert_allclose(found[row, :, :end], wanted[row, :, :end], rtol=1e-4, atol=1e-4)
    alone = attention(*heads, size, 0.0, 128).kernel
    names = ("keys", "values", "lengths", "longest")
    (rows, *_) = alone.run(None, {"packed": feeds["packed"][0, chunk:, None], **{name: feeds[name] for name in names}})
    of_chunk = {name: feeds[f"chunk_{name}"] for name in names}
    (part, *_) = alone.run(None, {"packed": feeds["packed"][:, :chunk], **of_chunk})
    np.testing.assert_array_equal(both[0][0], np.concatenate([part, rows.swapaxes(0, 1)], axis=1))


@needs_kernels
def test_a_mixed_attention_that_does_not_fit_is_refused() -> None:
    asked = mixed_attention(3, 1, 16, 128).kernel
    feeds = mixed_feeds(3, 1, 16, [4, 9], 5, 3, 1)
    asked.run(None, feeds)
    for wrong in (
        {"split": np.array([6, 2], np.int64)},
        {"split": np.array([-1, 8], np.int64)},
        {"split": np.array([8, -1], np.int64)},
        {"split": np.array([4, 3], np.int64)},
        {"split": np.array([5], np.int64)},
        {"packed": numbers(1, 1, 7, 40)},
        {"packed": numbers(1, 1, 7, 160)},
        {"packed": numbers(1, 2, 7, 80)},
        {"chunk_keys": numbers(1, 2, 1, 128, 16)},
        {"keys": numbers(1, 3, 1, 128, 16)},
        {"chunk_lengths": np.array([2], np.int32)},
        {"chunk_longest": np.array([4], np.int32)},
        {"longest": np.array([2], np.int32)},
        {"lengths": np.array([4, 130], np.int32)},
    ):
        with pytest.raises(Exception, match=r"do not fit|for other positions"):
            asked.run(None, {**feeds, **wrong})


@needs_kernels
@pytest.mark.usefixtures("bytes_are_ours")
def test_levels_next_to_the_middle_between_two_are_rounded_as_by_division() -> None:
    """A product tells the whole number but there: rows of nothing else."""
    weights, scales = np.eye(64, dtype=np.int8)[:, :64], np.ones(64, np.float32)
    graph = Graph("RowLinear", {"w": weights, "s": scales}, {"x": (3, FLOAT)}, 1)
    draw = np.random.default_rng(5)
    largest = (10.0 ** draw.uniform(-38, 38, (1, 2000, 1))).astype(np.float32)
    x = largest * ((draw.integers(-127, 127, (1, 2000, 64)) + 0.5) / 127).astype(np.float32)
    x *= (1 + draw.integers(-3, 4, x.shape) * 2.0**-23).astype(np.float32)
    x[..., :1] = largest
    for found, wanted in graph.both(x=x):
        np.testing.assert_array_equal(found, wanted)


@needs_kernels
def test_a_row_does_not_feel_the_others_nor_how_many_they_are() -> None:
    weights, scales = in_bytes(1, 24, 200)
    blocks, of_blocks = in_blocks(1, 24, 200, 128)
    own = dict(zip(BLOCK_ATTRIBUTES, (200, 24, 4, 128, 4), strict=True))
    graphs = [
        Graph("RowLinear", {"w": weights, "s": scales}, {"x": (3, FLOAT)}, 1),
        Graph("BlockLinear", {"w": blocks, "s": of_blocks}, {"x": (3, FLOAT)}, 1, **own),
    ]
    x = numbers(3, 1, 150, 200)
    for graph in graphs:
        (every,) = graph.kernel.run(None, {"x": x})
        for first, count in ((0, 1), (7, 2), (20, 3), (50, 4), (3, 17), (10, 140)):
            (some,) = graph.kernel.run(None, {"x": x[:, first : first + count]})
            np.testing.assert_array_equal(some, every[:, first : first + count])


@needs_kernels
@pytest.mark.usefixtures("bytes_are_ours")
def test_a_row_that_is_no_number_is_none_and_leaves_the_others_alone() -> None:
    weights, scales = in_bytes(1, 24, 70)
    graph = Graph("RowLinear", {"w": weights, "s": scales}, {"x": (3, FLOAT)}, 1)
    x = numbers(3, 1, 9, 70)
    (before,) = graph.kernel.run(None, {"x": x})
    x[0, 4, 69] = np.nan
    (after,) = graph.kernel.run(None, {"x": x})

    assert np.isnan(after[0, 4]).all()
    np.testing.assert_array_equal(np.delete(after, 4, axis=1), np.delete(before, 4, axis=1))


@needs_kernels
def test_scores_that_are_no_numbers_are_none() -> None:
    graph = attention(2, 1, 16, 1.0, 128)
    packed = numbers(1, 2, 1, 64)
    for bad in (np.nan, np.inf):
        packed[0, 0, 3] = bad
        feeds = {
            "packed": packed,
            "keys": numbers(2, 2, 1, 8, 16),
            "values": numbers(3, 2, 1, 8, 16),
            "lengths": np.array([5, 5], np.int32),
            "longest": np.array([6], np.int32),
        }
        (made, _, _) = graph.both(**feeds)
        assert np.isnan(made[0][0, 0, :16]).all()
        assert np.isfinite(made[0][1]).all()


@needs_kernels
@pytest.mark.usefixtures("bytes_are_ours")
def test_inputs_that_do_not_fit_are_refused() -> None:
    weights, scales = in_bytes(1, 24, 70)
    graph = Graph("RowLinear", {"w": weights, "s": scales}, {"x": (3, FLOAT)}, 1)
    with pytest.raises(Exception, match="rows are of another length"):
        graph.kernel.run(None, {"x": numbers(3, 1, 9, 71)})
    with pytest.raises(Exception, match="a scale for each column"):
        Graph("RowLinear", {"w": weights, "s": scales[1:]}, {"x": (3, FLOAT)}, 1)
    asked = attention(3, 1, 16, 1.0, 128)
    feeds = {
        "packed": numbers(1, 1, 1, 80),
        "keys": numbers(1, 1, 1, 8, 16),
        "values": numbers(1, 1, 1, 8, 16),
        "lengths": np.array([60], np.int32),
        "longest": np.array([8], np.int32),
    }
    for lengths, longest in [([60], 8), ([60], 61), ([99], 100), ([3], 2), ([-9], 8), ([8], -5)]:
        wrong = {"lengths": np.array(lengths, np.int32), "longest": np.array([longest], np.int32)}
        with pytest.raises(Exception, match="lengths do not fit its cache"):
            asked.kernel.run(None, {**feeds, **wrong})
    with pytest.raises(Exception, match="rotation of an attention is for other positions"):
        asked.kernel.run(None, {**feeds, "longest": np.array([1000], np.int32)})
    for wrong in (
        {"lengths": np.array(60, np.int32)},
        {"lengths": np.zeros((1, 0), np.int32)},
        {"longest": np.zeros(0, np.int32)},
        {"keys": numbers(1, 1, 8, 16)},
        {"keys": numbers(1, 2, 1, 8, 16)},
        {"packed": numbers(1, 1, 1, 0), "keys": np.zeros((1, 1, 8, 0), np.float32)},
    ):
        with pytest.raises(Exception, match=r"do not fit together|Invalid rank|INVALID_ARGUMENT"):
            asked.kernel.run(None, {**feeds, **wrong})
    for wide in (5, 40, 96, 160):
        with pytest.raises(Exception, match="do not fit together"):
            asked.kernel.run(None, {**feeds, "packed": numbers(1, 1, 1, wide)})


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "first", "second", "text"),
    [
        ("SkipGatedRowLinear", in_bytes(1, 64, 0), in_bytes(1, 64, 50), "a scale for each column"),
        ("RowLinear2", in_bytes(1, 64, 50), in_bytes(1, 64, 51), "a scale for each column"),
        ("RowLinear2", in_bytes(1, 0, 8), in_bytes(1, 0, 8), "a scale for each column"),
        ("SkipGatedBlockLinear", in_blocks(1, 8, 100, 128), in_blocks(1, 8, 100, 6400), "different blocks"),
        ("SkipGatedBlockLinear", in_blocks(1, 8, 100, 64), in_blocks(1, 8, 100, 64), "multiple of 128"),
        ("SkipGatedBlockLinear", in_blocks(1, 8, 100, 128), in_blocks(1, 9, 100, 128), "of different sizes"),
    ],
)
def test_matrices_that_do_not_fit_are_refused_at_the_load(
    kind: str, first: Any, second: Any, text: str, request: pytest.FixtureRequest
) -> None:
    if "Row" in kind:
        request.getfixturevalue("bytes_are_ours")
    weights = {"w0": first[0], "s0": first[1], "w1": second[0], "s1": second[1]}
    inputs: dict[str, Any] = {"x": (3, FLOAT)}
    own: dict[str, Any] = {}
    if "Skip" in kind:
        inputs |= {"skip": (3, FLOAT), "gain": (1, FLOAT)}
        own["epsilon"] = 1e-6
    if "Block" in kind:
        own |= dict(zip(BLOCK_ATTRIBUTES, (100, 8, 4, 128, 4), strict=True))
    with pytest.raises(Exception, match=text):
        Graph(kind, weights, inputs, 2, **own)


@needs_kernels
@pytest.mark.usefixtures("bytes_are_ours")
def test_the_kernels_are_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, scales = in_bytes(1, 24, 70)
    graph = Graph("RowLinear", {"w": weights, "s": scales}, {"x": (3, FLOAT)}, 1)

    def kinds(run: bool) -> set[str]:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        if run:
            native.register(options)
        session = ort.InferenceSession(graph._bytes, options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": numbers(1, 1, 2, 70)})
        text = Path(session.end_profiling()).read_text()
        return {kind for kind in ("RowLinear", "MatMulIntegerToFloat") if f'"op_name" : "{kind}"' in text}

    assert kinds(True) == {"RowLinear"}
    assert kinds(False) == {"MatMulIntegerToFloat"}
    monkeypatch.setenv(native.VARIABLE, "off")
    assert kinds(True) == {"MatMulIntegerToFloat"}


def test_it_is_said_whether_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    usable = native.library() is not None and "avx2" in cpu_flags()
    assert native.state().startswith("in use, by AVX2" if way == "avx2" else "in use, by AVX-512") == usable
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with monkeypatch.context() as patched:
        patched.setattr(native, "library", lambda: str(tmp_path / "broken.so"))
        assert native.state().startswith("cannot be loaded, models run slower on a CPU: ")
        patched.setattr(native, "library", lambda: None)
        assert "install a C++ compiler (g++)" in native.state()
        patched.setenv(native.VARIABLE, "off")
        assert native.state() == "left out: FLINK_LLM_KERNELS is off"


def test_a_library_that_is_none_is_said_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "library", lambda: str(tmp_path / "broken.so"))
    native.register(ort.SessionOptions())
    assert "cannot be used, ONNX Runtime's own run instead" in caplog.text
