"""A decoder's graph in fewer operators: those of `functions`, for which there may be kernels.

A step of one row spends as much time between its small operators as in its products. So what lies between two
products, or two attentions, becomes one operator with them:

    SkipSimplifiedLayerNormalization ── product                                ── SkipRowLinear
    SkipSimplifiedLayerNormalization ─┬ product ── x * sigmoid(x) ─┬ Mul       ── SkipGatedRowLinear
                                      └ product ───────────────────┘
"""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from flink_llm.engine.functions import ATTENTION_ATTRIBUTES, BLOCK_ATTRIBUTES, DOMAIN, complete
from flink_llm.engine.quantize import sweep

_KEY, _VALUE, _PAST_KEY, _SINES = 1, 2, 3, 8
_PLAIN = {"do_rotary": 1, "local_window_size": -1, "rotary_interleaved": 0, "smooth_softmax": 0, "softcap": 0.0}
"""What an attention's attributes have to be, where it has them."""


def fuse(path: Path, head_dim: int) -> None:
    """Rewrites the graph in a file, beside its weights. What is not understood stays as it is."""
    model = ir.load(path)
    graph = model.graph
    for node in list(graph):
        if node.op_type == "MatMulNBits" and _in_four_bits(node):
            attributes = {name: node.attributes[name] for name in BLOCK_ATTRIBUTES}
            _replace(graph, node, "BlockLinear", node.inputs[:3], attributes, 1)
        elif node.op_type == "GroupQueryAttention" and head_dim % 16 == 0 and _is_plain(node):
            inputs = [value for value in node.inputs[: _SINES + 1] if value is not None]
            attributes = {name: node.attributes[name] for name in ATTENTION_ATTRIBUTES if name in node.attributes}
            attributes.setdefault("scale", ir.AttrFloat32("scale", 0.0))
            _replace(graph, node, "RotaryAttention", inputs, attributes, 3)
    sweep(graph)
    for node in list(graph):
        if node.op_type == "SkipSimplifiedLayerNormalization":
            _fuse_norm(graph, node)
    sweep(graph)
    graph.sort()  # a fused norm lies where its last product was
    complete(model)
    ir.save(model, path)


def _in_four_bits(node: ir.Node) -> bool:
    attributes = [node.attributes.get(name) for name in BLOCK_ATTRIBUTES]
    if None in attributes or any(value is not None for value in node.inputs[3:]):
        return False
    _, _, bits, block, accuracy = (attribute.as_int() for attribute in attributes if attribute is not None)
    return bits == 4 and block % 128 == 0 and accuracy == 4  # products of bytes, as a kernel's are


def _is_plain(node: ir.Node) -> bool:
    inputs = list(node.inputs)
    past = inputs[_PAST_KEY]
    has = [value is not None for value in inputs]
    for name, wanted in _PLAIN.items():
        found = node.attributes.get(name)
        absent = 0 if name == "do_rotary" else wanted
        if (found.value if found is not None else absent) != wanted:
            return False
    others = set(node.attributes) - {*_PLAIN, *ATTENTION_ATTRIBUTES}
    if others or past is None or past.dtype != ir.DataType.FLOAT or len(inputs) <= _SINES:
        return False
    return all(has[_PAST_KEY : _SINES + 1]) and not any([has[_KEY], has[_VALUE], *has[_SINES + 1 :]])


def _fuse_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Where all that a norm goes to is one product, or the two of a gate."""
    outputs = list(node.outputs)
    products = [use.node for use in outputs[0].uses()]
    kinds = {product.op_type for product in products}
    if len(node.inputs) != 3 or len(outputs) < 4 or any(output.uses() for output in outputs[1:3]) or len(kinds) != 1:
        return
    kind = kinds.pop()
    end: ir.Value | None
    made = [output for product in products for output in product.outputs]
    matrices = [value for product in products for value in product.inputs[1:]]
    if kind in ("RowLinear", "BlockLinear") and len(products) == 1:
        end, name = made[0], f"Skip{kind}"
    elif kind in ("RowLinear2", "BlockLinear") and len(made) == 2 and not outputs[0].is_graph_output():
        if any({**product.attributes} != {**products[0].attributes} for product in products):
            return
        end, name = _gated(*made), f"SkipGated{kind.removesuffix('2')}"
        if end is None:
            end, matrices = _gated(*reversed(made)), matrices[2:] + matrices[:2]
    else:
        return
    if end is None:
        return
    attributes = {"epsilon": node.attributes["epsilon"], **products[0].attributes}
    new = ir.node(name, [*node.inputs, *matrices], attributes, domain=DOMAIN, num_outputs=2)
    graph.insert_after(products[-1], new)
    _take_over(new.outputs[0], end)
    _take_over(new.outputs[1], outputs[3])


def _gated(gate: ir.Value, up: ir.Value) -> ir.Value | None:
    """`gate * sigmoid(gate) * up`, where that is all that becomes of the two."""
    uses = {use.node.op_type: use.node for use in gate.uses()}
    if set(uses) != {"Sigmoid", "Mul"} or len(gate.uses()) != 2:
        return None
    weight, inner = uses["Sigmoid"].outputs[0], uses["Mul"].outputs[0]
    outer = [use.node for use in up.uses()]
    if [use.node for use in weight.uses()] != [uses["Mul"]] or [use.node for use in inner.uses()] != outer:
        return None
    fits = len(outer) == 1 and outer[0].op_type == "Mul" and set(outer[0].inputs) == {inner, up}
    return outer[0].outputs[0] if fits else None


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, ir.Attr],
    outputs: int,
) -> None:
    new = ir.node(kind, inputs, attributes, domain=DOMAIN, num_outputs=outputs)
    graph.insert_before(node, new)
    for number in range(outputs):
        _take_over(new.outputs[number], node.outputs[number])


def _take_over(new: ir.Value, old: ir.Value) -> None:
    """What used one value uses another, by its name."""
    name = old.name
    old.name = f"{name}/unfused"
    new.name, new.shape, new.type = name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
