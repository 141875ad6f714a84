"""Branches for LoRA adapters in a graph, and the files that their matrices come from. See `adapters`.

onnxruntime-genai's builder makes one product of queries, keys and values where it can, and two of a `gate_up`
matrix: an adapter's B is put into the columns of its part, so that a product has one branch, whose A holds
those of all its parts side by side.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from flink_llm.engine.export_peft import PeftAdapter
from flink_llm.engine.model import adapter_file
from flink_llm.errors import ExportError

_PRODUCT = re.compile(r"/model/(layers\.\d+/(?:attn|mlp)/\w+)/MatMul(?:_Q\d+)?")
_MODULE = re.compile(r"model\.(layers\.\d+)\.(self_attn|mlp)\.(\w+)")
_PARTS = {
    "q_proj": ("attn", ("q_proj",)),
    "k_proj": ("attn", ("k_proj",)),
    "v_proj": ("attn", ("v_proj",)),
    "qkv_proj": ("attn", ("q_proj", "k_proj", "v_proj")),
    "o_proj": ("attn", ("o_proj",)),
    "gate_proj": ("mlp", ("gate_proj",)),
    "up_proj": ("mlp", ("up_proj",)),
    "gate_up_proj": ("mlp", ("gate_proj", "up_proj")),
    "down_proj": ("mlp", ("down_proj",)),
}
"""What a module of the original is in the graph; parts in the order of their rows."""
_PACKED = ("q_proj", "k_proj", "v_proj")
Array = NDArray[np.floating[Any]]
_Pairs = dict[str, tuple[Array, Array]]
"""A [inputs, rank] and B [rank, outputs] by product."""


@dataclass(frozen=True)
class _Product:
    node: ir.Node
    inputs: int
    outputs: int


class Branches:
    """The products of a graph that adapters may change. `config` is the original's configuration, `scales` what the
    queries of a product, by its name, are multiplied by."""

    def __init__(self, graph: ir.Graph, config: dict[str, Any], scales: Mapping[str, float]) -> None:
        self._graph = graph
        self._scales = scales
        self._products = _products(graph)
        heads = int(config["num_attention_heads"])
        size = int(config.get("head_dim") or config["hidden_size"] // heads)
        keys = size * int(config.get("num_key_value_heads") or heads)
        middle = int(config["intermediate_size"])
        self._rows = {
            "q_proj": heads * size, "k_proj": keys, "v_proj": keys, "o_proj": int(config["hidden_size"]),
            "gate_proj": middle, "up_proj": middle, "down_proj": int(config["hidden_size"]),
        }  # fmt: skip
        cache = next(value for value in graph.inputs if value.name == "past_key_values.0.key")
        self._type = ir.DataType.FLOAT16 if cache.dtype == ir.DataType.FLOAT16 else ir.DataType.FLOAT

    def pairs(self, adapter: PeftAdapter) -> _Pairs:
        """An adapter's matrices as the graph takes them. Raises ExportError for a module that it cannot place."""
        found: dict[str, list[tuple[Array, Array]]] = {}
        for module, (a, b) in adapter.changes.items():
            match = _MODULE.fullmatch(module)
            if match is None or match[3] not in _PARTS:
                raise ExportError(f"adapter {adapter.name} changes {module}, which cannot be served")
            room, parts = _PARTS[match[3]]
            rows = [self._rows[part] for part in parts]
            for product, begin, end, at in self._places(f"{match[1]}.{room}", parts, rows):
                there = self._products.get(product)
                if there is None:
                    raise ExportError(f"adapter {adapter.name} changes {module}, which the model does not have")
                if a.shape[1] != there.inputs or len(b) != sum(rows):
                    raise ExportError(
                        f"adapter {adapter.name} is {a.shape[1]} to {len(b)} at {module}, "
                        f"the model {there.inputs} to {sum(rows)}"
                    )
                below = np.zeros((len(a), there.outputs), np.float32)
                below[:, at : at + end - begin] = b[begin:end].T
                below[:, : self._rows["q_proj"]] *= self._scales.get(there.node.name or "", 1.0)
                found.setdefault(product, []).append((a.T, below))
        kind = self._type.numpy()
        # In rows: safetensors writes an array's memory as it lies there.
        return {
            product: (
                np.concatenate([a for a, _ in each], axis=1).astype(kind, order="C"),
                np.concatenate([b for _, b in each]).astype(kind, order="C"),
            )
            for product, each in found.items()
        }

    def add(self, ranks: dict[str, tuple[int, ...]]) -> None:
        """Adds a branch to each of these products; `ranks`, of each adapter there, are a group of their own."""
        groups: dict[tuple[int, ...], int] = {}
        switches: dict[int, tuple[ir.Value, ir.Value]] = {}
        for product in sorted(ranks):
            group = groups.setdefault(ranks[product], len(groups))
            if group not in switches:
                on = self._default(f"adapter.{group}.on", np.array([False]), [1])
                rows = self._default(f"adapter.{group}.rows", np.zeros((1, 1, 1), bool), ["rows", 1, f"rank_{group}"])
                switches[group] = on, rows
            self._branch(product, group, *switches[group])

    def _places(self, room: str, parts: Sequence[str], rows: Sequence[int]) -> list[tuple[str, int, int, int]]:
        """Of a module's rows: the product they are in, from which to which, and at which of its columns they begin.

        Rows that follow one another in one product are one place: they share an A.
        """
        found: list[tuple[str, int, int, int]] = []
        begin = 0
        for part, count in zip(parts, rows, strict=True):
            product, at = f"{room}.{part}", 0
            if part in _PACKED and f"{room}.qkv_proj" in self._products:
                product = f"{room}.qkv_proj"
                at = sum(self._rows[before] for before in _PACKED[: _PACKED.index(part)])
            if found and found[-1][0] == product and found[-1][3] + found[-1][2] - found[-1][1] == at:
                found[-1] = (product, found[-1][1], begin + count, found[-1][3])
            else:
                found.append((product, begin, begin + count, at))
            begin += count
        return found

    def _branch(self, product: str, group: int, on: ir.Value, rows: ir.Value) -> None:
        there = self._products[product]
        kind, rank, name = self._type.numpy(), f"rank_{group}", f"adapter/{product}"
        a = self._default(f"adapter.{group}.{product}.A", np.zeros((there.inputs, 1), kind), [there.inputs, rank])
        b = self._default(f"adapter.{group}.{product}.B", np.zeros((1, there.outputs), kind), [rank, there.outputs])
        alone = there.node.outputs[0]
        uses = list(alone.uses())
        read = _node("MatMul", [there.node.inputs[0], a], f"{name}/A")
        own = _node("Where", [rows, read.outputs[0], self._zero()], f"{name}/rows")
        told = _node("MatMul", [own.outputs[0], b], f"{name}/B")
        both = _node("Add", [alone, told.outputs[0]], f"{name}/Add")
        same = _node("Identity", [alone], f"{name}/same")
        branches = {
            "then_branch": ir.Graph([], both.outputs, nodes=[read, own, told, both], name=f"{name}/with"),
            "else_branch": ir.Graph([], same.outputs, nodes=[same], name=f"{name}/without"),
        }
        chosen = _node("If", [on], f"{name}/If", branches)
        for value in (both.outputs[0], same.outputs[0], chosen.outputs[0]):
            value.shape, value.type = alone.shape, alone.type
        for user, number in uses:
            user.replace_input_with(number, chosen.outputs[0])
        self._graph.insert_after(there.node, chosen)

    def _default(self, name: str, array: NDArray[np.generic], shape: Sequence[int | str]) -> ir.Value:
        """An input that has a value of its own by default, of rank 1 where a run's may have another."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype))
        self._graph.register_initializer(value)
        self._graph.inputs.append(value)
        return value

    def _zero(self) -> ir.Value:
        if "adapter/zero" not in self._graph.initializers:
            tensor = ir.tensor(np.zeros((), self._type.numpy()), name="adapter/zero")
            value = ir.Value(
                name="adapter/zero", const_value=tensor, shape=ir.Shape([]), type=ir.TensorType(self._type)
            )
            self._graph.register_initializer(value)
        return self._graph.initializers["adapter/zero"]


def add_adapters(
    path: Path, adapters: Sequence[PeftAdapter], config: dict[str, Any], scales: Mapping[str, float]
) -> None:
    """Gives the graph at `path` branches, and writes the adapters' files beside it. `scales`: see `fold_scale`.

    Raises ExportError for an adapter of another model.
    """
    from safetensors.numpy import save_file

    model = ir.load(path)
    branches = Branches(model.graph, config, scales)
    pairs = [branches.pairs(adapter) for adapter in adapters]
    changed = {product for each in pairs for product in each}
    branches.add({product: tuple(_rank(each, product) for each in pairs) for product in changed})
    ir.save(model, path)  # what lies outside of the graph's file stays where it is
    for adapter, each in zip(adapters, pairs, strict=True):
        arrays = {
            f"{product}.{part}": array for product, pair in each.items() for part, array in zip("AB", pair, strict=True)
        }
        save_file(arrays, path.parent / adapter_file(adapter.name))


def _node(
    kind: str, inputs: Sequence[ir.Value | None], name: str, attributes: Mapping[str, Any] | None = None
) -> ir.Node:
    """Its output is named after it: names of a graph and of the graphs in it must differ."""
    node = ir.node(kind, inputs, attributes, name=name)
    node.outputs[0].name = f"{name}/output"
    return node


def _rank(pairs: _Pairs, product: str) -> int:
    return pairs[product][0].shape[1] if product in pairs else 0


def _products(graph: ir.Graph) -> dict[str, _Product]:
    """By a name such as layers.0.attn.q_proj."""
    found = {}
    for node in graph:
        match = _PRODUCT.fullmatch(node.name or "")
        if match is None:
            continue
        if node.op_type == "MatMulNBits":
            sizes = [node.attributes["K"].as_int(), node.attributes["N"].as_int()]
        else:
            shape = node.inputs[1].shape if node.inputs[1] is not None else None
            sizes = [size for size in shape or () if isinstance(size, int)]
        if len(sizes) == 2:
            found[match[1].replace("/", ".")] = _Product(node, sizes[0], sizes[1])
    return found
