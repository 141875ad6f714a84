"""SQL functions on a mini-cluster, over the real host with scripted models."""

import json

import msgspec
import pytest
from pyflink.table import DataTypes, StreamTableEnvironment

from flink_llm import environment
from flink_llm.engine.settings import HostSettings
from flink_llm.services import ServiceSettings
from flink_llm.testing import FakeServices, Script
from flink_llm.udfs.sql import register_functions

ROWS = 10_000


class Order(msgspec.Struct):
    order_id: int
    tags: list[str]
    address: dict[str, str] | None = None


SCRIPTS = {
    "slow": Script(first_ms=20, delay="exponential"),
    "echo": Script(),
    "orders": Script(text='{"order_id": 7, "tags": ["a", "b"], "address": {"city": "Ulm"}}'),
    "broken": Script(fault="context_overflow"),
    "vectors": Script(kind="embedding", dimension=4),
    "moods": Script(kind="classifier", labels=["good", "bad"]),
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sql")
    (folder / "scripts.json").write_bytes(msgspec.json.encode(SCRIPTS))
    host = HostSettings(launcher="flink_llm.testing", launcher_args=[str(folder / "scripts.json")], device="cpu",
                        linger_s=20.0, socket_dir=str(folder))  # fmt: skip
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
