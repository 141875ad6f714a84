"""`apply` between real edges: results, failures, reply_to and event time, on bounded input."""

import json
import sys
import textwrap
import time

import pytest
from kafka import KafkaConsumer, KafkaProducer

from flink_llm.local import processes

PROGRAM = """
import sys
from flink_llm import environment, kafka
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf
from flink_llm.kafka_settings import KafkaSettings
from flink_llm.udfs.async_operator import apply

servers, requests, responses, other, failures = sys.argv[1:]

class Echo(AsyncUdf):
    async def call(self, request: dict, ctx):
        return {"request_id": request["request_id"], "timestamp": ctx.timestamp}

env = environment.environment()
environment.configure(env, FlinkSettings(checkpoint_interval_ms=200, delivery="exactly_once"), capacity=64)
tables = environment.tables(env)
settings = KafkaSettings(bootstrap_servers=servers, group=requests)
stream = kafka.source(tables, settings, [requests], uid="requests", bounded=True)
operator = OperatorSettings(reply_topics=[responses, other])
out = apply(stream, Echo(), key="session_id", uid="echo", settings=operator)
kafka.sink(tables, out.results, settings, [responses, other], uid="responses", delivery="exactly_once")
kafka.sink(tables, out.failures, settings, [failures], uid="failures", delivery="exactly_once")
env.execute("edges")
"""


def consume(broker, topic):
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=broker.bootstrap_servers,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        group_id=None,
        consumer_timeout_ms=2000,
    )
    try:
        return list(consumer)
    finally:
        consumer.close()


@pytest.mark.timeout(240)
def test_whole_records_arrive_and_leave(broker, topics, tmp_path):
    requests, responses, other, failures = topics("requests", "responses", "other", "failures")
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    base = int(time.time() * 1000) - 60_000  # not older: a broker drops what is past its retention
    for i in range(20):
        value = {"request_id": f"r{i}", "session_id": f"s{i % 3}", **({"reply_to": other} if i == 7 else {})}
        producer.send(
            requests, key=b"k", value=json.dumps(value).encode(), headers=[("trace", b"t")], timestamp_ms=base + i
        )
    for broken in (None, b"\xff\xfe", b"{}", b'{"session_id": ["x"]}'):
        producer.send(requests, key=b"broken", value=broken, timestamp_ms=base + 5000)
    producer.flush()
    producer.close()
    program = tmp_path / "edges.py"
    program.write_text(textwrap.dedent(PROGRAM))
    log = tmp_path / "log"
    names = [requests, responses, other, failures]
    started = processes.start([sys.executable, str(program), broker.bootstrap_servers, *names], log)
    process = started.process()
    try:
        assert process is not None and process.wait(200) in (0, None), log.read_text()[-2000:]
    finally:
        processes.stop(started)

    answered = consume(broker, responses)
    assert sorted(json.loads(record.value)["request_id"] for record in answered) == sorted(
        f"r{i}" for i in range(20) if i != 7
    )
    assert [json.loads(record.value)["request_id"] for record in consume(broker, other)] == ["r7"]
    for record in answered:
        number = int(json.loads(record.value)["request_id"][1:])
        assert record.key == f"s{number % 3}".encode()
        assert dict(record.headers) == {"trace": b"t"}
        assert record.timestamp == json.loads(record.value)["timestamp"] == base + number
    failed = [json.loads(record.value) for record in consume(broker, failures)]
    assert sorted((failure["code"], failure["offset"]) for failure in failed) == [
        ("bad_key", 22),
        ("bad_key", 23),
        ("malformed", 21),
        ("null_value", 20),
    ]
    assert {failure["topic"] for failure in failed} == {requests}
