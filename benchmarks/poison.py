"""Does bad input stop anything? 1,000 good and 1,000 bad requests, mixed, through the main job.

The job is the demo's: real features, the shipped model. Every good request must be answered, every bad
one must become a failure record, and the job must not restart once.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kafka import KafkaConsumer, KafkaProducer

from benchmarks import pipeline
from flink_llm.local import demo_job, processes
from flink_llm.local.broker import TOPICS, create_topics

START_S, IDLE_S = 180.0, 60.0


def good(i: int) -> dict[str, Any]:
    """A request that is answered."""
    question = f"Where is order {1042 + i}?"
    messages = [{"role": "user", "content": question}]
    return {
        "request_id": f"good-{i}",
        "session_id": f"s{i % 50}",
        "user_id": f"user-{1 + i % 200}",
        "messages": messages,
    }


def bad(i: int) -> tuple[str, bytes | None]:
    """The i-th bad value: its kind, and its bytes."""
    value = {**good(i), "request_id": f"bad-{i}"}
    kinds: dict[str, Any] = {
        "json": b'{"request_id": "x", ',
        "utf8": b'{"request_id": "\xff\xfe", "session_id": "s"}',
        "null": None,
        "array": b"[1, 2]",
        "no id": {key: item for key, item in value.items() if key != "request_id"},
        "no session": {key: item for key, item in value.items() if key != "session_id"},
        "number for text": {**value, "messages": [{"role": "user", "content": 5}]},
        "role": {**value, "messages": [{"role": "king", "content": "x"}]},
        "no messages": {**value, "messages": []},
        "empty text": {**value, "messages": [{"role": "user", "content": " "}]},
        "1 MB": {**value, "messages": [{"role": "user", "content": "x" * 900_000}]},
        "negative max_tokens": {**value, "max_tokens": -5},
        "absurd max_tokens": {**value, "max_tokens": 10**12},
        "model": {**value, "model": "nobody"},
        "longer than the context": {**value, "messages": [{"role": "user", "content": "order 1 " * 3000}]},
        "reply_to": {**value, "reply_to": "__consumer_offsets"},
        "temperature": {**value, "temperature": 9.5},
        "conflict": {**good(i), "messages": [{"role": "user", "content": "something else"}]},
    }
    kind = list(kinds)[i % len(kinds)]
    chosen = kinds[kind]
    return kind, chosen if chosen is None or isinstance(chosen, bytes) else json.dumps(chosen).encode()


def measure(servers: str, folder: Path, count: int) -> dict[str, Any]:
    """One run with a job of its own."""
    create_topics(servers, TOPICS)
    rest = processes.free_port()
    config = folder / "poison.yaml"
    demo_job.prepare(folder)
    flink = {"delivery": "exactly_once", "checkpoint_interval_ms": 500, "properties": {"rest.port": str(rest)}}
    kafka = {"bootstrap_servers": servers, "group": "poison"}
    config.write_text(yaml.safe_dump(demo_job.configuration(folder, kafka=kafka, flink=flink, name="poison")))
    log = folder / "poison.log"
    job = processes.start([sys.executable, "-m", "flink_llm", "run", str(config)], log)
    try:
        return _run(servers, job, log, rest, count)
    finally:
        processes.stop(job)


def _run(servers: str, job: processes.Started, log: Path, rest: int, count: int) -> dict[str, Any]:
    producer = KafkaProducer(bootstrap_servers=servers, max_request_size=2**21)
    consumer = KafkaConsumer(
        "chat.responses",
        "chat.failures",
        bootstrap_servers=servers,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        group_id=None,
    )
    sent = [(good(i)["session_id"].encode(), json.dumps(good(i)).encode()) for i in range(count)]
    kinds: Counter[str] = Counter()
    for key, value in sent:
        producer.send("chat.requests", key=key, value=value)
    # A conflict is one only behind the request whose id it takes.
    later = [bad(i) for i in range(count)]
    random.Random(1).shuffle(later)
    for kind, value in later:
        kinds[kind] += 1
        producer.send("chat.requests", key=b"bad", value=value)
    producer.flush()
    responses: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for topic, value in _outcomes(consumer, job, log, 2 * count):
        (responses if topic == "chat.responses" else failures)[value.get("code") or value["request_id"]] += 1
    restarts = pipeline.restarts(rest)
    consumer.close()
    producer.close()
    return {
        "responses": len(responses),
        "failures": sum(failures.values()),
        "restarts": restarts,
        "duplicated": sum(responses.values()) - len(responses),
        "codes": dict(failures),
        "kinds": len(kinds),
    }


def _outcomes(consumer: Any, job: processes.Started, log: Path, wanted: int) -> Iterator[tuple[str, dict[str, Any]]]:
    seen, deadline = 0, time.monotonic() + START_S
    while time.monotonic() < deadline and seen < wanted:
        if job.process() is None:
            raise RuntimeError(f"the job has ended: {log.read_text()[-500:]}")
        for records in consumer.poll(timeout_ms=200).values():
            for record in records:
                seen += 1
                deadline = time.monotonic() + IDLE_S
                yield record.topic, json.loads(record.value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 of each")
    args = parser.parse_args()
    with pipeline.local_kafka() as (servers, folder):
        print(json.dumps(measure(servers, folder, 200 if args.quick else 1000)))


if __name__ == "__main__":
    main()
