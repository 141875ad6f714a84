"""Under which names a job of a configuration meets Kafka."""

from types import SimpleNamespace

import pytest

from flink_llm import kafka
from flink_llm.config import parse
from flink_llm.jobs import edges


@pytest.mark.parametrize(
    ("given", "group", "transactions"),
    [({}, "chat-eu", "flink-llm-chat-eu"), ({"group": "chat"}, "chat", "chat-chat-eu")],
)
def test_offsets_are_kept_by_the_jobs_name_and_transactions_keep_the_one_they_had(
    monkeypatch, tmp_path, given, group, transactions
):
    raw = {"job": "llm_inference", "name": "chat-eu", "models": {"support-chat": "chat"}, "kafka": given}
    settings = parse(raw, tmp_path)
    read, written = [], []
    monkeypatch.setattr(kafka, "source", lambda tables, settings, *_, **__: read.append(settings.group))
    monkeypatch.setattr(kafka, "sink", lambda *_, transactions, **__: written.append(transactions))
    edges.requests(None, None, settings)
    edges.write(None, SimpleNamespace(results=None, partials=None, failures=None), settings)
    assert read == [group]
    assert set(written) == {transactions}
