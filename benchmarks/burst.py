"""Ten times the load for half a minute, with `shed: on`: who is taken, how soon others are refused, when it is over.

A scripted host completes 50 a second. It is offered 70 % of that, then ten times as much, then 70 % again.
Every record has a deadline, counted from Kafka's timestamp. A refusal is timed from that timestamp to when
its failure was made, which includes its way to the operator.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from msgspec import Struct

from benchmarks import pipeline
from benchmarks.pipeline import local_kafka, quantile
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.testing import Script

CAPACITY_PER_S, SHARE, TIMES = 50, 0.7, 10
DEADLINE_S = 2.0
REFUSED = "shed"
WINDOW_S = 1.0


class Seen(Struct, frozen=True):
    """One outcome: when its request was sent and it was received, in epoch seconds; a failure's code and time."""

    sent: float
    received: float
    code: str | None = None
    failed_at: float = 0.0


def offer(servers: str, topic: str, phases: list[tuple[float, float]], sent: dict[str, float]) -> None:
    """Sends at each phase's rate for its seconds, and notes when."""
    producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
    due = time.time()
    for rate, seconds in phases:
        for _ in range(int(rate * seconds)):
            time.sleep(max(0.0, due - time.time()))
            name = f"r{len(sent)}"
            value = {"request_id": name, "session_id": name, "messages": [{"role": "user", "content": "x"}]}
            sent[name] = time.time()
            producer.send(topic, value=json.dumps(value).encode(), timestamp_ms=int(sent[name] * 1000))
            due += 1 / rate
    producer.close()


def collect(consumer: Any, sent: dict[str, float], until: float) -> list[Seen]:
    """Outcomes until a time."""
    found = []
    while time.time() < until:
        for records in consumer.poll(timeout_ms=100).values():
            now = time.time()
            for record in records:
                value = json.loads(record.value)
                began = sent.get(value["request_id"])
                if began is not None:
                    found.append(Seen(began, now, value.get("code"), value.get("failed_at", 0) / 1000))
    return found


def judge(seen: list[Seen], began: float, ended: float) -> dict[str, Any]:
    """The figures of a burst from `began` to `ended`."""
    accepted = [one for one in seen if one.code != REFUSED]
    in_time = [one for one in accepted if one.code is None and one.received - one.sent <= DEADLINE_S]
    refusals = [(one.failed_at - one.sent) * 1000 for one in seen if one.code == REFUSED]
    answered = [one for one in accepted if one.code is None]
    usual = quantile([one.received - one.sent for one in answered if one.sent < began], 0.99)
    recovery, window = None, ended
    last = max(one.sent for one in seen)
    while window + WINDOW_S <= last and recovery is None:
        took = [one.received - one.sent for one in answered if window <= one.sent < window + WINDOW_S]
        if took and quantile(took, 0.99) <= 2 * usual:
            recovery = window - ended
        window += WINDOW_S / 4
    return {
        "accepted_in_deadline": round(len(in_time) / max(1, len(accepted)), 4),
        "refusal_p99_ms": round(quantile(refusals, 0.99), 1) if refusals else None,
        "recovery_s": None if recovery is None else round(recovery, 2),
        "p99_before_ms": round(usual * 1000, 1),
        "accepted": len(accepted),
        "refused": len(refusals),
        "others_failed": sorted({one.code for one in seen if one.code not in (None, REFUSED)}),
    }


def measure(servers: str, folder: Path, *, warm_up_s: float, calm_s: float, burst_s: float) -> dict[str, Any]:
    """One burst between two calms."""
    rate = SHARE * CAPACITY_PER_S
    flink = FlinkSettings(expected_rate=CAPACITY_PER_S)
    operator = OperatorSettings(deadline=DEADLINE_S, shed=True, remember_s=60)
    script = Script(first_ms=20, rate_per_s=CAPACITY_PER_S)
    with pipeline.Pipeline(servers, folder, script=script, flink=flink, operator=operator) as running:
        producer = KafkaProducer(bootstrap_servers=servers)
        topics = (running.topics["responses"], running.topics["failures"])
        consumer = KafkaConsumer(*topics, bootstrap_servers=servers, group_id=None)
        pipeline.warm_up(running, producer, consumer)
        producer.close()
        sent: dict[str, float] = {}
        phases = [(rate, warm_up_s + calm_s), (TIMES * rate, burst_s), (rate, calm_s)]
        start = time.time()
        sender = threading.Thread(target=offer, args=(servers, running.topics["requests"], phases, sent), daemon=True)
        sender.start()
        began = start + warm_up_s + calm_s
        seen = collect(consumer, sent, began + burst_s + calm_s + DEADLINE_S + 1)
        sender.join()
        consumer.close()
    counted = [one for one in seen if one.sent >= start + warm_up_s]
    return {**judge(counted, began, began + burst_s), "unanswered": len(sent) - len(seen)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a burst of 8 s, hardly warm")
    args = parser.parse_args()
    chosen = (4.0, 4.0, 8.0) if args.quick else (60.0, 20.0, 30.0)
    with local_kafka() as (servers, folder):
        warm_up_s, calm_s, burst_s = chosen
        print(json.dumps(measure(servers, folder, warm_up_s=warm_up_s, calm_s=calm_s, burst_s=burst_s)))


if __name__ == "__main__":
    main()
