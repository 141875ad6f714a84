"""Rows of SQL that cannot be answered are failures of their own: none holds up its batch, none fails its query."""

import datetime
import decimal

import msgspec
import pandas as pd
import pytest

from flink_llm.call import Failed, Result
from flink_llm.errors import RecordError
from flink_llm.records import Failure
from flink_llm.testing import FakeFeatures, FakeServices, Script
from flink_llm.udfs import answers, sql
from flink_llm.udfs.arguments import rows_of
from flink_llm.udfs.batches import Batches
from flink_llm.udfs.columns import row_of
from flink_llm.udfs.tables import Shape, shapes


class Order(msgspec.Struct):
    order_id: float
    tags: list[str]


def answered(name, kind, function, services, rows):
    batches = Batches(name, kind, function, services, "sql")
    batches.start()
    try:
        return batches.answer(rows, fixed=True)
    finally:
        batches.close()


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
