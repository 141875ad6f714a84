"""Rows of SQL that cannot be answered are failures of their own: none holds up its batch, none fails its query."""

import contextlib
import datetime
import decimal
import typing

import msgspec
import pandas as pd
import pytest

from flink_llm.call import Failed, Result
from flink_llm.engine.options import Choices
from flink_llm.errors import ConfigError, RecordError
from flink_llm.feature_admin import apply_repo, fill_demo
from flink_llm.feature_settings import FeatureSettings
from flink_llm.records import Failure
from flink_llm.services import RealServices, ServiceSettings
from flink_llm.testing import FakeFeatures, FakeServices, Script
from flink_llm.udfs import answers, sql
from flink_llm.udfs.arguments import rows_of
from flink_llm.udfs.batches import Batches
from flink_llm.udfs.columns import row_of
from flink_llm.udfs.tables import Shape, shapes
from tests.test_readme import ROOT


class Order(msgspec.Struct):
    order_id: float
    tags: list[str]


REPO = ROOT / "feature_repo"


def answered(name, kind, function, services, rows):
    with opened(name, kind, function, services) as batches:
        return batches.answer(rows, fixed=True)


@contextlib.contextmanager
def opened(name, kind, function, services):
    batches = Batches(name, kind, function, services, "sql")
    batches.start()
    try:
        yield batches
    finally:
        batches.close()


def lookups(names, *keys):
    return rows_of("feature_lookup", (names, *keys), 1, None)


def test_features_that_a_column_names_and_that_are_not_there_are_those_rows_fault(tmp_path):
    shop = FeatureSettings(repo=str(REPO), state=str(tmp_path))
    apply_repo(shop)
    fill_demo(shop)
    services = RealServices(ServiceSettings(features=shop))
    names = (["order_statu"], ["order_status", "no_such", "order_statu"])
    with opened("feature_lookup", "features", answers.look_up, services) as batches:
        [first], [found, *failed] = (
            batches.answer(lookups(pd.Series(each), pd.Series(["1042"] * len(each))), fixed=False) for each in names
        )
        with pytest.raises(ConfigError, match="features: unknown name 'other'"):
            batches.answer(lookups("other", pd.Series(["1042"])), fixed=True)
    assert [(each.code, "features: unknown name" in each.message) for each in (first, *failed)] == [
        ("invalid", True)
    ] * 3
    assert b"carrier" in found.value


def test_a_store_that_cannot_be_opened_is_no_rows_fault(tmp_path):
    services = RealServices(ServiceSettings(features=FeatureSettings(repo=str(REPO), state=str(tmp_path))))
    with (
        opened("feature_lookup", "features", answers.look_up, services) as batches,
        pytest.raises(ConfigError, match="there is no registry"),
    ):
        batches.answer(lookups(pd.Series(["order_status"]), pd.Series(["1042"])), fixed=False)


def test_a_wrong_number_of_keys_fails_the_query_that_names_the_features_and_else_the_row():
    services = FakeServices({}, {"customers": FakeFeatures({"1": {"name": "Ada"}}, join_key="id")})
    keys, wrong = pd.Series(["1"]), "customers is read by id, in this order; the query gives 2 keys"
    with opened("feature_lookup", "features", answers.look_up, services) as batches:
        with pytest.raises(ConfigError, match=wrong):
            batches.answer(lookups("customers", keys, keys), fixed=True)
        [outcome] = batches.answer(lookups(pd.Series(["customers"]), keys, keys), fixed=False)
        [found] = batches.answer(lookups("customers", keys), fixed=True)
    assert (outcome.code, outcome.message) == ("invalid", wrong)
    assert isinstance(found, Result)


@pytest.mark.parametrize("number", [2**53 - 1, 1 - 2**53])
def test_a_number_beside_nulls_is_a_key_as_long_as_it_is_exact(number):
    assert lookups("customers", pd.Series([number, None]))[0].arguments[1] == number
    inexact, null = lookups("customers", pd.Series([2**53 + 1, None]))  # a float of pandas, which is 2**53
    assert (inexact.code, null) == ("invalid", None)


def test_options_of_a_map_that_are_text_are_no_json():
    given = {"system": "42", "adapter": "1", "regex": "[0]", "max_tokens": "5", "stop": '["a"]'}
    options = pd.Series([list(given.items())], dtype=object)
    [row] = rows_of("llm_generate", ("m", pd.Series(["a text"]), options), 2, answers.GENERATION)
    assert msgspec.json.decode(row.arguments[2]) == {**given, "max_tokens": 5, "stop": ["a"]}


def test_the_options_that_are_text_are_all_known():
    wanted = {name for name, hint in typing.get_type_hints(Choices).items() if hint == str | None}
    assert wanted <= {*answers.TEXTS} <= {*answers.GENERATION}


@pytest.mark.parametrize("schema", [True, {"anyOf": [True]}, {"anyOf": [True, {"type": "null"}]}])
def test_a_property_that_may_be_anything_is_a_column_of_json(schema):
    assert row_of({"type": "object", "properties": {"a": schema}}).parts["a"].kind == "JSON"


@pytest.mark.parametrize("schema", [{"anyOf": 5}, {"type": 5}, {"type": "object", "properties": ["b"]}])
def test_a_property_whose_schema_is_none_is_named(schema):
    with pytest.raises(ConfigError, match="is no JSON Schema"):
        row_of({"type": "object", "properties": {"a": schema}})


@pytest.mark.parametrize(
    "key", [decimal.Decimal("1"), datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1), [("a", "b")], object()]
)
def test_a_key_that_is_neither_text_nor_a_number_is_the_rows_fault(key):
    keys = pd.Series([key, 1], dtype=object)
    rows = rows_of("feature_lookup", ("customers", keys), 1, None)
    services = FakeServices({}, {"customers": FakeFeatures({1: {"name": "Ada"}}, join_key="id")})
    failed, found = answered("feature_lookup", "features", answers.look_up, services, rows)
    assert isinstance(failed, Failed) and failed.code == "invalid" and "CAST" in failed.message
    assert isinstance(found, Result)


@pytest.mark.parametrize("text", ['{"order_id":1e999,"tags":[]}', '{"order_id":NaN,"tags":[]}', "[1]", '"x"', "{"])
def test_an_extract_that_cannot_be_read_is_a_failure_and_no_end_of_the_query(text):
    rows = rows_of("extract", ("m", pd.Series(["a text"]), '{"type": "object"}'), 3, answers.GENERATION)
    [outcome] = answered("extract", "model", answers.extract, FakeServices({"m": Script(text=text)}), rows)
    row = sql._Typed(row_of(Order).flat(), errors=True)(outcome)
    assert row["error_code"] == "model_error"
    assert sql._Typed(row_of(Order).flat(), errors=False)(outcome) is None


def test_what_nobody_foresaw_in_a_row_ends_that_row(monkeypatch):
    async def unforeseen(served, arguments):
        raise RecordError("invalid", "never reached")

    monkeypatch.setattr("flink_llm.arrivals.Arrival.place", property(lambda self: 1 / 0))
    rows = rows_of("llm_generate", ("m", pd.Series(["a text"])), 2, answers.GENERATION)
    [outcome] = answered("f", "model", unforeseen, FakeServices({"m": Script(text="x")}), rows)
    assert (outcome.code, outcome.message) == ("handler_error", "ZeroDivisionError: division by zero")


def test_an_outcome_that_is_no_text_or_no_json_is_none_in_a_table():
    assert Shape(None).convert(b"caf\xc3") == "caf\N{REPLACEMENT CHARACTER}"
    for value in (b"plain", b"\xff", b"[" * 100_000):
        assert Shape(row_of(Order)).convert(value) is None


def test_a_failed_row_has_no_hash_of_bytes_that_are_nowhere_in_kafka():
    place = {"topic": "t", "partition": 0, "offset": 7}
    failure = Failure(
        code="c", message="m", key="k", request_id=None, handler="h", failed_at=1, payload_sha256="ab", **place
    )
    shape = shapes("h", None, None, None)["failure"]
    row = dict(zip(shape.names, shape.convert(msgspec.json.encode(failure)), strict=True))
    assert (row["payload_sha256"], row["topic"]) == (None, "t")
