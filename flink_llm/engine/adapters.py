"""LoRA adapters of a decoder (Hu et al. 2021): what each row of a run has added to the graph's products.

A graph that was exported with adapters has a branch beside each product that one of them changes:

    x ──┬── product ────────────────────────────── Add ── y
        └── MatMul A ── Where rows ── MatMul B ─────┘

A [inputs, rank] and B [rank, outputs] are inputs whose defaults add nothing. In a run of one adapter they are
that one's, in a run of several all adapters' side by side, and `rows` [rows, 1, rank] says which columns are
a row's own: whoever shares a run shares the product, which is the dear part. A row without an adapter gets
zeros that are zeros whatever the others compute.

A branch's inputs are `adapter.GROUP.PRODUCT.A` and `.B`; branches whose adapters have the same ranks are a
group, and share `adapter.GROUP.rows`. An adapter's file has the tensors `PRODUCT.A` and `PRODUCT.B`.
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
_Matrices = dict[str, ort.OrtValue]


class Adapters:
    """The adapters of a graph, of which each run is bound to those that its rows need.

    `device` is "cpu" or "cuda:N". Raises ModelFolderError for a file that is not the graph's.
    """

    def __init__(self, folder: ModelFolder, session: ort.InferenceSession, device: str) -> None:
        self.names = tuple(folder.manifest.adapters)
        self._numbers = {name: number for number, name in enumerate(("", *self.names))}
        self._device, _, number = device.partition(":")
        self._device_id = int(number or 0)
        self._matrices: dict[int, _Matrices] = {}
        self._owners: dict[str, NDArray[np.int64]] = {}
        self._rows: list[ort.OrtValue] = []
        if self.names:
            self._read(folder, session)

    def number(self, adapter: str) -> int:
        """What stands for an adapter in `bind`. Raises KeyError."""
        return self._numbers[adapter]

    def bind(self, binding: ort.IOBinding, rows: NDArray[np.int64], bound: int = BASE) -> int:
        """Binds what `rows`, the number of each row's adapter, need. Valid until the next `bind`.

        `bound` is what this gave for the binding before. Raises IndexError for a number that is none.
        """
        used = np.unique(rows[rows != BASE])
        need = BASE if not len(used) else int(used[0]) if len(used) == 1 else _ALL
        if need != bound:
            for name, value in self._matrices[need].items():
                binding.bind_ortvalue_input(name, value)
        if need != BASE:
            column = rows.reshape(-1, 1, 1)
            owners = dict.fromkeys(self._owners, np.array([need])) if need != _ALL else self._owners
            masks = {name: ort.OrtValue.ortvalue_from_numpy(column == owner) for name, owner in owners.items()}
            for name, value in masks.items():
                binding.bind_ortvalue_input(name, value)
            self._rows = list(masks.values())  # ONNX Runtime reads them where they are
        return need

    def _read(self, folder: ModelFolder, session: ort.InferenceSession) -> None:
        inputs = {value.name: value for value in session.get_overridable_initializers()}
        branches = {match[2]: match[1] for name in inputs if (match := _INPUT.fullmatch(name))}
        files = [_tensors(folder, name) for name in self.names]
        for name, tensors in zip(self.names, files, strict=True):
            surplus = sorted({tensor[:-2] for tensor in tensors} - set(branches))
            if surplus or not tensors:
                what = f"changes {surplus[0]}, of which the graph has no branch" if surplus else "changes nothing"
                raise ModelFolderError(f"{folder.manifest.name}: the adapter {name} {what}")
        self._matrices = {number: {} for number in (_ALL, *range(len(files) + 1))}
        for product, group in branches.items():
            a, b, rows = (f"adapter.{group}.{part}" for part in (f"{product}.A", f"{product}.B", "rows"))
            if b not in inputs or rows not in inputs:
                raise ModelFolderError(f"{folder.manifest.name}: the graph's branch at {product} is half there")
            pairs = [
                _pair(f"{folder.manifest.name}: the adapter {name}", tensors, product, inputs[a], inputs[b])
                for name, tensors in zip(self.names, files, strict=True)
            ]
            owner = np.repeat(np.arange(1, len(pairs) + 1), [len(below) for _, below in pairs])
            if not np.array_equal(self._owners.setdefault(rows, owner), owner):
                raise ModelFolderError(
                    f"{folder.manifest.name}: adapters have other ranks at {product} than in its group"
                )
            self._keep(a, b, pairs)
        for rows in self._owners:
            self._matrices[BASE][rows] = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, 1), dtype=bool))

    def _keep(self, a: str, b: str, pairs: list[tuple[Array, Array]]) -> None:
        """Puts a branch's matrices where runs find them: none, each adapter's, all side by side."""
        none = (
            np.zeros_like(pairs[0][0], shape=(len(pairs[0][0]), 1)),
            np.zeros_like(pairs[0][1], shape=(1, pairs[0][1].shape[1])),
        )
        every = np.concatenate([left for left, _ in pairs], axis=1), np.concatenate([below for _, below in pairs])
        sets = {BASE: none, _ALL: every, **dict(enumerate(pairs, 1))}
        for number, (left, below) in sets.items():
            if not len(below):  # an adapter that leaves this product alone
                left, below = none
            self._matrices[number][a] = self._value(left)
            self._matrices[number][b] = self._value(below)

    def _value(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, self._device_id)


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
