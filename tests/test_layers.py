"""Who may import whom. Each exception stands here by name, with its reason."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "pyflink": [
        "flink_llm/kafka.py",
        "flink_llm/environment.py",
        "flink_llm/gateway.py",
        "flink_llm/submission.py",
        "flink_llm/pytest_plugin.py",
        "udfs/",
        "jobs/",
    ],
    "feast": [
        "flink_llm/features.py",
        "flink_llm/feature_store.py",  # reads: opening and one batched read
        "flink_llm/feature_config.py",  # Feast's own configuration classes
        "flink_llm/feature_admin.py",  # apply, fill, describe: for the command line
        "feature_repo/",
    ],
    "onnxruntime": ["flink_llm/engine/"],
    "onnxruntime_genai": ["flink_llm/engine/export_decoder.py"],
    "opentelemetry": ["flink_llm/tracing.py"],
    "prometheus_client": ["flink_llm/engine/metrics", "flink_llm/stages.py"],
    "torch": ["flink_llm/engine/export", "flink_llm/engine/parity.py", "models/training/"],
    "apache_beam": ["udfs/bundles.py", "udfs/state_stream.py"],
    "h2": ["udfs/state_stream.py"],
    "kafka": [  # what a job reads and writes goes through Flink
        "flink_llm/kafka_settings.py",
        "flink_llm/dead_letters.py",  # for the command line
        "flink_llm/local/",
    ],
    "flink_llm.local": [
        "flink_llm/local/",
        "flink_llm/cli.py",
        "flink_llm/environment.py",  # the mini-cluster's Java, jars and failures
        "flink_llm/pytest_plugin.py",  # the fixtures' broker and jars
        "flink_llm/engine/launch.py",  # starts the host as a process
        "flink_llm/feature_admin.py",  # the demo's rows
        "jobs/edges.py",  # what is checked before a start on this machine
    ],
    "transformers": ["flink_llm/engine/export", "models/training/"],
}
SOURCES = sorted(
    path for folder in ("flink_llm", "udfs", "jobs", "models", "feature_repo") for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_in_their_rooms(path):
    where = str(path.relative_to(ROOT))
    found = imports(path)
    for package, rooms in ROOMS.items():
        if any(name == package or name.startswith(f"{package}.") for name in found):
            assert where.startswith(tuple(rooms)), f"{where} imports {package}"
    if where.startswith("flink_llm/"):
        forbidden = ("flink_llm.udfs", "flink_llm.jobs", "benchmarks", "tests", "models")
    elif where.startswith("udfs/"):
        forbidden = ("flink_llm.jobs", "benchmarks", "tests", "models")
    else:
        forbidden = ("benchmarks", "tests")
    assert not [name for name in found if name.startswith(forbidden)], f"{where} imports upwards"


def test_modules_can_be_read_at_one_sitting():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in long.items() if lines > 380} == {}
