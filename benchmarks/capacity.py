"""What a full operator does to latency, checkpoints and streams.

Two runs, both offered more than they can take. Fast: 256 places full of 200 ms calls over 16 shards; how
long after a call's end a consumer sees its result (Kafka's way included), how long checkpoints take, and
the share of the ideal rate. Slow: a host that completes 20 streamed replies a second; how much later than
the host said them tokens follow each other, and how long checkpoints take.
"""

import argparse
import itertools
import json
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from benchmarks import pipeline
from benchmarks.pipeline import quantile
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.local import processes
from flink_llm.local.broker import Broker
from flink_llm.testing import Script

CAPACITY, CALL_MS = 256, 200
SLOW_RATE, TOKENS, GAP_MS = 20, 10, 100


def observe(servers: str, folder: Path, script: Script, offered: float, seconds: float, rate: float) -> dict[str, Any]:
    """Runs the job under load: results and tokens with their times of arrival, and checkpoint durations."""
    port = processes.free_port()
    flink = FlinkSettings(checkpoint_interval_ms=500, expected_rate=rate, properties={"rest.port": str(port)})
    operator = OperatorSettings(capacity=CAPACITY, deadline=600, remember_s=0)
    with pipeline.Pipeline(servers, folder, handler="Timed", script=script, flink=flink, operator=operator) as running:
        producer = KafkaProducer(bootstrap_servers=servers, linger_ms=20)  # the load is not what is measured
        topics = running.topics
        consumer = KafkaConsumer(
            topics["responses"],
            topics["tokens"],
            bootstrap_servers=servers,
            group_id=None,
            auto_offset_reset="earliest",
        )
        pipeline.warm_up(running, producer, consumer)
        stop = threading.Event()
        sender = threading.Thread(target=_offer, args=(producer, topics["requests"], offered, stop), daemon=True)
        sender.start()
        results: list[tuple[float, bytes]] = []
        tokens: list[tuple[float, bytes]] = []
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            for partition, records in consumer.poll(timeout_ms=200).items():
                now = time.time()
                into = results if partition.topic == topics["responses"] else tokens
                into += [(now, record.value) for record in records]
        summary = pipeline.rest(port, "/checkpoints")["summary"]["end_to_end_duration"]
        stop.set()
        sender.join()
        consumer.close()
        producer.close()
    read = {
        name: [(at, json.loads(value)) for at, value in seen]
        for name, seen in (("results", results), ("tokens", tokens))
    }
    return {**read, "checkpoint_p99_ms": float(summary["p99"])}


def _offer(producer: Any, topic: str, rate: float, stop: threading.Event) -> None:
    began = time.monotonic()
    for i, (key, value) in enumerate(pipeline.requests(0, 10_000_000, 1000)):
        if stop.wait(max(0.0, began + i / rate - time.monotonic())):
            return
        producer.send(topic, key=key, value=value)


def fast(servers: str, folder: Path, seconds: float) -> dict[str, Any]:
    """The full operator."""
    ideal = CAPACITY / (CALL_MS / 1000)
    seen = observe(servers, folder, Script(first_ms=CALL_MS), 1.3 * ideal, seconds, ideal)
    half = [item for item in seen["results"] if item[0] > seen["results"][-1][0] - seconds / 2]
    late = [(arrived - value["completed"]) * 1000 for arrived, value in half if "completed" in value]
    span = half[-1][0] - half[0][0]
    return {
        "completion_to_emit_p50_ms": round(quantile(late, 0.5), 1),
        "completion_to_emit_p99_ms": round(quantile(late, 0.99), 1),
        "checkpoint_p99_ms": seen["checkpoint_p99_ms"],
        "of_ideal": round(len(half) / span / ideal, 3),
    }


def slow(servers: str, folder: Path, seconds: float) -> dict[str, Any]:
    """The slow host."""
    script = Script(text="x" * TOKENS, tokens=TOKENS, first_ms=50, gap_ms=GAP_MS, rate_per_s=SLOW_RATE)
    seen = observe(servers, folder, script, 2 * SLOW_RATE, seconds, SLOW_RATE)
    arrivals: dict[str, list[float]] = defaultdict(list)
    for arrived, token in seen["tokens"]:
        arrivals[token["generation_id"]].append(arrived)
    added = [
        (later - earlier) * 1000 - GAP_MS for times in arrivals.values() for earlier, later in itertools.pairwise(times)
    ]
    return {
        "token_gap_p99_ms": round(quantile(added, 0.99), 1),
        "slow_checkpoint_p99_ms": seen["checkpoint_p99_ms"],
        "slow_tokens": len(seen["tokens"]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 s of each instead of 40")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flink-llm-") as folder:
        broker = Broker(Path(folder))
        broker.up([])
        try:
            seconds = 10.0 if args.quick else 40.0
            found = fast(broker.bootstrap_servers, Path(folder), seconds)
            print(json.dumps({**found, **slow(broker.bootstrap_servers, Path(folder), seconds)}))
        finally:
            broker.wipe()


if __name__ == "__main__":
    main()
