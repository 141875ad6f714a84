"""Denormal numbers as zeros, on the thread that runs a model.

The softmax of a trained model's attention leaves many numbers below 1e-38, and a processor multiplies each of
them some hundred times slower than others. ONNX Runtime has an option for its own threads, and none for the
one that calls it, which does its share of the work.
"""

import ctypes
import ctypes.util
import logging
import platform
import sys

log = logging.getLogger(__name__)
_FLUSH_AND_ZERO = 0x8040
"""FTZ and DAZ of MXCSR (Intel's manual, volume 1, 10.2.3)."""
_MXCSR, _WORDS = 7, 8
"""Where MXCSR is in glibc's `fenv_t` for x86-64, in words of 32 bits, and how many those are."""


def flush_denormals() -> bool:
    """Makes denormal results and operands zeros for the calling thread; whether it could: glibc on x86-64 only."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
        environment = (ctypes.c_uint32 * _WORDS)()
        if libm.fegetenv(environment) != 0:
            return False
        environment[_MXCSR] |= _FLUSH_AND_ZERO
        return bool(libm.fesetenv(environment) == 0)
    except (OSError, AttributeError) as error:  # slower, and no less right
        log.debug("denormal numbers stay: %s", error)
        return False
