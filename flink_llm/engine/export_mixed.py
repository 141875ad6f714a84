"""A decoder's graph for mixed runs: a part of one prompt, and a token of everybody who decodes, in one run.

A run reads all weights, however few tokens it is given, so prompts and steps had better share theirs
(Agrawal et al. 2024, "Sarathi-Serve"). GroupQueryAttention takes no batch of longer sequences with a past. So all
tokens are one row of the graph, those of the prompt first, and each layer has two attentions:

    [1, chunk + rows, ·] ── Split ──┬── GroupQueryAttention [1, chunk, ·] ──────────────────┬── Concat ──
                                    └── Reshape ── GroupQueryAttention [rows, 1, ·] ── Reshape ──┘

of which there is a kernel for those that are a RotaryAttention (`functions`). All else in a decoder looks at one token
at a time. The weights stay in the file that both forms name.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from flink_llm.engine import functions
from flink_llm.engine.graphs import LOGITS_FROM
from flink_llm.engine.mixed import CHUNK_LENGTH, CHUNK_PAST, CHUNK_PRESENT, CHUNK_TOTAL, ROWS_LENGTHS, ROWS_TOTAL, SPLIT
from flink_llm.engine.model import DATA
from flink_llm.engine.quantize import sweep

_ATTENTIONS = {"GroupQueryAttention": 3, "RotaryAttention": 1}
"""How many inputs have a place for each token: queries, keys and values, or all in one. Behind them are the past keys
and values, the rows' lengths and the longest; and then what is of the model, or None."""
_PASTS, _LENGTHS = 2, 2
_LENGTHS_OF: dict[str, list[int | str]] = {CHUNK_LENGTH: [1], CHUNK_TOTAL: [1], ROWS_LENGTHS: ["rows"], ROWS_TOTAL: [1]}


def mix(source: Path, to: Path) -> bool:
    """Writes the form of the graph `source` for mixed runs to `to`, beside it.

    False, and nothing is written, where the graph is not understood: one that makes the logits of every position,
    holds its weights itself, or looks at more than one token outside of its attentions.
    """
    model = ir.load(source)
    graph = model.graph
    mask = next((value for value in graph.inputs if value.name == "attention_mask"), None)
    if mask is None or LOGITS_FROM not in graph.initializers or not (source.parent / DATA).exists():
        return False
    lengths = [_input(graph, name, ir.DataType.INT32, shape) for name, shape in _LENGTHS_OF.items()]
    split = _input(graph, SPLIT, ir.DataType.INT64, [2])
    attentions = [node for node in graph if node.op_type in _ATTENTIONS]
    for node in attentions:
        (_join if node.op_type == "RotaryAttention" else _divide)(graph, node, split, lengths)
    sweep(graph)  # what made the lengths of the mask
    if mask.uses() or not attentions:
        return False
    graph.inputs.remove(mask)
    functions.complete(model)
    ir.save(model, to)
    return True


def _join(graph: ir.Graph, node: ir.Node, split: ir.Value, lengths: list[ir.Value]) -> None:
    """Puts a function of two attentions in the place of one."""
    packed, *past = node.inputs[: 1 + _PASTS]
    chunk_past = [_twin(graph, value) for value in past if value is not None]
    rotation = node.inputs[1 + _PASTS + _LENGTHS :]
    inputs = [packed, *past, *lengths[2:], *chunk_past, *lengths[:2], split, *rotation]
    made = ir.node("MixedAttention", inputs, dict(node.attributes), domain=functions.DOMAIN, num_outputs=5)
    graph.insert_before(node, [made])
    _replace(graph, node, made.outputs[0], made.outputs[1:3], made.outputs[3:])


def _divide(graph: ir.Graph, node: ir.Node, split: ir.Value, lengths: list[ir.Value]) -> None:
    """Puts two attentions in the place of one."""
    nodes: list[ir.Node] = []

    def add(kind: str, inputs: list[ir.Value | None], outputs: int = 1, **attributes: int) -> list[ir.Value]:
        nodes.append(ir.node(kind, inputs, attributes, num_outputs=outputs))
        return list(nodes[-1].outputs)

    of_chunk: list[ir.Value | None] = []
    of_rows: list[ir.Value | None] = []
    tokens = _ATTENTIONS[node.op_type]
    for value in node.inputs[:tokens]:
        if value is None:
            of_chunk.append(None)
            of_rows.append(None)
            continue
        chunk, rows = add("Split", [value, split], 2, axis=1)
        of_chunk.append(chunk)
        of_rows += add("Reshape", [rows, _shape(graph, [-1, 1], value)])
    chunk_lengths, rows_lengths = lengths[:2], lengths[2:]
    past = node.inputs[tokens : tokens + _PASTS]
    chunk_past = [_twin(graph, value) for value in past if value is not None]
    chunk_out = _attend(nodes, node, [*of_chunk, *chunk_past, *chunk_lengths])
    rows_out = _attend(nodes, node, [*of_rows, *past, *rows_lengths])
    (flat,) = add("Reshape", [rows_out[0], _shape(graph, [1, -1], node.outputs[0])])
    (both,) = add("Concat", [chunk_out[0], flat], axis=1)
    graph.insert_before(node, nodes)
    _replace(graph, node, both, rows_out[1:], chunk_out[1:])


def _replace(
    graph: ir.Graph, node: ir.Node, both: ir.Value, presents: Sequence[ir.Value], of_chunk: Sequence[ir.Value]
) -> None:
    """The outputs of an attention are these, and the cache of the prompt's row is one of the graph."""
    both.shape, both.type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(both)
    for old, present, chunk in zip(node.outputs[1:], presents, of_chunk, strict=True):
        name = old.name or ""
        _take_over(graph, old, present, name)
        chunk.name = f"{CHUNK_PRESENT}{name.removeprefix('present')}"
        chunk.shape, chunk.type = old.shape, old.type
        graph.outputs.append(chunk)
    graph.remove(node, safe=True)


def _attend(nodes: list[ir.Node], node: ir.Node, inputs: list[ir.Value | None]) -> list[ir.Value]:
    """The same attention over other queries, keys, values and lengths."""
    behind = node.inputs[_ATTENTIONS[node.op_type] + _PASTS + _LENGTHS :]
    made = ir.node(node.op_type, [*inputs, *behind], dict(node.attributes), domain=node.domain, num_outputs=3)
    nodes.append(made)
    return list(made.outputs)


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value, name: str) -> None:
    """An output of the graph is made by another node."""
    old.name = f"{name}/before_mixed"
    new.name, new.shape, new.type = name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _twin(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """An input as this one, for the prompt's row of the cache."""
    name = f"{CHUNK_PAST}{(value.name or '').removeprefix('past_key_values')}"
    made = ir.Value(name=name, shape=value.shape, type=value.type)
    graph.inputs.append(made)
    return made


def _input(graph: ir.Graph, name: str, kind: ir.DataType, shape: list[int | str]) -> ir.Value:
    made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
    graph.inputs.append(made)
    return made


def _shape(graph: ir.Graph, before: list[int], value: ir.Value) -> ir.Value:
    """A constant shape whose last dimension is that of `value`."""
    if value.shape is None or not isinstance(value.shape[-1], int):
        raise ValueError(f"{value.name} has no fixed size")
    sizes = [*before, value.shape[-1]]
    name = f"mixed/{'x'.join(map(str, sizes))}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(sizes, np.int64), name=name)
        made = ir.Value(name=name, const_value=tensor, shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.INT64))
        graph.register_initializer(made)
    return graph.initializers[name]
