"""What has come to stay is out of the collector's sight; what calls leave behind is nothing for it to look for."""

import asyncio
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.fleet import Fleet
from flink_llm.engine.protocol import Options, Submit
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import WorkTable
from flink_llm.testing.scripts import Script, ScriptedBackend

DEMO = Path(__file__).parents[1] / "models" / "support-chat"
SPARED = """
import gc
from flink_llm.garbage import COLLECT_AT, spare
class Kept: pass
kept = Kept(); kept.itself = kept
before = Kept(); before.itself = before; del before
spare()
assert gc.get_threshold() == COLLECT_AT
assert kept not in gc.get_objects() and gc.get_freeze_count() > 1000
assert not [found for found in gc.get_objects() if isinstance(found, Kept)]
later = Kept()
spare()
assert later not in gc.get_objects()
"""


def test_what_is_there_stays_and_is_looked_at_no_more():
    subprocess.run([sys.executable, "-c", SPARED], check=True)


def _of_scripts():
    return ScriptedBackend({"it": Script(text="hello all", tokens=3, gap_ms=5)}), "it"


def _of_the_demo_model():
    return OnnxBackend(HostSettings(device="cpu", slots=2, threads=1, cache_mb=0)), str(DEMO)


@pytest.mark.parametrize("backend", [_of_scripts, _of_the_demo_model])
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_piece_of_work_leaves_no_cycles(backend, cancelled):
    async def inside():
        shelf, folder = backend()
        table = WorkTable(Fleet(shelf))
        try:
            loaded = await table.load(folder)
            for number in range(12):
                if number == 2:  # what is made once is there
                    gc.collect()
                work = Submit(
                    call=number, work=f"w{number}", model=loaded.sha256, kind="generate", request_id=f"r{number}",
                    messages=[{"role": "user", "content": "hello"}], options=Options(max_tokens=4),
                )  # fmt: skip
                events = table.submit(work)
                async for _ in events:
                    if cancelled:
                        events.close()
            await asyncio.sleep(0.1)
            return gc.collect()
        finally:
            await table.close()

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(inside()) < 10, "each of ten left something that only a collection frees"
    finally:
        gc.enable()
