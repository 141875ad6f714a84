"""Java and Python send a key to the same shard."""

import json

import pytest

from flink_llm import environment
from flink_llm.arrivals import shard_of
from flink_llm.udfs.keying import _number_of


@pytest.mark.parametrize("shards", [16, 24])
def test_sql_finds_the_shard_of_any_key(shards):
    keys = ["", "a", "sess-1", "Grüße 你好 😀", 'it\'s "quoted"', "x" * 5000, 0, -7, 2**63, "\u0000", "1.0"]
    env = environment.environment()
    tables = environment.tables(env)
    written = [json.dumps({"n": {"k": "no"}, "k": key}, ensure_ascii=escaped) for key in keys for escaped in (0, 1)]
    rows = ", ".join(f"({i}, X'{text.encode().hex()}')" for i, text in enumerate(written))
    query = f"SELECT i, MOD({_number_of('k')}, {shards}) FROM (VALUES {rows}) AS t(i, `value`)"
    with tables.execute_sql(query).collect() as results:
        found = dict(tuple(row) for row in results)
    assert found == {i: shard_of(str(keys[i // 2]), shards) for i in range(len(written))}
