"""A graph that computes logits for the positions that are asked for, not for a whole prompt.

Of a chunk of a prompt only the last position's logits are ever looked at, and the product that makes them
is a fifth of a small model's work. So whatever makes the logits is given the rows from `logits_from` on:

    hidden [batch, tokens, hidden] ── Slice ── product ── logits [batch, tokens - logits_from, vocabulary]

The input has a default, the first position: who does not know of it gets every position's, as before.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from flink_llm.engine.graphs import LOGITS_FROM

_PRODUCTS = ("MatMul", "MatMulNBits", "Gemm")
_END = np.iinfo(np.int64).max


def slice_logits(path: Path) -> bool:
    """Changes the graph at `path`; False, and nothing is changed, where its logits are no product."""
    model = ir.load(path)
    graph = model.graph
    logits = next(output for output in graph.outputs if output.name == "logits")
    product = logits_product(logits)
    if product is None:
        return False
    hidden = product.inputs[0]
    first = _constant(graph, LOGITS_FROM, 0)
    graph.inputs.append(first)  # an input with a value of its own has that by default
    end, axis = _constant(graph, f"{LOGITS_FROM}/end", _END), _constant(graph, f"{LOGITS_FROM}/axis", 1)
    node = ir.node("Slice", [hidden, first, end, axis], name=f"{LOGITS_FROM}/Slice")
    graph.insert_before(product, node)
    product.replace_input_with(0, node.outputs[0])
    if logits.shape is not None:
        logits.shape = ir.Shape([logits.shape[0], "logits_length", logits.shape[2]])
    ir.save(model, path)  # what lies outside of the graph's file stays where it is
    return True


def logits_product(value: ir.Value) -> ir.Node | None:
    """The product by the vocabulary's matrix, behind what scales, caps or casts its result."""
    node = value.producer()
    while node is not None and node.op_type not in _PRODUCTS:
        before = node.inputs[0] if node.inputs else None
        node = before.producer() if before is not None else None
    return node


def _constant(graph: ir.Graph, name: str, value: int) -> ir.Value:
    tensor = ir.tensor(np.array([value], np.int64), name=name)
    made = ir.Value(name=name, const_value=tensor, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    graph.register_initializer(made)
    return made
