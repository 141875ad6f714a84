"""What is told beside metrics: logs of one JSON object a line, each with the request that it is about."""

import asyncio
import io
import json
import logging
import subprocess
import sys

import msgspec
import pytest

from flink_llm import config
from flink_llm.engine.launch import _command
from flink_llm.features import FeatureClient
from flink_llm.handler import AsyncUdf
from flink_llm.logs import JsonLines, shape_logs


@pytest.fixture
def written():
    """The objects that were logged, through a handler of the root logger as Flink's worker has one."""
    stream, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(stream), root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    handler.setFormatter(JsonLines())
    yield lambda: [msgspec.json.decode(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(level)


class Logs(AsyncUdf):
    async def call(self, request: dict, ctx) -> dict:
        async def later():
            await asyncio.sleep(1)
            ctx.log.info("later", extra={"step": 2})

        task = asyncio.create_task(later())
        ctx.log.info("begun %s", "ü\n")
        await task
        return request


def test_a_line_names_the_request_of_its_call_and_of_the_tasks_it_starts(harness, written):
    run = harness(Logs())
    for request in ({"session_id": "s", "request_id": "r1"}, {"session_id": "s"}):
        run.send(request)
    run.finish()
    told = [(line["message"], line["request_id"]) for line in written() if line["logger"] == "flink_llm.handler.Logs"]
    assert told == [("begun ü\n", "r1"), ("begun ü\n", "test/0/1"), ("later", "r1"), ("later", "test/0/1")]
    assert {(line["operator"], line["level"]) for line in written()} == {("handler", "INFO")}
    assert [line["step"] for line in written() if line["message"] == "later"] == [2, 2]


class Raises(AsyncUdf):
    async def call(self, request: dict, ctx) -> dict:
        raise ValueError("no")


def test_an_exception_is_in_its_line(harness, written):
    run = harness(Raises())
    run.send({"session_id": "s", "request_id": "r1"})
    run.finish()
    (line,) = written()
    assert (line["request_id"], line["exc_info"].splitlines()[-1]) == ("r1", "ValueError: no")


def holds_itself():
    ring = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), "nan"),
        ([1.5, float("-inf")], [1.5, "-inf"]),
        ({("a", 1): {2: None}}, {"('a', 1)": {"2": None}}),
        ("half \udc80", "half \\udc80"),
        (holds_itself(), "a list that cannot be written"),
        (10**5000, "a int that cannot be written"),
    ],
    ids=["not a number", "infinite", "keys", "half a character", "a ring", "too long"],
)
def test_whatever_is_told_is_a_line_of_json(written, value, told):
    logging.getLogger("any").info("a \udc80 %s", "ü", extra={"value": value, "step": 2})
    (line,) = written()
    assert (line["message"], line["value"], line["step"], line["level"]) == ("a \\udc80 ü", told, 2, "INFO")
    assert line["time"].endswith("+00:00")


def test_what_serves_everybody_is_no_part_of_the_call_that_starts_it(harness, written, feature_client):
    class Reads(AsyncUdf):
        async def call(self, request: dict, ctx) -> dict:
            await feature_client.enqueue("view", (1,))
            return request

    run = harness(Reads(), real_time=True)
    run.send({"session_id": "s", "request_id": "r1"})
    run.finish()
    assert [line.get("request_id") for line in written() if line["message"] == "read"] == [None]


@pytest.fixture
def feature_client(tmp_path):
    from flink_llm.feature_settings import FeatureSettings

    client = FeatureClient(FeatureSettings(repo=str(tmp_path)))

    async def read(batch):
        logging.getLogger("features").info("read")
        for _, keys in batch:
            for waiters in keys.values():
                for waiter in waiters:
                    waiter.set_result(None)

    client._read = read
    return client


def test_one_key_shapes_the_logs_of_workers_and_host(tmp_path):
    raw = {"job": "j", "name": "n", "telemetry": {"logs": "json"}}
    job = config.parse(raw, tmp_path)
    assert job.operator_settings().telemetry.logs == "json"
    command = _command(job.host, "cpu", tmp_path)
    assert command[command.index("--logs") + 1] == "json"
    assert "--logs" not in _command(config.parse({"job": "j", "name": "n"}, tmp_path).host, "cpu", tmp_path)


def test_a_host_logs_so(tmp_path):
    (tmp_path / "script.json").write_text(json.dumps({"m": {"text": "x"}}))
    socket = tmp_path / "s.sock"
    words = ["--device", "cpu", "--socket", str(socket), "--linger", "0", "--logs", "json", "--"]
    command = [sys.executable, "-m", "flink_llm.testing", *words, str(tmp_path / "script.json")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in said.stderr.splitlines()]
    assert lines[0]["message"] == f"serving cpu on {socket}"


def test_text_is_left_as_it_is(monkeypatch):
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    shape_logs("text")
    assert handler.formatter is None
    shape_logs("json")
    assert isinstance(handler.formatter, JsonLines)
