"""For tests of your own handlers and jobs: no Flink, no Kafka, no model and no store needed.

`Harness` runs a handler through the library's own runner and state, over scripted models and tables of
features, on a clock of its own, and can crash and restore. `python -m flink_llm.testing SCRIPT.json` is a
real model host, on a real socket, whose models say what a script tells them to: the benchmarks are
measured with it. docs/testing.md shows all of it; the fixtures are in `flink_llm.pytest_plugin`.
"""

from flink_llm.testing.harness import Harness, MemoryMap, copy_state
from flink_llm.testing.reader import Reader
from flink_llm.testing.scripts import Script, ScriptedBackend
from flink_llm.testing.services import FakeFeatures, FakeServices

__all__ = [
    "FakeFeatures",
    "FakeServices",
    "Harness",
    "MemoryMap",
    "Reader",
    "Script",
    "ScriptedBackend",
    "copy_state",
]
