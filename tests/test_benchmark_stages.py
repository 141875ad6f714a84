"""What `--stages` of the pipeline's benchmarks says of a record's way, without Flink and Kafka."""

import gc

import pytest
from apache_beam.runners.worker import sdk_worker

from benchmarks import stages
from benchmarks.handlers import StagedEcho, StagedStream
from flink_llm import codec
from flink_llm.runner import Runner
from flink_llm.shard import Shard
from flink_llm.testing import FakeServices, Harness, Script

REQUEST = {"request_id": "r", "session_id": "s", "messages": [{"role": "user", "content": "x"}]}
SAFEPOINT = (
    '[1700000000123ms] Safepoint "G1CollectForAllocation", Time since last: 571047636 ns, Reaching safepoint: '
    "2394 ns, Cleanup: 78696 ns, At safepoint: 22918910 ns, Total: 23000000 ns\nUsing G1\n"
)


@pytest.fixture
def stamped(monkeypatch):
    """A worker's classes and collector, set back afterwards."""
    changed = (Runner, "submit"), (Shard, "_output"), (sdk_worker.SdkWorker, "process_bundle")
    for where, name in changed:
        monkeypatch.setattr(where, name, getattr(where, name))
    before = list(gc.callbacks)
    yield
    gc.callbacks[:] = before


@pytest.mark.parametrize("handler", [StagedEcho, StagedStream])
def test_what_a_worker_emits_says_when_it_was_taken_in_and_emitted(stamped, tmp_path, handler):
    services = FakeServices(models={"scripted": Script(text="{now}" * 2, tokens=2)})

    with Harness(handler(str(tmp_path)), services) as run:
        run.send(REQUEST)
        outputs = run.finish()

    assert [out.kind for out in outputs] == (["partial"] * 2 if handler is StagedStream else []) + ["result"]
    for out in outputs:
        _, taken, emitted = (float(stamp) for stamp in out.headers["stages"].split())
        assert 0 < taken <= emitted
        said = codec.decode(out.value)
        if out.kind == "partial" or handler is StagedEcho:
            assert taken <= said["had"] <= emitted


def test_a_collection_is_written_down_while_the_worker_runs(stamped, tmp_path):
    stages.install(str(tmp_path))
    gc.collect()

    (file,) = tmp_path.glob("spans.*")
    assert file.read_text().startswith("gc2 ")


def test_javas_pauses_are_read():
    assert list(stages.pauses(SAFEPOINT)) == [(pytest.approx(1700000000.1), 1700000000.123)]


def test_the_stage_that_the_slowest_wait_in_owns_the_tail(monkeypatch, tmp_path):
    checkpoint = {"trigger_timestamp": 2_998_000, "latest_ack_timestamp": 3_010_000, "status": "COMPLETED"}
    monkeypatch.setattr(stages, "rest", lambda port, path: {"history": [checkpoint]})
    rows = [{"said": at, "emitted": at + 0.004, "seen": at + 0.008} for at in map(float, range(1000, 4000, 30))]
    rows[-1]["seen"] += 0.05
    (tmp_path / "spans.7").write_text("bundle 999.9 1000.006\nbundle 3969.9 3970.0")

    first, *lines = stages.told(rows, stages.Spans(tmp_path, 0))

    assert first == "100 records: p50 8.0 ms, p99 58.0 ms"
    assert [line.split("of the tail")[1].strip() for line in lines[:3]] == ["0%", "0%", "100%"]
    assert lines[2].startswith("bundled - seen")
    assert "checkpoints: 1 of 2 ms and more" in lines[-1]
