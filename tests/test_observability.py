"""The dashboard and the alert rules ask for metrics that there are, by the labels that these have."""

import json
import re
from pathlib import Path

import pytest
import yaml

from flink_llm import errors, stages
from flink_llm.engine.metrics import Metrics
from flink_llm.udfs.counters import KNOWN

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "observability"
GROUP = "flink_taskmanager_job_task_operator_flink_llm_"
FLINK_LABELS = {"job_name", "task_name", "subtask_index", "operator_name"}
SCRAPE_LABELS = {"le", "instance", "code", "part"}  # of buckets, of Prometheus, and made by `label_replace`


def alerts():
    return [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]


def panels():
    return json.loads((FOLDER / "grafana.json").read_text())["panels"]


def expressions():
    found = {rule["alert"]: [rule["expr"]] for rule in alerts()}
    found |= {panel["title"]: [target["expr"] for target in panel.get("targets", [])] for panel in panels()}
    return [(name, expr) for name, exprs in found.items() for expr in exprs]


def own_labels():
    """Name → labels of the host's and the workers' metrics, buckets and sums of histograms by their own names."""
    found = {}
    for family in vars(Metrics()).values():
        if hasattr(family, "_labelnames"):
            name = family._name + ("_total" if family._type == "counter" else "")
            ends = ("_bucket", "_sum", "_count") if family._type == "histogram" else ("",)
            found |= {name + end: set(family._labelnames) for end in ends}
    return found | {f"{stages.NAME}{end}": {*stages.LABELS, "stage"} for end in ("_bucket", "_sum", "_count")}


def counters():
    """Names in the operator's group, as Flink's Prometheus reporter writes them."""
    files = [*(ROOT / "flink_llm").glob("*.py"), *(ROOT / "udfs").glob("*.py"), ROOT / "docs" / "degradation.md"]
    text = "".join(file.read_text() for file in files)
    names = set(re.findall(r'(?:metrics\.add|\.gauge)\("(\w+)"', text))
    return names | {f"failures_{code}" for code in errors.CODES}


def flinks_own():
    """Metrics of Flink's that are asked for: a scrape of a running job has them (tests/integration)."""
    text = " ".join(expr for _, expr in expressions())
    return {name for name in re.findall(r"flink_(?:job|task)manager_\w+", text) if not name.startswith(GROUP)}


@pytest.mark.parametrize(("name", "expr"), expressions())
def test_what_is_asked_for_is_there(name, expr):
    assert expr.count("(") == expr.count(")") and expr.count("{") == expr.count("}")
    own, asked = own_labels(), re.findall(r"flink_\w+", re.sub(r'__name__=~"[^"]+"', "", expr))
    assert asked or "__name__" in expr
    known = SCRAPE_LABELS.copy()
    for metric in asked:
        if metric.startswith(GROUP):
            assert metric.removeprefix(GROUP) in counters()
        elif not metric.startswith(("flink_jobmanager_", "flink_taskmanager_")):
            known |= own[metric]
    known |= FLINK_LABELS if "flink_taskmanager_" in expr or "flink_jobmanager_" in expr else set()
    grouped = {label.strip() for found in re.findall(r"(?:by|on) \(([^)]*)\)", expr) for label in found.split(",")}
    matched = set(re.findall(r'(\w+)=~?"', re.sub(r"__name__", "", expr)))
    assert (grouped | matched) - {""} <= known


def test_failures_and_circuits_are_found_by_the_names_of_their_metrics():
    patterns = {found for _, expr in expressions() for found in re.findall(r'__name__=~"([^"]+)"', expr)}
    assert patterns == {f"{GROUP}failures_.+", f"{GROUP}breaker_.+"}
    assert all(re.fullmatch(f"{GROUP}failures_.+", f"{GROUP}failures_{code}") for code in errors.CODES)


def test_the_counts_that_alerts_ask_for_begin_at_zero():
    asked = {found for rule in alerts() for found in re.findall(rf"{GROUP}(\w+)", rule["expr"])}
    known = {name.replace(".", "_") for name in KNOWN}
    assert known <= counters() | {"failures_shed"}
    assert asked - {"in_flight", "failures_", "breaker_"} <= known


def test_every_count_of_the_operator_and_the_host_is_on_the_dashboard():
    text = (FOLDER / "grafana.json").read_text()
    plain = {name for name in counters() if not name.startswith("failures_")}
    assert {name for name in plain if f"{GROUP}{name}" not in text} == set()
    left_out = {"flink_llm_queue_seconds", "flink_llm_request_seconds"}  # a part, and the whole, of what is shown
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in own_labels()}
    assert {name for name in families if name not in text} == left_out


def test_the_dashboard_is_one_that_grafana_takes():
    board = json.loads((FOLDER / "grafana.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(taken)) == len(taken)
    assert {variable["name"] for variable in board["templating"]["list"]} == {"source", "job"}


def test_every_alert_says_what_is_wrong_and_what_to_do():
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names) and all(name.startswith("FlinkLlm") for name in names)
    for rule in alerts():
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_prometheus_reads_the_rules_and_keeps_our_labels():
    read = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert [(FOLDER / name).exists() for name in read["rule_files"]] == [True]
    workers = next(job for job in read["scrape_configs"] if job["job_name"] == "flink-llm-workers")
    assert workers["honor_labels"] is True
