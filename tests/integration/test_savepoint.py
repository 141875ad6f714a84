"""A savepoint of `apply` with records in flight, restored at another parallelism beside a new sink."""

import json
import time
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer
from py4j.protocol import Py4JJavaError
from pyflink.java_gateway import get_gateway

from flink_llm import environment, kafka
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf
from flink_llm.kafka_settings import KafkaSettings
from flink_llm.udfs.async_operator import apply

PATIENCE_S = 60


def held_until(gate: str) -> AsyncUdf:
    """Counts the calls of each key; a request that says so waits until the file `gate` is there."""

    class Held(AsyncUdf):  # inside: the worker cannot import the tests
        stateful = True

        async def call(self, request: dict, ctx):
            import asyncio
            import os

            while request.get("wait") and not os.path.exists(gate):  # noqa: ASYNC110, ASYNC240
                await asyncio.sleep(0.01)
            ctx.state["count"] = ctx.state.get("count", 0) + 1
            return {"request_id": request["request_id"], "key": ctx.key, "count": ctx.state["count"]}

    return Held()


class Job:
    """The same operator, started again and again in one client process."""

    def __init__(self, broker, topics, folder):
        self.settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, group=topics[0])
        self.requests, self.responses, self.extra = topics
        self.folder = folder

    def start(self, *, parallelism=1, extra=False, savepoint=None, udf=None, modules=()):
        properties = {"restart-strategy.type": "none"}
        if savepoint:
            properties["execution.state-recovery.path"] = savepoint
        env = environment.environment(properties)
        for module in modules:
            env.add_python_file(str(module))
        flink = FlinkSettings(checkpoint_interval_ms=200, parallelism=parallelism, properties=properties)
        environment.configure(env, flink, capacity=64)
        tables = environment.tables(env)
        stream = kafka.source(tables, self.settings, [self.requests], uid="requests", start="earliest")
        if extra:  # before the operator, so that every number the planner gives moves
            kafka.sink(tables, stream, self.settings, [self.extra], uid="extra", delivery="exactly_once")
        udf = udf or held_until(str(self.folder / "gate"))
        out = apply(stream, udf, key="session_id", uid="held", settings=OperatorSettings())
        kafka.sink(tables, out.results, self.settings, [self.responses], uid="responses", delivery="exactly_once")
        return env.execute_async("held")

    def stop(self, job):
        # PyFlink's own stop_with_savepoint calls a Java method that Flink 2 no longer has.
        canonical = get_gateway().jvm.org.apache.flink.core.execution.SavepointFormatType.CANONICAL
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return job._j_job_client.stopWithSavepoint(False, str(self.folder), canonical).get()
            except Py4JJavaError as error:  # some subtasks may answer before others run
                if "Not all required tasks" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def send(self, *requests):
        producer = KafkaProducer(bootstrap_servers=self.settings.bootstrap_servers)
        for request in requests:
            producer.send(self.requests, value=json.dumps(request).encode())
        producer.close()

    def wait(self, count):
        """The responses, once there are `count` and nothing more comes for a second."""
        consumer = KafkaConsumer(
            self.responses, bootstrap_servers=self.settings.bootstrap_servers, isolation_level="read_committed",
            auto_offset_reset="earliest", consumer_timeout_ms=1000,
        )  # fmt: skip
        found = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count and time.monotonic() < deadline:
            found += [json.loads(record.value) for record in consumer]
        found += [json.loads(record.value) for record in consumer]
        consumer.close()
        return found


def request(number, key, **fields):
    return {"request_id": f"r{number}", "session_id": key, **fields}


@pytest.mark.timeout(240)
def test_what_was_in_flight_runs_again_with_its_keys_state(broker, topics, tmp_path: Path) -> None:
    job = Job(broker, topics("requests", "responses", "extra"), tmp_path)
    keys = [f"s{i}" for i in range(8)]
    job.send(*(request(i, key) for i, key in enumerate(keys)))
    job.send(*(request(10 + i, key, wait=True) for i, key in enumerate(keys)))
    running = job.start()
    before = job.wait(len(keys))
    savepoint = job.stop(running)
    assert {(answer["request_id"], answer["count"]) for answer in before} == {(f"r{i}", 1) for i in range(8)}

    (tmp_path / "gate").touch()
    job.send(*(request(20 + i, key) for i, key in enumerate(keys)), request(0, "s0"))
    running = job.start(parallelism=2, extra=True, savepoint=savepoint)
    answers = job.wait(3 * len(keys) + 1)
    running.cancel().result()
    counted = sorted((answer["key"], answer["count"], answer["request_id"]) for answer in answers)
    wanted = [
        (key, 1 + turn, f"r{10 * turn + i}" if turn else f"r{i}") for i, key in enumerate(keys) for turn in range(3)
    ]
    assert counted == sorted([*wanted, ("s0", 1, "r0")])  # the repeat got the first answer again, no fourth call
