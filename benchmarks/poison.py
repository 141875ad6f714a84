"""Does bad input stop anything? 1,000 good and 1,000 bad requests, mixed, through the main job.

The job is the demo's: real features, the shipped model. Every good request must be answered, every bad
one must become a failure record, and the job must not restart once. A result is too large here at
`RESULT_BYTES` already: log-probabilities make a reply of the demo model larger than that, and so do the
request's headers, which every outcome carries.
"""

import argparse
import json
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kafka import KafkaConsumer, KafkaProducer
from msgspec import Struct

from benchmarks import pipeline
from flink_llm.local import demo_job, processes
from flink_llm.local.broker import create_topics

START_S, IDLE_S = 180.0, 60.0
AFTER_S = 3.0
"""How long is listened after the last outcome that is due, for those that are not."""
RESULT_BYTES = 8_000
DEADLINE_S = 300.0
"""All come at once, and it is not asked how soon they are answered."""
TOPICS = ("requests", "responses", "tokens", "failures")


class Sent(Struct, frozen=True):
    """A request, and what must come of it: the failure `code`, or None for a response."""

    kind: str
    code: str | None
    value: bytes | None
    key: bytes = b"bad"
    headers: dict[str, bytes] = {}


def request(i: int, **changes: Any) -> dict[str, Any]:
    """The i-th request, with other or more fields."""
    return {
        "request_id": f"good-{i}",
        "session_id": f"s{i % 50}",
        "user_id": f"user-{1 + i % 200}",
        "messages": [{"role": "user", "content": f"Where is order {1042 + i}?"}],
        **changes,
    }


def good(i: int) -> Sent:
    """The i-th request that is answered."""
    return Sent("good", None, json.dumps(request(i)).encode(), f"s{i % 50}".encode())


def bad(i: int) -> Sent:
    """The i-th bad request; each kind in turn."""
    name = f"bad-{i}"

    def changed(**fields: Any) -> dict[str, Any]:
        return request(i, **{"request_id": name, **fields})

    def without(field: str) -> dict[str, Any]:
        return {key: item for key, item in changed().items() if key != field}

    def says(content: Any, role: str = "user") -> dict[str, Any]:
        return changed(messages=[{"role": role, "content": content}])

    kinds: dict[str, tuple[str, Any, dict[str, bytes]]] = {
        "json": ("malformed", b'{"request_id": "x", ', {}),
        "utf8": ("malformed", b'{"request_id": "\xff\xfe", "session_id": "s"}', {}),
        "null": ("null_value", None, {}),
        "array": ("invalid", b"[1, 2]", {}),
        "no id": ("invalid", without("request_id"), {}),
        "no session": ("invalid", without("session_id"), {}),
        "number for text": ("invalid", says(5), {}),
        "role": ("invalid", says("x", "king"), {}),
        "no messages": ("invalid", changed(messages=[]), {}),
        "empty text": ("empty_text", says(" "), {}),
        "1 MB": ("too_large", says("x" * 900_000), {}),
        "negative max_tokens": ("invalid", changed(max_tokens=-5), {}),
        "absurd max_tokens": ("invalid", changed(max_tokens=10**12), {}),
        "model": ("unknown_model", changed(model="nobody"), {}),
        "longer than the context": ("context_overflow", says("order 1 " * 3000), {}),
        "reply_to": ("bad_reply_to", changed(reply_to="__consumer_offsets"), {}),
        "temperature": ("invalid", changed(temperature=9.5), {}),
        "conflict": ("conflicting_request", {**says("something else"), "request_id": f"good-{i}"}, {}),
        "large result": ("result_too_large", changed(logprobs=20), {}),
        "a large header": ("result_too_large", changed(), {"large": b"x" * 900_000}),
        "many headers": ("result_too_large", changed(), {f"header-{n}": b"\xff" for n in range(2_000)}),
        "deadline in words": ("invalid", changed(), {"deadline-ms": b"soon"}),
    }
    kind = list(kinds)[i % len(kinds)]
    code, value, headers = kinds[kind]
    raw = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
    return Sent(kind, code, raw, headers=headers)


def mixed(count: int) -> list[Sent]:
    """`count` good and `count` bad ones, mixed, the same each time.

    A conflict is one only behind the request whose id it takes.
    """
    chance = random.Random(1)
    places = [chance.random() for _ in range(count)]
    placed = [(places[i], good(i)) for i in range(count)]
    for i in range(count):
        record, at = bad(i), chance.random()
        placed.append((places[i] + (1 - places[i]) * at if record.kind == "conflict" else at, record))
    return [record for _, record in sorted(placed, key=lambda each: each[0])]


def measure(servers: str, folder: Path, count: int) -> dict[str, Any]:
    """One run with a job of its own."""
    mark = uuid.uuid4().hex[:8]
    topics = {name: f"{name}.{mark}" for name in TOPICS}
    create_topics(servers, topics.values())
    rest = processes.free_port()
    config = folder / "poison.yaml"
    demo_job.prepare(folder)
    flink = {"delivery": "exactly_once", "checkpoint_interval_ms": 500, "properties": {"rest.port": str(rest)}}
    kafka = {"bootstrap_servers": servers, "group": f"poison-{mark}"}
    raw = demo_job.configuration(folder, kafka=kafka, flink=flink, name="poison")
    raw["topics"] = {**topics, "requests": [topics["requests"]]}
    raw["operator"] |= {"max_result_bytes": RESULT_BYTES, "deadline": DEADLINE_S}
    config.write_text(yaml.safe_dump(raw))
    log = folder / "poison.log"
    job = processes.start([sys.executable, "-m", "flink_llm", "run", str(config)], log)
    try:
        return _run(servers, topics, job, log, rest, count)
    finally:
        processes.stop(job)


def _run(
    servers: str, topics: dict[str, str], job: processes.Started, log: Path, rest: int, count: int
) -> dict[str, Any]:
    consumer = KafkaConsumer(
        topics["responses"],
        topics["failures"],
        bootstrap_servers=servers,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        group_id=None,
    )
    codes = _send(servers, topics["requests"], mixed(count))
    identities = {f"good-{i}" for i in range(count)}
    answered: Counter[str] = Counter()
    failed: Counter[tuple[int, int]] = Counter()
    found: Counter[str] = Counter()
    unexpected = 0
    for topic, value in _outcomes(consumer, job, log, 2 * count):
        if topic == topics["responses"]:
            answered[value["request_id"]] += 1
            unexpected += value["request_id"] not in identities
        else:
            place = value["partition"], value["offset"]
            failed[place] += 1
            found[value["code"]] += 1
            unexpected += codes[place] != value["code"]
    restarts = pipeline.restarts(rest)
    consumer.close()
    return {
        "responses": len(identities.intersection(answered)),
        "failures": len([place for place in failed if codes[place] is not None]),
        "restarts": restarts,
        "duplicated": answered.total() - len(answered) + failed.total() - len(failed),
        "unexpected": unexpected,
        "codes": dict(found),
        "kinds": len({bad(i).kind for i in range(count)}),
    }


def _send(servers: str, topic: str, records: list[Sent]) -> dict[tuple[int, int], str | None]:
    """What must come of the record at each partition and offset: a failure's code, None for a response."""
    producer = KafkaProducer(bootstrap_servers=servers, max_request_size=2**21)
    sent = [
        (producer.send(topic, key=each.key, value=each.value, headers=list(each.headers.items())), each.code)
        for each in records
    ]
    producer.flush()
    places = {(future.get().partition, future.get().offset): code for future, code in sent}
    producer.close()
    return places


def _outcomes(consumer: Any, job: processes.Started, log: Path, due: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Topic and value of all outcomes, and of those beyond the `due` ones."""
    seen, deadline = 0, time.monotonic() + START_S
    while time.monotonic() < deadline:
        if job.process() is None:
            raise RuntimeError(f"the job has ended: {log.read_text()[-500:]}")
        for records in consumer.poll(timeout_ms=200).values():
            for record in records:
                seen += 1
                deadline = time.monotonic() + (IDLE_S if seen < due else AFTER_S)
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
