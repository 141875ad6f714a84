"""The KV cache's memory: whole at the load where there is room for it, else as it is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flink_llm.engine import cache
from flink_llm.engine.launch import in_large_pages

MB = 2**20
MEASURED = """
import json
import numpy as np
import psutil
from flink_llm.engine import cache

def grown(room):
    cache._room = lambda: room
    before = psutil.Process().memory_info().rss
    made = cache.KvCache(4, 2, (2, 4096, 64), np.float32, "cpu")
    return made, psutil.Process().memory_info().rss - before

whole = 4 * 2 * 2 * 2 * 4096 * 64 * 4
small, by_small = grown(8 * whole)
large, by_large = grown(8 * whole - 1)
assert small.in_reach and large.in_reach
print(json.dumps([by_small / whole, by_large / whole]))
"""


def test_a_small_cache_is_made_whole_and_a_large_one_as_it_is_needed() -> None:
    # In a process of its own: here malloc may hand out memory that an earlier test used and freed.
    said = subprocess.run([sys.executable, "-c", MEASURED], check=True, capture_output=True, text=True).stdout
    small, large = json.loads(said)
    assert small > 0.9
    assert large < 0.2


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
