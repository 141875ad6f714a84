"""Graphs: opened on a device, compared with a manifest, their inputs and outputs bound to arrays."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flink_llm.engine import native
from flink_llm.engine.denormals import flushed, session_entry
from flink_llm.engine.faults import lacks_memory
from flink_llm.engine.model import GRAPH, Manifest, ModelFolder
from flink_llm.errors import ConfigError, ModelFolderError, Outage

SPIN_US = "500"
"""How long a session's threads look for more work before they sleep: what the engine does between two steps of a
row. By default it is tens of milliseconds, in which they take the cores from whichever session is next (ADR 37)."""
_TILED_ABOVE = 4096
"""Tokens of context above which attention goes in tiles: else the scores of a whole run are held, as for all of it."""
_NO_TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"
LOGITS_FROM = "logits_from"
"""An input that a graph may have: of which position the first logits are wanted, see `export_logits`."""


def providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's providers of a device. Raises ConfigError for a GPU that is not there."""
    if device == "cpu":
        return [("CPUExecutionProvider", {})]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ConfigError(
            f"host.device is {device!r}, this ONNX Runtime has no CUDA: install flink-llm[gpu] instead of [cpu]"
        )
    number = device.partition(":")[2] or "0"
    return [("CUDAExecutionProvider", {"device_id": number}), ("CPUExecutionProvider", {})]


def open_session(folder: ModelFolder, device: str, threads: int, form: str = GRAPH) -> ort.InferenceSession:
    """A session over a graph of a checked folder. Raises ModelFolderError, ConfigError, Outage for a lack of memory."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    for name, value in session_entry().items():
        options.add_session_config_entry(name, value)
    with contextlib.ExitStack() as stack:
        graph = folder.graph_file(stack, form)
        chosen = providers(device)
        stack.enter_context(_attention(folder.manifest.context_length))
        if device == "cpu":
            native.register(options)
        try:
            with flushed():
                session = ort.InferenceSession(graph, options, providers=chosen)
        except Exception as error:  # ONNX Runtime's errors share no base class
            if lacks_memory(error):
                raise Outage(f"{folder.manifest.name}: no memory for the graph: {error}") from error
            raise ModelFolderError(f"{folder.manifest.name}: the graph cannot be loaded: {error}") from error
    if session.get_providers()[0] != chosen[0][0]:
        raise ConfigError(f"host.device is {device!r}, ONNX Runtime could not use it; see the host's log")
    return session


@contextlib.contextmanager
def _attention(context: int) -> Iterator[None]:
    """ONNX Runtime asks the environment, when a session is made, which of its attentions it takes on the CPU.

    The one in tiles runs a step of rows of several lengths row by row, and without the machine's vector
    instructions; the other is faster from a few hundred tokens on, where no scale is left to it (`export_scale`).
    """
    if context > _TILED_ABOVE or _NO_TILES in os.environ:
        yield
        return
    os.environ[_NO_TILES] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_TILES]


def bind_input(binding: ort.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def bind_output(binding: ort.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def check_names(
    manifest: Manifest, session: ort.InferenceSession, inputs: set[str], outputs: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A graph's inputs, those without a default, and outputs by their names, compared with these.

    Raises ModelFolderError for an input that is missing or surplus, or an output that is missing.
    """
    given = {value.name: value for value in session.get_inputs()}
    made = {value.name: value for value in session.get_outputs()}
    for name in sorted(inputs ^ set(given)):
        state = "has no input" if name in inputs else "has a surplus input"
        raise ModelFolderError(f"{manifest.name}: the graph {state} {name!r}")
    for name in sorted(outputs - set(made)):
        raise ModelFolderError(f"{manifest.name}: the graph has no output {name!r}")
    return given, made


def check_value(manifest: Manifest, value: Any, wanted: Sequence[int | None]) -> None:
    """Compares the fixed dimensions of a graph's input or output with the manifest's. Raises ModelFolderError."""
    fits = len(value.shape) == len(wanted) and all(
        expected is None or not isinstance(found, int) or found == expected
        for found, expected in zip(value.shape, wanted, strict=True)
    )
    if not fits:
        says = ["any" if size is None else size for size in wanted]
        raise ModelFolderError(f"{manifest.name}: the graph's {value.name} is {value.shape}, the manifest says {says}")
