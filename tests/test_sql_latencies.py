"""What SQL functions tell of their rows beside Flink's metrics."""

import time
import urllib.request

import pandas as pd
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flink_llm.local.processes import free_port
from flink_llm.stages import NAME, StageExporter
from flink_llm.telemetry_settings import TelemetrySettings
from flink_llm.testing import FakeServices, Script
from flink_llm.udfs import sql

TELLS_S = 20.0


class FunctionContext:
    """Flink's, of a job without metrics or parameters."""

    def get_job_parameter(self, name: str, default: str) -> str:
        return default

    def get_metric_group(self) -> None:
        raise RuntimeError("metrics are off")


def counts(port: int) -> dict[tuple[str, ...], float]:
    """How many calls of each operator, subtask and stage."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            tuple(sample.labels[name] for name in ("job", "operator", "subtask", "stage")): sample.value
            for family in families
            for sample in family.samples
            if sample.name == f"{NAME}_count"
        }


@pytest.fixture
def functions(monkeypatch, tmp_path):
    """Two instances of one function, as a query opens them that names it twice; and their port."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    port, services = free_port(), FakeServices({"echo": Script()})
    telemetry = TelemetrySettings(metrics_port=port)
    made = [sql._function("llm_generate", lambda: services, telemetry)._func for _ in range(2)]
    for function in made:
        function.open(FunctionContext())
    yield made, port
    for function in made:
        function.close()


def test_rows_are_told_by_stage(functions):
    [one, other], port = functions
    assert list(one.eval("echo", pd.Series(["a", "b", "a", None]))) == ["a", "b", "a", None]
    assert list(other.eval("echo", pd.Series(["c"]))) == ["c"]
    stages, name = ("queue", "call", "model", "emit", "total"), "sql.llm_generate"
    wanted = {("sql", name, subtask, stage): n for subtask, n in (("0", 2.0), ("1", 1.0)) for stage in stages}
    deadline = time.monotonic() + TELLS_S
    while not wanted.items() <= counts(port).items():
        assert time.monotonic() < deadline, counts(port)
        time.sleep(0.1)


def test_a_subtask_that_has_ended_leaves_its_number(tmp_path):
    def number(exporter):
        return exporter._shared._labels["subtask"]

    labels, port = {"job": "j", "operator": "sql.f"}, free_port()
    one, two = (StageExporter("127.0.0.1", port, labels, folder=tmp_path) for _ in range(2))
    another = StageExporter("127.0.0.1", port, {**labels, "operator": "sql.g"}, folder=tmp_path)
    assert (number(one), number(two), number(another)) == ("0", "1", "0")
    one.start()
    one.stop()
    assert number(StageExporter("127.0.0.1", port, labels, folder=tmp_path)) == "0"


def test_a_worker_that_runs_nothing_but_sql_ends_with_its_task_manager(monkeypatch):
    watched = []
    monkeypatch.setattr(sql, "end_with_task_manager", lambda: watched.append("from its first function on"))
    services = FakeServices({"echo": Script()})
    function = sql._function("llm_generate", lambda: services, TelemetrySettings())._func
    function.open(FunctionContext())
    function.close()
    assert watched == ["from its first function on"]
