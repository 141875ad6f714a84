"""The KV cache's memory: whole at the load where there is room for it, else as it is needed."""

from pathlib import Path

import numpy as np
import psutil
import pytest

from flink_llm.engine import cache
from flink_llm.engine.cache import KvCache
from flink_llm.engine.launch import in_large_pages

SHAPE = (2, 4096, 64)
MB = 2**20
WHOLE = 4 * 2 * 2 * 4096 * 64 * 4


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_a_small_cache_is_made_whole_and_a_large_one_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resident()
    small = KvCache(4, 2, SHAPE, np.float32, "cpu")
    assert resident() - before > WHOLE * 0.9

    monkeypatch.setattr(cache, "_room", lambda: WHOLE)
    before = resident()
    large = KvCache(4, 2, SHAPE, np.float32, "cpu")
    assert resident() - before < WHOLE * 0.5
    assert small.in_reach and large.in_reach


def test_a_container_has_the_room_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LIMITS", (str(tmp_path / "absent"), str(tmp_path / "max")))
    (tmp_path / "max").write_text("max\n")
    assert cache._room() > 64 * MB
    (tmp_path / "max").write_text(f"{64 * MB}\n")
    assert cache._room() == 64 * MB


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": ""}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_large_pages_are_asked_for_unless_somebody_has_said_otherwise(given: dict[str, str], made: str) -> None:
    assert in_large_pages({"PATH": "/bin", **given}) == {"PATH": "/bin", "GLIBC_TUNABLES": made}
