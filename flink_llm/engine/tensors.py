"""Named arrays of a file in safetensors' form, read by NumPy alone: a JSON header, then the arrays one by one.

8 bytes   length of the header, little-endian
header    {name: {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}, "__metadata__": {...}}
data      the offsets count from its start
"""

from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
_TYPES: dict[str, type[np.floating[Any]]] = {"F32": np.float32, "F16": np.float16}
_Count = Annotated[int, Meta(ge=0, le=2**48)]


class _Tensor(Struct, frozen=True):
    dtype: str
    shape: Annotated[list[_Count], Meta(max_length=8)]
    data_offsets: tuple[_Count, _Count]


def read_tensors(data: bytes) -> dict[str, Array]:
    """The float arrays of a file, which are views of `data`. Raises ValueError for what is no such file."""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > len(data):
        raise ValueError("its header is longer than the file")
    try:
        header = msgspec.json.decode(data[8:end], type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(raw, type=_Tensor) for name, raw in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    return {name: _view(name, tensor, memoryview(data)[end:]) for name, tensor in tensors.items()}


def _view(name: str, tensor: _Tensor, data: memoryview) -> Array:
    kind = _TYPES.get(tensor.dtype)
    if kind is None:
        raise ValueError(f"{name} is {tensor.dtype}, not one of {', '.join(_TYPES)}")
    begin, end = tensor.data_offsets
    size = np.dtype(kind).itemsize
    for length in tensor.shape:
        size *= length
    if end > len(data) or end - begin != size:
        raise ValueError(f"{name} is {tensor.shape} {tensor.dtype}, and its bytes are {begin} to {end} of {len(data)}")
    found: Array = np.frombuffer(data[begin:end], dtype=kind).reshape(tensor.shape)
    return found
