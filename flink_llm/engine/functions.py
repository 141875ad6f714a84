"""Operators of our own in a graph: each is a function of ONNX Runtime's, for which there may be a kernel.

A graph carries the functions that it names, so it is right wherever ONNX Runtime runs. Where `kernels/` was built
and the processor has what that needs, ONNX Runtime takes the kernel of the same name instead (ADR 38).

| function | is |
| --- | --- |
| RowLinear | a product in bytes: x [..., inputs], weights [outputs, inputs], one scale per row of both (`quantize`) |
| RowLinear2, RowLinear3 | several of one x, which is rounded once |
| BlockLinear | a product by weights of four bits (MatMulNBits) |
| SkipRowLinear, SkipBlockLinear | the product of a norm (SkipSimplifiedLayerNormalization), and the sum that it is of |
| SkipGatedRowLinear, SkipGatedBlockLinear | the same with two products, gate and up: gate * sigmoid(gate) * up |
| RotaryAttention | GroupQueryAttention of packed queries, keys and values, positions rotated, without a window |
| MixedAttention | two of them: of the first tokens as a part of one prompt, of each other as a row (`export_mixed`) |
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

DOMAIN = "flink_llm"
MOST_PRODUCTS = 3
"""Of one RowLinear."""
CONTRIB = "com.microsoft"
LEVELS = 127
"""Of a row in bytes, each way from zero."""
ZERO = 128
BLOCK_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")
ATTENTION_ATTRIBUTES = ("num_heads", "kv_num_heads", "scale")
_TYPES = {"epsilon": ir.AttributeType.FLOAT, "scale": ir.AttributeType.FLOAT}


class Body:
    """What a function is made of."""

    def __init__(self, inputs: Sequence[str], attributes: Sequence[str] = ()) -> None:
        self.inputs = [ir.Value(name=name) for name in inputs]
        self.nodes: list[ir.Node] = []
        self.attributes = attributes

    def constant(self, array: NDArray[Any]) -> ir.Value:
        made: ir.Value = self.add("Constant", [], value=ir.tensor(array))
        return made

    def add(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", outputs: int = 1, **own: Any) -> Any:
        """A node with these attributes; its output, or all of several."""
        node = ir.node(kind, inputs, own, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def own(self, *names: str) -> None:
        """The last node has these attributes of the function."""
        for name in names:
            self.nodes[-1].attributes[name] = ir.RefAttr(name, name, _type(name))

    def function(self, name: str, outputs: Sequence[ir.Value], opset: int) -> ir.Function:
        imports = {"": opset, CONTRIB: 1}
        graph = ir.Graph(self.inputs, outputs, nodes=self.nodes, opset_imports=imports, name=name)
        attributes = [ir.Attr(attribute, _type(attribute), None) for attribute in self.attributes]
        return ir.Function(DOMAIN, name, "", graph=graph, attributes=attributes)


def complete(model: ir.Model) -> None:
    """Gives a model the functions that it names, and takes from it those of ours that it does not."""
    opset = model.graph.opset_imports[""]
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    for name in sorted({node.op_type for node in model.graph if node.domain == DOMAIN}):
        model.graph.opset_imports[DOMAIN] = 1
        function = _FUNCTIONS[name](name, opset)
        model.functions[function.identifier()] = function


def rounded(
    add: Callable[[str, Sequence[ir.Value | None]], Any], x: ir.Value, step: ir.Value, zero: ir.Value, last: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Rows in bytes, and the largest magnitude of each, by nodes that `add` makes. `last`: the axis."""
    largest = add("ReduceMax", [add("Abs", [x]), last])
    # A row of zeros becomes 0/0 here and whatever QuantizeLinear makes of it; its scale of 0 undoes that.
    return add("QuantizeLinear", [add("Div", [x, largest]), step, zero]), largest


def _type(attribute: str) -> ir.AttributeType:
    return _TYPES.get(attribute, ir.AttributeType.INT)


def _row_linear(name: str, opset: int) -> ir.Function:
    """Of `RowLinear`, `RowLinear2`, `RowLinear3`."""
    count = int(name.removeprefix("RowLinear") or 1)
    body = Body(["x", *_matrices(count)])
    return body.function(name, _products(body, body.inputs[0], body.inputs[1:]), opset)


def _matrices(count: int) -> list[str]:
    return [f"{part}{number}" for number in range(count) for part in ("weights", "scales")]


def _products(body: Body, x: ir.Value, matrices: Sequence[ir.Value]) -> list[ir.Value]:
    """Of a row that is rounded once."""
    zero, middle = body.constant(np.array(ZERO, np.uint8)), body.constant(np.array(0, np.int8))
    step, one = body.constant(np.array(1 / LEVELS, np.float32)), body.constant(np.array(1, np.float32))
    last = body.constant(np.array([-1], np.int64))
    row, largest = rounded(body.add, x, step, zero, last)
    made = []
    for weights, scales in zip(matrices[::2], matrices[1::2], strict=True):
        matrix = body.add("Transpose", [weights], perm=[1, 0])
        product = body.add("MatMulIntegerToFloat", [row, matrix, one, scales, zero, middle], CONTRIB)
        made.append(body.add("Mul", [product, largest]))
    return made


def _block_linear(name: str, opset: int) -> ir.Function:
    body = Body(["x", "weights", "scales"], BLOCK_ATTRIBUTES)
    made = body.add("MatMulNBits", body.inputs, CONTRIB)
    body.own(*BLOCK_ATTRIBUTES)
    return body.function(name, [made], opset)


def _skip(name: str, opset: int) -> ir.Function:
    """Of `SkipXLinear` and `SkipGatedXLinear`."""
    gated = "Gated" in name
    blocks = name.endswith("BlockLinear")
    own = BLOCK_ATTRIBUTES if blocks else ()
    body = Body(["x", "skip", "gain", *_matrices(2 if gated else 1)], ("epsilon", *own))
    normed, _, _, both = body.add("SkipSimplifiedLayerNormalization", body.inputs[:3], CONTRIB, outputs=4)
    body.own("epsilon")
    matrices = body.inputs[3:]
    if blocks:
        made = []
        for weights, scales in zip(matrices[::2], matrices[1::2], strict=True):
            made.append(body.add("MatMulNBits", [normed, weights, scales], CONTRIB))
            body.own(*own)
    else:
        made = _products(body, normed, matrices)
    if gated:
        gate, up = made
        made = [body.add("Mul", [body.add("Mul", [gate, body.add("Sigmoid", [gate])]), up])]
    return body.function(name, [made[0], both], opset)


def _attention(name: str, opset: int) -> ir.Function:
    inputs = ["packed", "past_keys", "past_values", "lengths", "longest", "cosines", "sines"]
    body = Body(inputs, ATTENTION_ATTRIBUTES)
    packed, *rest = body.inputs
    outputs = body.add("GroupQueryAttention", [packed, None, None, *rest], CONTRIB, outputs=3, do_rotary=1)
    body.own(*ATTENTION_ATTRIBUTES)
    return body.function(name, outputs, opset)


def _mixed_attention(name: str, opset: int) -> ir.Function:
    inputs = ["packed", *_ROWS, *(f"chunk_{part}" for part in _ROWS), "split", "cosines", "sines"]
    body = Body(inputs, ATTENTION_ATTRIBUTES)
    packed, of_rows, of_chunk = body.inputs[0], body.inputs[1:5], body.inputs[5:9]
    split, rotation = body.inputs[9], body.inputs[10:]
    chunk, rows = body.add("Split", [packed, split], outputs=2, axis=1)
    made = []
    for tokens, cache in ((body.add("Transpose", [rows], perm=[1, 0, 2]), of_rows), (chunk, of_chunk)):
        given = [tokens, None, None, *cache, *rotation]
        made.append(body.add("GroupQueryAttention", given, CONTRIB, outputs=3, do_rotary=1))
        body.own(*ATTENTION_ATTRIBUTES)
    (rows, *rows_cache), (chunk, *chunk_cache) = made
    every = body.add("Concat", [chunk, body.add("Transpose", [rows], perm=[1, 0, 2])], axis=1)
    return body.function(name, [every, *rows_cache, *chunk_cache], opset)


_ROWS = ("past_keys", "past_values", "lengths", "longest")
_FUNCTIONS: dict[str, Callable[[str, int], ir.Function]] = {
    "RowLinear": _row_linear,
    "RowLinear2": _row_linear,
    "RowLinear3": _row_linear,
    "BlockLinear": _block_linear,
    "SkipRowLinear": _skip,
    "SkipBlockLinear": _skip,
    "SkipGatedRowLinear": _skip,
    "SkipGatedBlockLinear": _skip,
    "RotaryAttention": _attention,
    "MixedAttention": _mixed_attention,
}
