"""What Flink, the operator and the model host add to a record's way through Kafka.

The floor is a bare kafka-python loop that reads a request and writes it back (acks=all, linger 0), on
the same broker; ours is the same echo through the async operator, the client and a zero-cost scripted
model in a real host. Both are warm, at 200 requests a second (`--rate` for another), and alternate; the
figures are medians over the pairs. Exactly once is measured with a checkpoint each 100 ms; `--table`
measures it at 50, 100, 200 and 1,000 ms and nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from benchmarks import pipeline, stages
from benchmarks.pipeline import local_kafka, quantile
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.local import processes
from flink_llm.local.broker import create_topics
from flink_llm.testing import Script

RATE = 200
CHECKPOINT_MS = 100
INTERVALS_MS = (50, 100, 200, 1000)
WARM_UP_RATE, WARM_UP_S, WARM_UP_ROUNDS = 500, 70.0, 12
FLOOR = """
import sys
from kafka import KafkaConsumer, KafkaProducer
servers, requests, responses = sys.argv[1:]
producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
consumer = KafkaConsumer(requests, bootstrap_servers=servers, group_id=None, auto_offset_reset="earliest")
for record in consumer:
    producer.send(responses, key=record.key, value=record.value)
"""


def latencies(
    servers: str, requests: str, responses: str, seconds: float, level: str, rate: int = RATE,
    seen: stages.Seen | None = None,
) -> list[float]:  # fmt: skip
    """Milliseconds from send to a committed answer, at `rate` for `seconds`. `seen` is told each answer's record."""
    producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
    consumer = KafkaConsumer(
        responses, bootstrap_servers=servers, group_id=None, auto_offset_reset="latest", isolation_level=level
    )
    while not consumer.assignment():
        consumer.poll(timeout_ms=50)
    for partition in consumer.assignment():
        consumer.position(partition)
    count: int = int(rate * seconds)
    sent: dict[str, float] = {}
    found: list[float] = []
    mark = uuid.uuid4().hex[:6]
    began = time.perf_counter()

    def send() -> None:
        """On a thread of its own, asleep between two records: neither core is kept busy by measuring."""
        for i in range(count):
            time.sleep(max(0.0, began + i / rate - time.perf_counter()))
            identifier = f"{mark}-{i}"
            messages = [{"role": "user", "content": "hello"}]
            value = {"request_id": identifier, "session_id": f"s{i % 100}", "messages": messages}
            sent[identifier] = time.perf_counter()
            headers = [] if seen is None else [("asked", repr(time.time()).encode())]
            producer.send(requests, key=identifier.encode(), value=json.dumps(value).encode(), headers=headers)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    last = began
    while len(found) < count and time.perf_counter() - last < 20:
        for records in consumer.poll(timeout_ms=200).values():
            arrived = time.perf_counter()
            for record in records:
                start = sent.pop(json.loads(record.value)["request_id"], None)
                if start is not None:
                    found.append((arrived - start) * 1000)
                    if seen is not None:
                        seen(record, time.time())
                    last = arrived
    sender.join()
    consumer.close()
    producer.close()
    if len(found) < count:
        raise RuntimeError(f"{count - len(found)} of {count} requests were not answered")
    return found


def _warm_up(servers: str, topics: dict[str, str], level: str, seconds: float) -> None:
    """More load than is measured, then until latency falls no more.

    Java compiles what has run often, on the cores that everything else needs: that takes as many records,
    and seconds, as it takes.
    """
    asked, answered = topics["requests"], topics["responses"]
    latencies(servers, asked, answered, seconds, level, WARM_UP_RATE)
    before = float("inf")
    for _ in range(WARM_UP_ROUNDS if seconds == WARM_UP_S else 0):
        now = statistics.median(latencies(servers, asked, answered, 5.0, level))
        if now > 0.97 * before:
            return
        before = now


def measure(
    servers: str,
    folder: Path,
    *,
    pairs: int,
    seconds: float,
    warm_up_s: float,
    delivery: Any,
    interval_ms: int,
    rate: int = RATE,
) -> dict[str, Any]:
    """Alternating runs of the floor and of ours."""
    mark = uuid.uuid4().hex[:8]
    asked, answered = f"floor.requests.{mark}", f"floor.responses.{mark}"
    create_topics(servers, [asked, answered])
    floor = subprocess.Popen([sys.executable, "-c", FLOOR, servers, asked, answered])
    expected = rate if rate > RATE else None
    flink = FlinkSettings(delivery=delivery, checkpoint_interval_ms=interval_ms, expected_rate=expected)
    operator = OperatorSettings(remember_s=60)
    ours: list[list[float]] = []
    floors: list[list[float]] = []
    level = "read_committed" if delivery == "exactly_once" else "read_uncommitted"
    try:
        with pipeline.Pipeline(servers, folder, script=Script(), flink=flink, operator=operator) as running:
            producer = KafkaProducer(bootstrap_servers=servers)
            consumer = KafkaConsumer(running.topics["responses"], bootstrap_servers=servers, group_id=None)
            pipeline.warm_up(running, producer, consumer)
            topics = running.topics
            _warm_up(servers, topics, level, warm_up_s)
            for _ in range(pairs):
                floors.append(latencies(servers, asked, answered, seconds, "read_uncommitted", rate))
                ours.append(latencies(servers, topics["requests"], topics["responses"], seconds, level, rate))
    finally:
        floor.kill()
        floor.wait()
    middle = {
        f"{name}_{label}": statistics.median(quantile(run, share) for run in runs)
        for name, runs in (("floor", floors), ("ours", ours))
        for label, share in (("p50", 0.5), ("p99", 0.99))
    }
    ratios = {
        label: statistics.median(
            quantile(mine, share) / quantile(base, share) for mine, base in zip(ours, floors, strict=True)
        )
        for label, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {**middle, "p50_ratio": ratios["p50"], "p99_ratio": ratios["p99"]}


def table(servers: str, folder: Path, pairs: int, seconds: float, warm_up_s: float) -> dict[str, Any]:
    """Exactly once at every interval of `INTERVALS_MS`."""
    found: dict[str, Any] = {}
    for interval_ms in INTERVALS_MS:
        once = measure(
            servers, folder, pairs=pairs, seconds=seconds, warm_up_s=warm_up_s,
            delivery="exactly_once", interval_ms=interval_ms,
        )  # fmt: skip
        found[f"p50_ms_at_{interval_ms}"] = round(once["ours_p50"], 1)
        found[f"p99_ms_at_{interval_ms}"] = round(once["ours_p99"], 1)
    return found


def by_stage(servers: str, folder: Path, *, seconds: float, warm_up_s: float, rate: int) -> list[str]:
    """Ours at least once, and where each record's time went."""
    port = processes.free_port()
    properties = {"rest.port": str(port), "web.checkpoints.history": "1000"}
    flink = FlinkSettings(expected_rate=rate if rate > RATE else None, properties=properties)
    rows: list[dict[str, float]] = []

    def seen(record: Any, now: float) -> None:
        answer, (asked, taken, emitted) = json.loads(record.value), stages.stamps(record)
        sent = float(dict(record.headers)["asked"])
        rows.append(
            {"sent": sent, "asked": asked, "taken in": taken, "begun": answer["began"], "had": answer["had"]}
            | {"emitted": emitted, "appended": record.timestamp / 1000, "seen": now}
        )

    operator = OperatorSettings(remember_s=60)
    with pipeline.Pipeline(
        servers, folder, handler="StagedEcho", script=Script(), flink=flink, operator=operator
    ) as running:
        producer = KafkaProducer(bootstrap_servers=servers)
        consumer = KafkaConsumer(running.topics["responses"], bootstrap_servers=servers, group_id=None)
        pipeline.warm_up(running, producer, consumer)
        topics = running.topics
        _warm_up(servers, topics, "read_uncommitted", warm_up_s)
        latencies(servers, topics["requests"], topics["responses"], seconds, "read_uncommitted", rate, seen)
        return stages.told(rows, stages.Spans(running.folder, port))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short pairs: two at least once, one exactly once")
    parser.add_argument("--rate", type=int, default=RATE, help=f"requests a second, default {RATE}")
    parser.add_argument("--table", action="store_true", help="exactly once at each checkpoint interval, nothing else")
    parser.add_argument("--stages", action="store_true", help="where the time of ours goes, and nothing else")
    args = parser.parse_args()
    pairs, seconds, warm_up_s = (2, 2.0, 4.0) if args.quick else (5, 10.0, WARM_UP_S)
    if args.stages:
        with local_kafka(stages.BROKER) as (servers, folder):
            print(*by_stage(servers, folder, seconds=20.0, warm_up_s=warm_up_s, rate=args.rate), sep="\n")
        return
    with local_kafka() as (servers, folder):
        if args.table:
            print(json.dumps(table(servers, folder, pairs, seconds, warm_up_s)))
            return
        found = measure(
            servers, folder, pairs=pairs, seconds=seconds, warm_up_s=warm_up_s,
            delivery="at_least_once", interval_ms=1000, rate=args.rate,
        )  # fmt: skip
        pairs, seconds, warm_up_s = (1, 2.0, 2.0) if args.quick else (pairs, seconds, warm_up_s)
        once = measure(
            servers, folder, pairs=pairs, seconds=seconds, warm_up_s=warm_up_s,
            delivery="exactly_once", interval_ms=CHECKPOINT_MS, rate=args.rate,
        )  # fmt: skip
    result = {
        "p50_ratio": round(found["p50_ratio"], 2), "p99_ratio": round(found["p99_ratio"], 2),
        "p50_ms": round(found["ours_p50"], 1), "p99_ms": round(found["ours_p99"], 1),
        "floor_p50_ms": round(found["floor_p50"], 1), "floor_p99_ms": round(once["floor_p99"], 1),
        "exactly_once_p50_ms": round(once["ours_p50"], 1), "exactly_once_p99_ms": round(once["ours_p99"], 1),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
