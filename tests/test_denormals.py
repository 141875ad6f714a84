import platform
import threading

import numpy as np
import pytest

from flink_llm.engine.denormals import flush_denormals

SMALL = np.float32(1e-30)


def product() -> float:
    return float((np.full(64, SMALL) * np.full(64, np.float32(1e-12)))[0])


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="done with glibc on x86-64 only"
)
def test_denormals_are_zeros_on_the_thread_that_asks_and_on_no_other():
    def asked():
        before = product()
        assert flush_denormals()
        return before, product()

    before, after = in_a_thread(asked)
    assert (before > 0, after) == (True, 0.0)
    assert product() == before


def test_other_machines_go_on_without(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert in_a_thread(flush_denormals) is False
