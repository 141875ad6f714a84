"""SQL functions on a mini-cluster, over the real host with scripted models."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from pyflink.table import DataTypes, StreamTableEnvironment
from pyflink.table.udf import AsyncScalarFunction, udf

from flink_llm import environment
from flink_llm.engine.settings import HostSettings
from flink_llm.services import ServiceSettings
from flink_llm.testing import FakeServices, Script
from flink_llm.udfs.sql import register_functions
from tests.test_readme import ROOT, blocks

PAGE = ROOT / "docs" / "sql.md"
ROWS = 10_000


class Order(msgspec.Struct):
    order_id: int
    tags: list[str]
    address: dict[str, str] | None = None


SCRIPTS = {
    "support": Script(text='{"order_id": 7, "tags": ["a", "b"]}'),
    "slow": Script(first_ms=20, delay="exponential"),
    "echo": Script(),
    "orders": Script(text='{"order_id": 7, "tags": ["a", "b"], "address": {"city": "Ulm"}}'),
    "broken": Script(fault="context_overflow"),
    "vectors": Script(kind="embedding", dimension=4),
    "moods": Script(kind="classifier", labels=["good", "bad"]),
}


def scripted(folder: Path) -> HostSettings:
    (folder / "scripts.json").write_bytes(msgspec.json.encode(SCRIPTS))
    return HostSettings(launcher="flink_llm.testing", launcher_args=[str(folder / "scripts.json")], device="cpu",
                        linger_s=20.0, socket_dir=str(folder))  # fmt: skip


@pytest.fixture(scope="module")
def job_file(tmp_path_factory) -> Path:
    """The configuration that docs/sql.md speaks of, over scripted models."""
    folder = tmp_path_factory.mktemp("job")
    job = {"job": "llm_inference", "name": "sql", "models": {"support": "support"}, "chat": {"model": "support"}}
    file = folder / "job.yaml"
    file.write_bytes(msgspec.json.encode({**job, "host": msgspec.to_builtins(scripted(folder))}))
    return file


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sql")
    host = scripted(folder)
    tables = StreamTableEnvironment.create(environment.environment(kafka=False))
    register_functions(tables, ServiceSettings(models={name: name for name in SCRIPTS}, host=host),
                       extract={"extract_order": Order})  # fmt: skip
    fields = [DataTypes.FIELD("id", DataTypes.BIGINT()), DataTypes.FIELD("text", DataTypes.STRING()),
              DataTypes.FIELD("model", DataTypes.STRING())]  # fmt: skip
    rows = [(1, "one", "echo"), (2, None, "echo"), (3, "three", "broken"), (4, "four", None), (5, "five", "eco")]
    tables.create_temporary_view("texts", tables.from_elements(rows, DataTypes.ROW(fields)))
    return tables


def rows(tables, query):
    with tables.execute_sql(query).collect() as found:
        return [tuple(row) for row in found]


def test_each_answer_is_on_its_row(tables):
    tables.execute_sql(
        f"CREATE TEMPORARY TABLE numbers (i BIGINT) WITH ('connector' = 'datagen', 'number-of-rows' = '{ROWS}', "
        f"'fields.i.kind' = 'sequence', 'fields.i.start' = '1', 'fields.i.end' = '{ROWS}')"
    )
    found = rows(tables, "SELECT i, llm_generate('slow', CONCAT('row ', CAST(i AS STRING))) FROM numbers")
    assert len(found) == ROWS
    assert [(i, text) for i, text in found if text != f"row {i}"] == []


def test_nulls_and_failures_are_null_and_the_row_form_says_why(tables):
    found = rows(
        tables,
        """SELECT id, llm_generate(model, text), r.`value`, r.error_code, r.error_message, r IS NULL
           FROM (SELECT id, model, text, llm_generate_row(model, text) AS r FROM texts)""",
    )
    unknown = "models: unknown name 'eco'; did you mean 'echo'?"
    assert sorted(found) == [
        (1, "one", "one", None, None, False),
        (2, None, None, None, None, True),
        (3, None, None, "context_overflow", "scripted", False),
        (4, None, None, None, None, True),
        (5, None, None, "unknown_model", unknown, False),
    ]


def test_options_are_json_or_a_map(tables):
    found = rows(
        tables,
        """SELECT llm_generate_row('echo', text, '{"temprature": 1}').error_message,
                  llm_generate('echo', text, MAP['max_tokens', '12', 'system', 'Be brief.']),
                  llm_generate_row('echo', text, MAP['temperature', '7']).error_code,
                  llm_generate_row('echo', text, '{"deadline": "soon"}').error_code
           FROM texts WHERE id = 1""",
    )
    wrong = "options: unknown name 'temprature'; did you mean 'temperature'?"
    assert found == [(wrong, "one", "bad_option", "bad_option")]


def test_encoders_and_typed_rows(tables):
    found = rows(
        tables,
        """SELECT llm_embed('vectors', text), llm_embed('vectors', text, '{"dimensions": 2}'),
                  llm_classify('moods', text), llm_classify_row('moods', text).score,
                  extract_order('orders', text).order_id, extract_order('orders', text).tags,
                  extract_order('orders', text).address, extract_order('echo', text) IS NULL,
                  llm_extract('orders', text, '{"type": "object", "properties": {"order_id": {"type": "integer"}}}')
           FROM texts WHERE id = 1""",
    )
    [(vector, short, label, score, *order, none, extracted)] = found
    assert len(vector) == 4 and short == vector[:2]
    assert (label, score) == ("good", 0.5)
    assert (order, none) == ([7, ["a", "b"], '{"city":"Ulm"}'], True)
    assert json.loads(extracted)["order_id"] == 7


def test_a_selected_row_is_asked_once(tables):
    plan = tables.explain_sql(
        "SELECT id, reply FROM (SELECT id, llm_generate('echo', text) AS reply FROM texts) WHERE reply IS NOT NULL"
    )
    assert plan.split("Optimized Execution Plan")[1].count("llm_generate(") == 1


def test_features_are_looked_up_by_their_keys(tables):
    class Fakes:
        def __call__(self):
            return FakeServices(features={"customers": {"1": {"tier": "gold"}}})

    tables.drop_temporary_system_function("feature_lookup")
    from flink_llm.udfs import sql

    tables.create_temporary_system_function("feature_lookup", sql._function("feature_lookup", Fakes()))
    found = dict(rows(tables, "SELECT id, feature_lookup('customers', id) FROM texts"))
    assert found == {1: '{"tier":"gold"}', **dict.fromkeys((2, 3, 4, 5))}


def test_the_documented_program_and_its_queries(job_file, monkeypatch):
    monkeypatch.chdir(job_file.parent)
    namespace: dict[str, object] = {"__name__": "page"}
    for mark, code in blocks(PAGE):
        assert mark.strip() == "sql"
        exec(compile(code, PAGE.name, "exec"), namespace)
    tables = namespace["tables"]
    fields = [DataTypes.FIELD("id", DataTypes.BIGINT()), DataTypes.FIELD("text", DataTypes.STRING())]
    tables.create_temporary_view("mails", tables.from_elements([(1, "seven"), (2, None)], DataTypes.ROW(fields)))
    typed, told, optional = [code for mark, code in blocks(PAGE, "sql") if mark.strip() == "query"]
    reply = SCRIPTS["support"].text
    assert sorted(rows(tables, typed)) == [(1, 7, ["a", "b"], None), (2, None, None, None)]
    assert sorted(rows(tables, told)) == [(1, reply, None, None, "stop"), (2, None, None, None, None)]
    assert sorted(rows(tables, optional)) == [(1, reply), (2, None)]


CREATED = """
import sys
from pyflink.table import DataTypes, StreamTableEnvironment
from flink_llm import environment

tables = StreamTableEnvironment.create(environment.environment(kafka=False))
tables.get_config().set("python.client.executable", sys.executable)
fields = [DataTypes.FIELD("id", DataTypes.BIGINT()), DataTypes.FIELD("text", DataTypes.STRING())]
tables.create_temporary_view("mails", tables.from_elements([(1, "seven"), (2, None)], DataTypes.ROW(fields)))
for name, value in SET:
    tables.get_config().set(name, value)
for statement in CREATE:
    tables.execute_sql(statement)
query = "SELECT id, llm_generate('support', text), llm_generate_row('support', text).finish_reason FROM mails"
with tables.execute_sql(query).collect() as found:
    print("FOUND", sorted(tuple(row) for row in found))
"""


@pytest.mark.parametrize("told_by", ["job parameter", "environment"])
def test_the_documented_functions_are_created_by_sql(told_by, job_file, tmp_path):
    [code] = [code for mark, code in blocks(PAGE, "sql") if mark.strip() == "client"]
    statements = [each.strip() for each in code.split(";") if each.strip()]
    chosen = [re.fullmatch(r"SET '(.+)' = '(.+)'", each) for each in statements]
    options = [(each[1], each[2].replace("/etc/flink-llm/job.yaml", str(job_file))) for each in chosen if each]
    create = [each for each in statements if each.startswith("CREATE")]
    assert len(options) == 1 and len(create) == 2 and len(statements) == 3
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    if told_by == "environment":
        options, environ = [], {**environ, "FLINK_LLM_CONFIG": str(job_file)}
    program = tmp_path / "created.py"
    program.write_text(f"SET, CREATE = {options!r}, {create!r}\n{CREATED}")
    ran = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environ, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert f"FOUND {[(1, SCRIPTS['support'].text, 'stop'), (2, None, None)]}" in ran.stdout


def test_pyflinks_own_async_function_still_mixes_up_rows(tables):
    class Slowly(AsyncScalarFunction):
        """Its own argument, after a wait that differs from row to row. Workers cannot import this module."""

        async def eval(self, number: int) -> int:
            await asyncio.sleep((number * 7 % 12) / 240)
            return number

    tables.create_temporary_view(
        "twelve",
        tables.from_elements([(i,) for i in range(12)], DataTypes.ROW([DataTypes.FIELD("i", DataTypes.BIGINT())])),
    )
    tables.create_temporary_system_function("slowly", udf(Slowly(), result_type=DataTypes.BIGINT()))
    found = rows(tables, "SELECT i, slowly(i) FROM twelve")
    assert len(found) == 12
    assert [(i, said) for i, said in found if i != said], (
        "PyFlink's AsyncScalarFunction gave every row its own answer: it is mended, so say so in docs/sql.md and "
        "docs/adr/0018, and see whether the functions of flink_llm.udfs.sql should be built on it"
    )
