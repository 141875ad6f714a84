"""The KV cache of a decoder: one buffer per layer and part, [slots, kv heads, context, head dimension].

A run is bound to consecutive rows of it. GroupQueryAttention writes the new token's key and value behind
what a row holds, as the attention mask tells it, in every row that is bound: those that do not decode too.
Where the buffers are in reach of NumPy, such a row is *parked*: its mask says that it holds nothing, so that
it costs nothing, and what it then loses, its first position, is put back before the row is used again.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
_NO_LARGE_PAGES = 15
"""MADV_NOHUGEPAGE, see madvise(2)."""
_SHARE = 8
"""Up to what part of the memory that is free a cache is made whole when it is loaded, in large pages if there are."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container says how much memory it has, by cgroups' version 2 and 1."""


class KvCache:
    """`shape` is [kv heads, context, head dimension]; `device` "cpu" or "cuda:N"."""

    def __init__(self, layers: int, slots: int, shape: tuple[int, int, int], dtype: Any, device: str) -> None:
        self._shape = shape
        self._dtype = dtype
        self._device, _, number = device.partition(":")
        self._device_id = int(number or 0)
        self._row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._values = {
            f"{layer}.{part}": ort.OrtValue.ortvalue_from_shape_and_type(
                [slots, *shape], dtype, self._device, self._device_id
            )
            for layer in range(layers)
            for part in ("key", "value")
        }
        self._arrays = [self._array(value, slots) for value in self._values.values()] if device == "cpu" else []
        if self._arrays and len(self._arrays) * slots * self._row_bytes <= _room() // _SHARE:
            for array in self._arrays:  # else a slot's first prompt would have the system make its pages
                array.fill(0)
        elif self._arrays:
            for value in self._values.values():
                _in_small_pages(value.data_ptr(), slots * self._row_bytes)
        self._parked: dict[int, list[Array]] = {}

    @property
    def in_reach(self) -> bool:
        """Whether rows can be copied and parked."""
        return bool(self._arrays)

    def bind(
        self, binding: ort.IOBinding, *, first: int, rows: int, past: str = "past_key_values", present: str = "present"
    ) -> None:
        """Binds rows `first` and on as a run's past and present, inputs and outputs whose names begin so."""
        shape = [rows, *self._shape]
        for name, value in self._values.items():
            at = value.data_ptr() + first * self._row_bytes
            where = (self._device, self._device_id, self._dtype, shape, at)
            binding.bind_input(f"{past}.{name}", *where)
            binding.bind_output(f"{present}.{name}", *where)

    def copy(self, source: int, target: int, count: int) -> None:
        """Makes the first `count` positions of a row those of another."""
        self.use([source])
        self.forget(target)
        if source != target:
            for array in self._arrays:
                array[target, :, :count] = array[source, :, :count]

    def swap(self, one: int, other: int, count: int) -> None:
        """Exchanges the first `count` positions of two rows."""
        self.use([one, other])
        for array in self._arrays:
            kept = array[one, :, :count].copy()
            array[one, :, :count] = array[other, :, :count]
            array[other, :, :count] = kept

    def park(self, rows: Iterable[int]) -> None:
        """These rows are about to be bound to a run that they have no part in."""
        for row in rows:
            if row not in self._parked:
                self._parked[row] = [array[row, :, 0].copy() for array in self._arrays]

    def use(self, rows: Iterable[int]) -> None:
        """What these rows hold is about to be read."""
        for row in rows:
            first = self._parked.pop(row, None)
            if first is not None:
                for array, kept in zip(self._arrays, first, strict=True):
                    array[row, :, 0] = kept

    def forget(self, row: int) -> None:
        """Nobody needs what the row holds."""
        self._parked.pop(row, None)

    def _array(self, value: ort.OrtValue, slots: int) -> Array:
        data = (ctypes.c_char * (slots * self._row_bytes)).from_address(value.data_ptr())
        made: Array = np.frombuffer(memoryview(data), dtype=self._dtype).reshape(slots, *self._shape)
        return made


def _room() -> int:
    """Bytes of memory that are free, as far as it can be told: of a container, at most what it has."""
    found = [psutil.virtual_memory().available]
    for name in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(int(Path(name).read_text()))
    return min(found)


def _in_small_pages(address: int, count: int) -> None:
    """A prompt touches the beginning of a row in each layer and head: in large pages many times what it needs.

    Where the system does not know the word, all stays as it is.
    """
    page = mmap.PAGESIZE
    begin, end = -(-address // page) * page, (address + count) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _NO_LARGE_PAGES)
