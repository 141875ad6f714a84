"""LoRA adapters of a decoder (Hu et al. 2021): what each row of a run has added to the graph's products.

A graph that was exported with adapters has a branch beside each product that one of them changes:

    x ──┬── product ───────────────────────────┬── If on ── y
        └── MatMul A ── Where rows ── MatMul B ─┴── Add ──┘

A [inputs, rank] and B [rank, outputs] are inputs. In a run of one adapter they are that one's, in a run of
several all adapters' side by side, and `rows` [rows, 1, rank] says which columns are a row's own: whoever
shares a run shares the product, which is the dear part. A row without an adapter gets zeros that are zeros
whatever the others compute. By default `on` is false and the branch is not computed.

A branch's inputs are `adapter.GROUP.PRODUCT.A` and `.B`; branches whose adapters have the same ranks are a
group, and share `adapter.GROUP.on` and `.rows`. An adapter's file has the tensors `PRODUCT.A` and `PRODUCT.B`.
"""

import re
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flink_llm.engine.model import ModelFolder, adapter_file
from flink_llm.engine.tensors import Array, read_tensors
from flink_llm.errors import ModelFolderError

BASE = 0
"""The number of no adapter; the first has 1."""
_ALL = -1
_INPUT = re.compile(r"adapter\.(\d+)\.(.+)\.A")
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Adapters:
    """The adapters of a graph, of which each run is bound to those that its rows need.

    `device` is "cpu" or "cuda:N". Raises ModelFolderError for a file that is not the graph's.
    """

    def __init__(self, folder: ModelFolder, session: ort.InferenceSession, device: str) -> None:
        self.names = tuple(folder.manifest.adapters)
        self._numbers = {name: number for number, name in enumerate(("", *self.names))}
        self._device, _, number = device.partition(":")
        self._device_id = int(number or 0)
        self._values: dict[int, dict[str, ort.OrtValue]] = {}
        self._owners: dict[int, dict[str, NDArray[np.int64]]] = {}
        self._rows: list[ort.OrtValue] = []
        if self.names:
            self._read(folder, session)

    def number(self, adapter: str) -> int:
        """What stands for an adapter in `bind`. Raises KeyError."""
        return self._numbers[adapter]

    def bind(self, binding: ort.IOBinding, rows: NDArray[np.int64], bound: int = BASE) -> int:
        """Binds what `rows`, the number of each row's adapter, need. Valid until the next `bind`.

        `bound` is what this gave for the binding before. Raises KeyError for a number that none of the graph's has.
        """
        if not self.names:
            return BASE
        used = np.unique(rows[rows != BASE])
        need = BASE if not len(used) else int(used[0]) if len(used) == 1 else _ALL
        if need != bound:
            for name, value in self._values[need].items():
                binding.bind_ortvalue_input(name, value)
        if need != BASE:
            column, owners = rows.reshape(-1, 1, 1), self._owners[need]
            masks = {name: ort.OrtValue.ortvalue_from_numpy(column == owner) for name, owner in owners.items()}
            for name, value in masks.items():
                binding.bind_ortvalue_input(name, value)
            # ONNX Runtime reads them where they are; those of branches that are off it does not read.
            self._rows = list(masks.values())
        return need

    def _read(self, folder: ModelFolder, session: ort.InferenceSession) -> None:
        inputs = {value.name: value for value in session.get_overridable_initializers()}
        branches = {match[2]: match[1] for name in inputs if (match := _INPUT.fullmatch(name))}
        files = [_tensors(folder, name) for name in self.names]
        for name, tensors in zip(self.names, files, strict=True):
            surplus = sorted(set(tensors) - {f"{product}.{part}" for product in branches for part in "AB"})
            if surplus or not tensors:
                what = f"has {surplus[0]}, of which the graph has no branch" if surplus else "changes nothing"
                raise ModelFolderError(f"{folder.manifest.name}: the adapter {name} {what}")
        self._values = {number: {} for number in (BASE, _ALL, *self._numbers.values())}
        self._owners = {number: {} for number in self._values}
        for product, group in branches.items():
            a, b, on, rows = (f"adapter.{group}.{part}" for part in (f"{product}.A", f"{product}.B", "on", "rows"))
            if not {b, on, rows} <= set(inputs):
                raise ModelFolderError(f"{folder.manifest.name}: the graph's branch at {product} is half there")
            pairs = [
                _pair(f"{folder.manifest.name}: the adapter {name}", tensors, product, inputs[a], inputs[b])
                for name, tensors in zip(self.names, files, strict=True)
            ]
            owner = np.repeat(np.arange(1, len(pairs) + 1), [len(below) for _, below in pairs])
            if not np.array_equal(self._owners[_ALL].setdefault(rows, owner), owner):
                raise ModelFolderError(
                    f"{folder.manifest.name}: adapters have other ranks at {product} than in its group"
                )
            left, below = (
                np.concatenate(each, axis=axis) for each, axis in zip(zip(*pairs, strict=True), (1, 0), strict=True)
            )
            for number, pair in enumerate(((left, below), *pairs)):
                if len(pair[1]):
                    self._values[number or _ALL] |= {a: self._value(pair[0]), b: self._value(pair[1])}
                    self._values[number or _ALL][on] = _switch(True)
                    self._owners[number or _ALL].setdefault(rows, np.array([number]))
        for values in self._values.values():
            for rows in self._owners[_ALL]:
                values.setdefault(rows.replace("rows", "on"), _switch(False))

    def _value(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, self._device_id)


def _switch(on: bool) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.array([on]))


def _tensors(folder: ModelFolder, adapter: str) -> dict[str, Array]:
    name = adapter_file(adapter)
    if name not in folder.files:
        raise ModelFolderError(f"{folder.manifest.name}: the adapter {adapter} has no file {name}")
    try:
        return read_tensors(folder.files[name])
    except ValueError as error:
        raise ModelFolderError(f"{folder.manifest.name}: {name} is not an adapter: {error}") from error


def _pair(whose: str, tensors: dict[str, Array], product: str, a: Any, b: Any) -> tuple[Array, Array]:
    """A and B of an adapter at a product, checked against the graph's inputs; of rank 0 where it has none."""
    kind = _TYPES.get(a.type)
    left = tensors.get(f"{product}.A", np.zeros((a.shape[0], 0), kind))
    below = tensors.get(f"{product}.B", np.zeros((0, b.shape[1]), kind))
    rank = left.shape[1] if left.ndim == 2 else 0
    if left.shape != (a.shape[0], rank) or below.shape != (rank, b.shape[1]):
        shapes = f"{list(left.shape)} and {list(below.shape)}"
        raise ModelFolderError(f"{whose} is {shapes} at {product}, which is {a.shape[0]} to {b.shape[1]}")
    if {left.dtype, below.dtype} != {np.dtype(kind)} or a.type != b.type:
        raise ModelFolderError(f"{whose} is {left.dtype} and {below.dtype} at {product}, the graph's branch {a.type}")
    if not (np.isfinite(left).all() and np.isfinite(below).all()):
        raise ModelFolderError(f"{whose} is not finite at {product}")
    return left, below
