"""Denormal numbers as zeros, on the thread that runs a model and while it does.

The softmax of a trained model's attention leaves many numbers below 1e-38, and a processor multiplies each of
them some hundred times slower than others. ONNX Runtime has an option for its own threads, and none for the
one that calls it, which does its share of the work.
"""

import ctypes
import platform
import sys
from typing import Any

_FLUSH_AND_ZERO = 0x8040
"""FTZ and DAZ of MXCSR (Intel's manual, volume 1, 10.2.3)."""
_MXCSR = 7
"""Where MXCSR is in `_Environment`."""
_Environment = ctypes.c_uint32 * 8
"""glibc's `fenv_t` for x86-64."""


def _libm() -> Any:
    """The C library's part that holds the floating-point environment; None where its layout is not known."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return None
    try:
        found = ctypes.CDLL("libm.so.6")
        return found if hasattr(found, "fegetenv") and hasattr(found, "fesetenv") else None
    except OSError:
        return None


_LIBM = _libm()


def session_entry() -> dict[str, str]:
    """The option for ONNX Runtime's own threads. Only where `flushed` can undo what it does to others."""
    return {} if _LIBM is None else {"session.set_denormal_as_zero": "1"}


class flushed:
    """Within, denormal operands and results are zeros on this thread; after it all is as before.

    That undoes what ONNX Runtime does to the thread that makes a process's first session, too. Does nothing but
    with glibc on x86-64.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        if _LIBM is None:
            return
        self._before = _Environment()
        _LIBM.fegetenv(self._before)
        within = _Environment(*self._before)
        within[_MXCSR] |= _FLUSH_AND_ZERO
        _LIBM.fesetenv(within)

    def __exit__(self, *error: object) -> None:
        if _LIBM is not None:
            _LIBM.fesetenv(self._before)
