"""Every Python block of the README and the docs runs; commands, targets and configuration keys that they name exist.

The blocks of one page run in order in one namespace. One marked `flink` needs an environment: it finds a
`stream` there, and what it builds must be a job that Flink can plan.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLANNED = """
from pyflink.common import Types
from flink_llm import environment
from flink_llm.flink_settings import FlinkSettings

env = environment.environment()
environment.configure(env, FlinkSettings())
stream = env.from_collection(['{"session_id": "s"}'], Types.STRING())
"""
BLOCK = re.compile(r"^```([a-z]*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str = "python") -> list[tuple[str, str]]:
    return [(mark, code) for kind, mark, code in BLOCK.findall(page.read_text()) if kind == language]


def of_pages(*marks: str) -> list[Path]:
    return [page for page in PAGES if any(mark.strip() in marks for mark, _ in blocks(page))]


@pytest.mark.parametrize("page", of_pages(""), ids=lambda page: page.name)
def test_python_blocks_run(page):
    namespace: dict[str, object] = {"__name__": "page"}
    for mark, code in blocks(page):
        assert mark.strip() in ("", "flink"), f"{page.name}: a block is marked {mark!r}"
        if not mark.strip():
            exec(compile(code, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", of_pages("flink"), ids=lambda page: page.name)
def test_blocks_that_need_flink_make_a_job(page, tmp_path):
    code = [part for mark, part in blocks(page) if mark.strip() == "flink" or "class " in part]
    program = tmp_path / "page.py"
    program.write_text("\n".join([PLANNED, *code, "print(env.get_execution_plan())"]))
    ran = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert '"nodes"' in ran.stdout


def test_the_readme_has_blocks_of_both_kinds():
    assert {mark.strip() for mark, _ in blocks(ROOT / "README.md")} == {"", "flink"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page):
    from flink_llm.cli import main

    assert set(re.findall(r"`flink-llm ([a-z]+)", page.read_text())) <= set(main.commands)
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= made
    modules = set(re.findall(r"python -m (benchmarks\.[a-z_]+)", page.read_text()))
    assert all((ROOT / f"{module.replace('.', '/')}.py").exists() for module in modules)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_set_up_targets_exist(target):
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_configurations_are_ones_that_load(page, tmp_path, monkeypatch):
    from flink_llm import config
    from flink_llm.engine import deployment

    monkeypatch.setenv("KAFKA_PASSWORD", "secret")
    for mark, code in blocks(page, "yaml"):
        assert mark.strip() in ("job", "flink", "deployment"), f"{page.name}: a block is marked {mark!r}"
        if mark.strip() == "flink":
            assert all("." in name for name in yaml.safe_load(code))
        elif mark.strip() == "deployment":
            file = tmp_path / "deployment.yaml"
            file.write_text(code)
            assert len(deployment.read_deployment(file).versions) > 1
        else:
            file = tmp_path / "job.yaml"
            file.write_text(code)
            assert "secret" not in repr(config.load(file))


def test_every_code_of_a_failure_is_on_its_page():
    from flink_llm.errors import CODES

    page = (ROOT / "docs" / "records.md").read_text()
    assert dict(re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", page, re.MULTILINE)) == CODES
