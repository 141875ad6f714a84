"""Java and Python send a key to the same shard."""

import json

import pytest

from flink_llm import environment
from flink_llm.arrivals import shard_of
from flink_llm.udfs.keying import _number_of


@pytest.mark.parametrize("shards", [1, 16, 24, 256])
def test_sql_finds_the_shard_of_any_key(shards):
    keys = ["", "a", "sess-1", "Grüße 你好 😀", 'it\'s "quoted"', "x" * 5000, 0, -7, 2**63, "\u0000", "1.0"]
    written = [json.dumps({"n": {"k": "no"}, "k": key}, ensure_ascii=escaped) for key in keys for escaped in (0, 1)]
    expected = [shard_of(str(key), shards) for key in keys for _ in (0, 1)]
    assert found(written, shards) == expected


@pytest.mark.parametrize("value", [None, "{}", "{", '{"k": null}', '{"k": {"a": 1}}'])
def test_records_without_a_key_are_spread_by_their_place(value):
    assert found([value] * 8, 16) == [shard_of(f"t/3/{i}", 16) for i in range(8)]


def found(values, shards):
    """The shard that SQL finds for each value, lying at the offset of its index."""
    tables = environment.tables(environment.environment())
    texts = ["CAST(NULL AS BYTES)" if value is None else f"X'{value.encode().hex()}'" for value in values]
    rows = ", ".join(f"('t', 3, {i}, {text})" for i, text in enumerate(texts))
    records = f"(VALUES {rows}) AS records(`topic`, `partition`, `offset`, `value`)"
    query = f"SELECT `offset`, MOD({_number_of('k', shards)}, {shards}) FROM {records}"
    with tables.execute_sql(query).collect() as results:
        return [shard for _, shard in sorted(tuple(row) for row in results)]
