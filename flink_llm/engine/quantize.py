"""W8A8: a graph's products in bytes, with one activation scale per row.

For each group of products that share an input, the input's row is scaled by its largest magnitude and
rounded once:

    x ── Abs ── ReduceMax ─────────────┬───────────────────────────────┐
    └─────────────────────────── Div ──┘── QuantizeLinear ── product ── Mul ── y

A row's answer depends on that row alone: whoever shares a batch is never felt, to the bit. Rows are
unsigned with a zero point of 128. The product by signed weights is the fast one, and on machines that
have AVX2 without VNNI it adds pairs in 16 bits, where 255 * 127 * 2 saturates unseen. So signed weights
have 64 levels each way (255 * 64 * 2 fits), and where that is too coarse weights are unsigned with all
of theirs. Both are exact on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from flink_llm.engine.export_logits import logits_product
from flink_llm.engine.functions import CONTRIB, DOMAIN, LEVELS, MOST_PRODUCTS, ZERO, complete, rounded

DATA = "model.onnx.data"
SIGNED_LEVELS = 64
"""Each way from zero, of weights that are signed. Others have LEVELS, as a table, which nothing is multiplied by."""


@dataclass(frozen=True)
class EightBits:
    """A form of W8A8. Without `head` the product that makes the logits stays in fp32."""

    weights: Literal["signed", "unsigned"] = "signed"
    head: bool = True

    def said(self) -> dict[str, str]:
        """For a manifest."""
        return {"weights": self.weights, **({} if self.head else {"logits_product": "fp32"})}


@dataclass(frozen=True)
class FourBits:
    """A form of four-bit weights: `block` of them along a product's input share a scale."""

    block: int

    def said(self) -> dict[str, int]:
        """For a manifest."""
        return {"block": self.block}


Form = EightBits | FourBits | None
"""Of a precision that has several; None for one that has not."""


def quantize_rows(source: Path, to: Path, form: EightBits) -> int:
    """Writes the W8A8 form of the fp32 graph `source` into the folder `to`; how many products it has.

    Products by float matrices that the graph holds are rewritten, and the table that `input_ids` looks
    rows up in; not a table that is shared with a product which stays. Needs opset 18 or later.
    """
    model = ir.load(source)
    graph = model.graph
    graph.opset_imports.setdefault(CONTRIB, 1)
    rewriter = _Rewriter(graph, signed=form.weights == "signed")
    kept = set() if form.head else _head(graph)
    count = sum(rewriter.products(x, group, kept) for x, group in _groups(graph).items())
    rewriter.table(kept)
    sweep(graph)
    complete(model)
    to.mkdir(parents=True, exist_ok=True)
    ir.save(model, to / "model.onnx", external_data=DATA)
    return count


@dataclass(frozen=True)
class _Product:
    """A MatMul by a matrix of the graph, `turned` where the graph transposes it first."""

    node: ir.Node
    matrix: ir.Value
    turned: bool


class _Rewriter:
    def __init__(self, graph: ir.Graph, *, signed: bool) -> None:
        self._graph = graph
        self._signed = signed
        self._nodes: list[ir.Node] = []
        self._bytes: dict[ir.Value, tuple[ir.Value, NDArray[np.float32]]] = {}
        self._zero = self._constant("w8a8/zero", np.array(ZERO, np.uint8))
        self._step = self._constant("w8a8/step", np.array(1 / LEVELS, np.float32))
        self._one = self._constant("w8a8/one", np.array(1, np.float32))
        self._last = self._constant("w8a8/last", np.array([-1], np.int64))

    def products(self, x: ir.Value, group: list[_Product], kept: set[ir.Value]) -> int:
        """Rewrites the products of one input; how many."""
        group = [product for product in group if product.matrix not in kept]
        if not group:
            return 0
        if self._signed:
            for begin in range(0, len(group), MOST_PRODUCTS):
                self._row_linear(x, group[begin : begin + MOST_PRODUCTS])
            return len(group)
        row, largest = rounded(self._add, x, self._step, self._zero, self._last)
        outputs = []
        for product in group:
            matrix, scales = self._matrix(product)
            inputs = [row, matrix, self._one, scales, self._zero, self._zero]
            outputs.append(self._add("Mul", [self._add("MatMulIntegerToFloat", inputs, CONTRIB), largest]))
        self._place(group[0].node)
        for product, output in zip(group, outputs, strict=True):
            self._replace(product.node, output)
        return len(group)

    def _row_linear(self, x: ir.Value, group: list[_Product]) -> None:
        matrices = [value for product in group for value in self._matrix(product)]
        kind = f"RowLinear{len(group) if len(group) > 1 else ''}"
        node = ir.node(kind, [x, *matrices], domain=DOMAIN, num_outputs=len(group))
        self._nodes.append(node)
        self._place(group[0].node)
        for product, output in zip(group, node.outputs, strict=True):
            self._replace(product.node, output)

    def table(self, kept: set[ir.Value]) -> None:
        """Rewrites the embedding: rows of bytes, each with its scale."""
        for node in [node for node in self._graph if node.op_type == "Gather" and not node.domain]:
            table, turned = _held(node, 0)
            if table is None or table in kept or _value(node, 1).name != "input_ids":
                continue
            ids = _value(node, 1)
            rows, worth = self._in_bytes(table, over=0 if turned else 1, levels=LEVELS)
            if turned:
                rows = self._add("Transpose", [rows], perm=[1, 0])
            found = self._add("Cast", [self._add("Gather", [rows, ids])], to=ir.DataType.FLOAT)
            if not self._signed:
                found = self._add("Sub", [found, self._constant("w8a8/zero_float", np.array(ZERO, np.float32))])
            scales = self._constant(f"{table.name}/row_scales", worth.reshape(-1, 1))
            found = self._add("Mul", [found, self._add("Gather", [scales, ids])])
            self._place(node)
            self._replace(node, found)

    def _matrix(self, product: _Product) -> tuple[ir.Value, ir.Value]:
        """The matrix in bytes, [inputs, outputs], or turned for `RowLinear`; and a scale for each output."""
        levels = SIGNED_LEVELS if self._signed else LEVELS
        matrix, worth = self._in_bytes(product.matrix, over=1 if product.turned else 0, levels=levels)
        if product.turned != self._signed:
            matrix = self._add("Transpose", [matrix], perm=[1, 0])
        # The row's own rounding step goes in here too: what is left for the row is its largest magnitude.
        scales = worth.reshape(-1) / np.float32(LEVELS)
        return matrix, self._constant(f"{product.matrix.name}/column_scales", scales)

    def _in_bytes(self, value: ir.Value, *, over: int, levels: int) -> tuple[ir.Value, NDArray[np.float32]]:
        """Levels around zero, and what a level is worth; one scale for each line along the axis `over`.

        A matrix that is both embedding and logits stays one in the file, in the levels of its product: the
        graph turns it for one of them, once, when it is loaded.
        """
        if value not in self._bytes:
            weights = _array(value)
            largest = np.abs(weights).max(axis=over, keepdims=True)
            worth: NDArray[np.float32] = np.where(largest > 0, largest / levels, 1).astype(np.float32)
            found = np.rint(weights / worth)
            found = found.astype(np.int8) if self._signed else (found + ZERO).astype(np.uint8)
            self._bytes[value] = self._constant(f"{value.name}/bytes", found), worth
        return self._bytes[value]

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self._graph.register_initializer(value)
        return value

    def _add(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes, domain=domain)
        self._nodes.append(node)
        return node.outputs[0]

    def _place(self, before: ir.Node) -> None:
        """Puts the new nodes into the graph."""
        self._graph.insert_before(before, self._nodes)
        self._nodes = []

    def _replace(self, node: ir.Node, output: ir.Value) -> None:
        old = node.outputs[0]
        output.shape, output.type = old.shape, old.type
        name, old.name = old.name, f"{old.name}/before_w8a8"
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        if output.is_graph_output():
            output.name = name
        self._graph.remove(node, safe=True)


def _groups(graph: ir.Graph) -> dict[ir.Value, list[_Product]]:
    """Products by the input they share, in the graph's order."""
    groups: dict[ir.Value, list[_Product]] = {}
    for node in graph:
        matrix, turned = _matrix_of(node)
        if matrix is not None:
            groups.setdefault(_value(node, 0), []).append(_Product(node, matrix, turned))
    return groups


def _head(graph: ir.Graph) -> set[ir.Value]:
    """The matrix whose product makes the logits, if there is one."""
    products = [logits_product(output) for output in graph.outputs if output.name == "logits"]
    return {matrix for product in products if (matrix := _matrix_of(product)[0]) is not None}


def _matrix_of(node: ir.Node | None) -> tuple[ir.Value | None, bool]:
    is_product = node is not None and node.op_type == "MatMul" and not node.domain
    return _held(node, 1) if node is not None and is_product else (None, False)


def _held(node: ir.Node, number: int) -> tuple[ir.Value | None, bool]:
    """The fp32 matrix that the graph holds for an input, and whether it is transposed on its way there."""
    value = _value(node, number)
    producer = value.producer()
    turned = producer is not None and producer.op_type == "Transpose"
    if producer is not None and turned:
        value = _value(producer, 0)
    two = value.shape is not None and len(value.shape) == 2
    held = value.is_initializer() and not value.is_graph_input()  # a default may be another matrix in a run
    return (value if held and value.dtype == ir.DataType.FLOAT and two else None), turned


def _value(node: ir.Node, number: int) -> ir.Value:
    value = node.inputs[number]
    if value is None:
        raise ValueError(f"{node.name} has no input {number}")
    return value


def _array(value: ir.Value) -> NDArray[np.float32]:
    if value.const_value is None:
        raise ValueError(f"{value.name} has no value")
    array: NDArray[np.float32] = value.const_value.numpy()
    return array


def sweep(graph: ir.Graph) -> None:
    """Removes what nothing uses any more."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
