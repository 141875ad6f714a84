"""Kernels of our own for `functions`: a library in C++ beside this package, where a compiler was there to build it.

It is built when flink-llm is installed from its source (`kernels/`). Without it, and on a processor without AVX2,
ONNX Runtime's own operators run: the same model, slower.
"""

import ctypes
import importlib.util
import logging
import os

import onnxruntime as ort

VARIABLE = "FLINK_LLM_KERNELS"
"""An environment variable, to compare: `off` leaves them out, `avx2` takes those for AVX2 on every processor."""
_STATES = {
    0: "not for this processor, which lacks AVX2",
    1: "in use, by AVX-512 and VNNI",
    2: "in use, by AVX-512, but for products of bytes, which ONNX Runtime has by AMX",
    3: "in use, by AVX2",
}
_log = logging.getLogger(__name__)


def library() -> str | None:
    """The path of the library, None where there is none or it is turned off."""
    if os.environ.get(VARIABLE) == "off":
        return None
    found = importlib.util.find_spec("flink_llm.engine._kernels")
    return found.origin if found else None


def state() -> str:
    """Whether they run here, in words, and if not, what to do."""
    path = library()
    if path is None:
        if os.environ.get(VARIABLE) == "off":
            return f"left out: {VARIABLE} is off"
        how = "install a C++ compiler (g++), then flink-llm once more (pip install --force-reinstall --no-deps)"
        return f"not built, models run slower on a CPU: {how}"
    try:
        return _STATES[ctypes.CDLL(path).flink_llm_kernels_usable()]
    except (OSError, AttributeError) as error:
        return f"cannot be loaded, models run slower on a CPU: {error}"


def register(options: ort.SessionOptions) -> None:
    """Lets a session on the CPU take the kernels, where they are."""
    path = library()
    if path is None:
        return
    try:
        options.register_custom_ops_library(path)
    except Exception as error:  # ONNX Runtime's errors share no base class
        _log.warning("the kernels in %s cannot be used, ONNX Runtime's own run instead: %s", path, error)
