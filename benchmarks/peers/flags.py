"""How llama.cpp is compiled for this machine: `CMAKE_ARGS="$(python -m benchmarks.peers.flags)"`.

Every instruction set is named, since its own detection (GGML_NATIVE) turns AMX on, which crashed on a
virtual machine that shows AMX.
"""

from benchmarks.machine import cpu_flags

_SETS = {
    "AVX": {"avx"},
    "AVX2": {"avx2"},
    "FMA": {"fma"},
    "F16C": {"f16c"},
    "BMI2": {"bmi2"},
    "AVX_VNNI": {"avx_vnni"},
    "AVX512": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "AVX512_VBMI": {"avx512vbmi"},
    "AVX512_VNNI": {"avx512_vnni"},
    "AVX512_BF16": {"avx512_bf16"},
}


def cmake_args(flags: frozenset[str]) -> str:
    """Options for cmake, from the processor's flags as Linux names them."""
    sets = [f"-DGGML_{name}={'ON' if needed <= flags else 'OFF'}" for name, needed in _SETS.items()]
    return " ".join(["-DGGML_NATIVE=OFF", "-DLLAVA_BUILD=OFF", *sets])


if __name__ == "__main__":
    print(cmake_args(cpu_flags()))
