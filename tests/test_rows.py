"""Lighter rows are read and written as PyFlink's own."""

import pickle

import pytest
from pyflink.common import Row, RowKind, Types
from pyflink.fn_execution import coder_impl_fast
from pyflink.fn_execution.coders import from_type_info
from pyflink.fn_execution.datastream.process import input_handler, operations

from flink_llm.udfs import rows

INNER = Types.ROW_NAMED(["a", "b"], [Types.LONG(), Types.STRING()])
CODER = from_type_info(Types.ROW([Types.LONG(), Types.TUPLE([INNER, Types.LONG()])])).get_impl()


@pytest.fixture
def lean():
    kept = coder_impl_fast.Row, coder_impl_fast.RowKind, input_handler.Row, operations.Row
    rows.lean_rows()
    yield
    coder_impl_fast.Row, coder_impl_fast.RowKind, input_handler.Row, operations.Row = kept


def inner(kind=RowKind.INSERT):
    row = Row.of_kind(kind, 2, "x")
    row.set_field_names(["a", "b"])
    return row


@pytest.mark.parametrize("kind", RowKind)
def test_what_is_read_is_a_row_like_any(lean, kind):
    _, (read, _) = CODER.decode(CODER.encode(Row(1, (inner(kind), 3))))
    assert isinstance(read, Row)
    assert type(read) is rows.ReadRow
    assert read == inner(kind)
    assert inner(kind) == read
    assert read != inner(next(other for other in RowKind if other is not kind))
    assert read != "x"
    assert hash(read) == hash(inner(kind))
    assert (read.a, read["b"], list(read), read.get_row_kind()) == (2, "x", [2, "x"], kind)
    assert read.as_dict() == {"a": 2, "b": "x"}
    assert pickle.loads(pickle.dumps(read)) == inner(kind)


def test_what_is_written_has_the_same_bytes():
    assert CODER.encode(rows.written(1, (rows.written(2, "x"), 3))) == CODER.encode(Row(1, (inner(), 3)))


def test_an_operators_results_are_written_without_rows(lean):
    ((tag, out),) = input_handler._emit_results(5, 6, iter(["x"]), has_side_output=True)
    assert (tag, type(out), list(out)) == ("", coder_impl_fast.InternalRow, [5, 6, "x"])


def test_rows_of_keys_are_those_of_pyflink(lean):
    keyed = Types.ROW([Types.INT()])
    coder = from_type_info(keyed).get_impl()
    assert coder.encode(operations.Row(7)) == coder.encode(Row(7))
    assert operations.Row(7) == Row(7)
    assert [type(operations.Row(key)[0]) for key in (1, True)] == [int, bool]
    assert operations.Row([7]) == Row([7])  # which cannot be hashed


def test_an_element_and_its_time_are_written_as_by_pyflink(lean):
    coder = from_type_info(Types.ROW([Types.LONG(), Types.STRING()])).get_impl()
    assert coder.encode(operations.Row(7, "x")) == coder.encode(Row(7, "x"))
