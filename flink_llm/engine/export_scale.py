"""A graph whose attention takes its scores as they are: their scale is in the weights that make the queries.

ONNX Runtime's products on the CPU have a path for one row that reads the keys as they lie, and take it only where
the result is not scaled; else they turn the keys of a step's every row and head first. A query is linear in
the weights that make it, rotation included, so its scale, 1 over the root of the head's size, can as well be theirs.
For most models that is a power of two, and no bit of a weight changes but its exponent.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
_LINEAR = ("Reshape", "RotaryEmbedding")
"""What a query may pass on its way, the query being the first input."""


def fold_scale(path: Path, size: int) -> dict[str, float]:
    """Changes the graph at `path`, of heads of this size, and its weights in place.

    Tells the scale by the name of each product that has it now: what is added to its queries has to have it too. An
    attention is left as it is where what makes its queries is not understood.
    """
    model = ir.load(path)
    scales: dict[str, float] = {}
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            scale = _fold(node, size, path.parent)
            product = _product(node.inputs[0])
            if scale is not None and product is not None:
                scales[product.name or ""] = scale
    ir.save(model, path)  # what lies outside of the graph's file stays where it is
    return scales


def _product(value: ir.Value | None) -> ir.Node | None:
    """What makes a query; None where a norm takes away what it is scaled by."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in (*_LINEAR, "Add"):
        before = _bias(node)[1] if node.op_type == "Add" else node.inputs[0]
        node = before.producer() if before is not None else None
    return node if node is not None and node.op_type in ("MatMul", "MatMulNBits") else None


def _fold(node: ir.Node, size: int, folder: Path) -> float | None:
    """Its scale, None where it is left as it is."""
    given = node.attributes.get("scale")
    scale = (given.as_float() if given is not None else 0.0) or size**-0.5
    parts = list(_parts(node.inputs[0], node.attributes["num_heads"].as_int() * size))
    if not parts or any(value is None or not _is_own(value) for value, _ in parts):
        return None
    for value, where in parts:
        _multiply(value, where, scale, folder)
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    return scale


def _parts(value: ir.Value | None, count: int) -> Iterator[tuple[Any, Any]]:
    """What a query of `count` numbers, the first of the value's, is linear in, and where in it the queries are.

    None for what is not known.
    """
    node = value.producer() if value is not None else None
    if node is None:
        yield None, None
    elif node.op_type in _LINEAR:
        yield from _parts(node.inputs[0], count)
    elif node.op_type == "SimplifiedLayerNormalization":  # of each head
        yield node.inputs[1], slice(None)
    elif node.op_type == "MatMul":
        yield node.inputs[1], (slice(None), slice(count))
    elif node.op_type == "MatMulNBits":
        outputs = node.attributes["N"].as_int()
        yield node.inputs[2], _first(count, outputs)
        if len(node.inputs) > 5 and node.inputs[5] is not None:
            yield node.inputs[5], slice(count)
    elif node.op_type == "Add":
        bias, rest = _bias(node)
        yield bias, slice(count)
        yield from _parts(rest, count)
    else:
        yield None, None


def _first(count: int, outputs: int) -> Any:
    """The scales of the first `count` of `outputs` columns, which may lie in one row."""
    return lambda array: array.reshape(outputs, -1)[:count]


def _bias(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    one, other = node.inputs[0], node.inputs[1]
    return (one, other) if one is not None and one.is_initializer() else (other, one)


def _is_own(value: ir.Value) -> bool:
    """Whether the graph holds it, in floats, for one node alone."""
    kinds = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    held = value.is_initializer() and value.const_value is not None
    return held and value.dtype in kinds and len(list(value.uses())) == 1


def _multiply(value: ir.Value, where: Any, scale: float, folder: Path) -> None:
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):  # where it lies: a copy would have to go into the graph's file
        shape = tuple(tensor.shape.numpy())
        file = folder / str(tensor.location)
        array = np.memmap(file, tensor.dtype.numpy(), "r+", offset=tensor.offset or 0, shape=shape)
        _view(array, where)[...] *= scale
        array.flush()
    elif tensor is not None:
        made = np.array(tensor.numpy())
        _view(made, where)[...] *= scale
        value.const_value = ir.tensor(made, name=value.name)


def _view(array: Array, where: Any) -> Array:
    view: Array = where(array) if callable(where) else array[where]
    return view
