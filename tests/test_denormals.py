import threading
from pathlib import Path

import numpy as np
import pytest

from flink_llm.engine import denormals
from flink_llm.engine.denormals import flushed
from flink_llm.engine.graphs import open_session
from flink_llm.engine.model import open_model_folder

DEMO = Path(__file__).parents[1] / "models" / "support-chat"
known = pytest.mark.skipif(denormals._LIBM is None, reason="done with glibc on x86-64 only")


def product() -> float:
    return float((np.full(64, np.float32(1e-30)) * np.full(64, np.float32(1e-12)))[0])


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@known
def test_denormals_are_zeros_within():
    with flushed():
        assert product() == 0.0
        with pytest.raises(ValueError, match="x"), flushed():
            raise ValueError("x")
        assert product() == 0.0
    assert product() > 0


@known
def test_a_session_leaves_its_maker_as_it_was():
    def made():
        session = open_session(open_model_folder(DEMO), "cpu", 2)
        return session is not None and product()

    assert in_a_thread(made) > 0
    made()
    assert product() > 0


def test_other_machines_go_on_without(monkeypatch):
    monkeypatch.setattr(denormals, "_LIBM", None)
    with flushed():
        assert product() > 0
