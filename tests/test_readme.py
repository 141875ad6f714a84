"""The README's Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_blocks_of_the_readme_run():
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    namespace: dict[str, object] = {"__name__": "readme"}
    ran = 0
    for mark, code in blocks:
        compiled = compile(code, "README.md", "exec")
        if "no-run" not in mark:
            exec(compiled, namespace)
            ran += 1
    assert ran >= 2


def test_the_readme_names_commands_that_exist():
    from flink_llm.cli import main

    named = set(re.findall(r"`flink-llm ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named <= set(main.commands)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_set_up_targets_exist(target):
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()
