"""Is anything lost or doubled when the Python worker is killed? Exactly once, kill -9, counted.

Requests stream through the job and the real host while its worker is killed with -9. An independent
read_committed consumer then counts every id, and the handler's own count per key, kept in `ctx.state`,
must be the number of that key's results.
"""

import argparse
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from benchmarks import pipeline
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.testing import Script

RATE = 400
KEYS = 1000
DRAIN_S = 120.0
IN_FLIGHT = 100
"""A blow waits until so many calls are in flight."""


def measure(bootstrap_servers: str, folder: Path, count: int, kills: int, rate: int = RATE) -> dict[str, Any]:
    """One run; see the module."""
    chosen = {
        "handler": "Counted",
        "script": Script(text="{last}", tokens=3, first_ms=400, gap_ms=40),
        "flink": FlinkSettings(delivery="exactly_once", checkpoint_interval_ms=200, expected_rate=rate),
        "operator": OperatorSettings(capacity=512, deadline=120),
    }
    with pipeline.Pipeline(bootstrap_servers, folder, **chosen) as running:
        producer = KafkaProducer(bootstrap_servers=bootstrap_servers, linger_ms=0)
        consumer = KafkaConsumer(
            running.topics["responses"], running.topics["failures"], bootstrap_servers=bootstrap_servers,
            isolation_level="read_committed", auto_offset_reset="earliest", group_id=None,
        )  # fmt: skip
        pipeline.warm_up(running, producer, consumer)
        sender = threading.Thread(target=_send, args=(running, producer, count, rate), daemon=True)
        sender.start()
        seen: list[Any] = []
        in_flight: list[int] = []
        began = time.monotonic()
        blows = [began + (i + 1) * (count / rate) / (kills + 1) for i in range(kills)]
        last = time.monotonic()
        while time.monotonic() - last < DRAIN_S and len(_ids(seen)) < count:
            for records in consumer.poll(timeout_ms=100).values():
                seen += [(record.topic, json.loads(record.value)) for record in records]
                last = time.monotonic()
            if blows and time.monotonic() > blows[0] and (found := running.kill_worker(IN_FLIGHT)):
                blows.pop(0)
                in_flight.append(found)
        time.sleep(3)  # a duplicate may come late
        for records in consumer.poll(timeout_ms=1000, max_records=100_000).values():
            seen += [(record.topic, json.loads(record.value)) for record in records]
        consumer.close()
        producer.close()
    return _judge(running, seen, count, in_flight)


def _send(running: pipeline.Pipeline, producer: Any, count: int, rate: int) -> None:
    began = time.monotonic()
    for i, (key, value) in enumerate(pipeline.requests(0, count, KEYS)):
        producer.send(running.topics["requests"], key=key, value=value)
        time.sleep(max(0.0, began + i / rate - time.monotonic()))
    producer.flush()


def _ids(seen: list[Any]) -> Counter[str]:
    return Counter(value["request_id"] for _, value in seen if value["request_id"] != "warm-up")


def _judge(running: pipeline.Pipeline, seen: list[Any], count: int, in_flight: list[int]) -> dict[str, Any]:
    answered = _ids(seen)
    results = [value for topic, value in seen if topic == running.topics["responses"]]
    counts: dict[str, int] = {}
    for value in results:
        counts[value["session_id"]] = max(counts.get(value["session_id"], 0), value["count"])
    per_key = Counter(value["session_id"] for value in results)
    return {
        "requests": count,
        "lost": count - len(answered),
        "duplicated": sum(times - 1 for times in answered.values()),
        "failures": sum(topic == running.topics["failures"] for topic, _ in seen),
        "not_stop": sum(value["finish_reason"] != "stop" for value in results),
        "kills": len(in_flight),
        "in_flight_at_kill_min": min(in_flight, default=0),
        "state_errors": sum(per_key[key] != counts[key] for key in per_key),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4,000 requests and one kill")
    args = parser.parse_args()
    with pipeline.local_kafka() as (servers, folder):
        count, kills = (4_000, 1) if args.quick else (20_000, 3)
        print(json.dumps(measure(servers, folder, count, kills)))


if __name__ == "__main__":
    main()
