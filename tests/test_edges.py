"""Under which names a job of a configuration meets Kafka."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm import kafka
from flink_llm.config import parse
from flink_llm.jobs import edges


@pytest.mark.parametrize(
    ("chosen", "group", "transactions"),
    [({}, "chat-eu", "flink-llm/chat-eu"), ({"group": "chat/a"}, "chat/a", "chat%2Fa/chat-eu")],
)
def test_offsets_are_kept_by_the_jobs_name_and_transactions_keep_the_one_they_had(
    monkeypatch, tmp_path, chosen, group, transactions
):
    raw = {"job": "llm_inference", "name": "chat-eu", "models": {"support-chat": "chat"}, "kafka": chosen}
    settings = parse(raw, tmp_path)
    read, written = [], []
    monkeypatch.setattr(kafka, "source", lambda tables, settings, *_, **__: read.append(settings.group))
    monkeypatch.setattr(kafka, "sink", lambda *_, transactions, **__: written.append(transactions))
    edges.requests(None, None, settings)
    edges.write(None, SimpleNamespace(results=None, partials=None, failures=None), settings)
    assert read == [group]
    assert set(written) == {transactions}


@given(st.sets(st.tuples(st.text("a:%-", max_size=3), st.text("a:%-", max_size=3)), min_size=2, max_size=2))
def test_of_any_two_sinks_neithers_transactions_begin_as_the_others(sinks):
    one, other = (kafka.transactions_of(*names) for names in sinks)
    assert not one.startswith(other) and not other.startswith(one)
