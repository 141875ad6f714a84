"""What a full operator does to latency, checkpoints and streams.

Two runs, both with more waiting in Kafka than they can take. Fast: 256 places full of 200 ms calls over 16 shards; how
long after a call's end a consumer sees its result (Kafka's way included), how long checkpoints take, and
the share of the ideal rate. Slow: a host that completes 20 streamed replies a second; how much later than
the host said them tokens follow each other, and how long checkpoints take.
"""

import argparse
import gc
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from benchmarks import pipeline
from benchmarks.pipeline import local_kafka, quantile
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.local import processes
from flink_llm.testing import Script

CAPACITY, CALL_MS = 256, 200
SLOW_RATE, TOKENS, GAP_MS = 20, 10, 100
OFFERED = 1.3
"""Requests in Kafka, as a multiple of what can be answered meanwhile."""


def observe(
    servers: str, folder: Path, handler: str, script: Script, seconds: float, warm_up_s: float, rate: float
) -> dict[str, Any]:
    """Runs the job under load: results and tokens with their times of arrival, and checkpoint durations.

    All requests are in Kafka before the first is read: a load generator beside the job would be measured too.
    """
    port = processes.free_port()
    properties = {"rest.port": str(port), "web.checkpoints.history": "1000"}
    flink = FlinkSettings(expected_rate=rate, properties=properties)
    operator = OperatorSettings(capacity=CAPACITY, deadline=600, remember_s=0)
    with pipeline.Pipeline(servers, folder, handler=handler, script=script, flink=flink, operator=operator) as running:
        producer = KafkaProducer(bootstrap_servers=servers, linger_ms=20)
        topics = running.topics
        consumer = KafkaConsumer(
            topics["responses"],
            topics["tokens"],
            bootstrap_servers=servers,
            group_id=None,
            auto_offset_reset="earliest",
        )
        pipeline.warm_up(running, producer, consumer)
        for key, value in pipeline.requests(0, int(OFFERED * rate * (warm_up_s + seconds)), 1000):
            producer.send(topics["requests"], key=key, value=value)
        producer.flush()
        producer.close()
        seen: list[tuple[float, str, bytes]] = []
        began = time.time() + warm_up_s
        gc.disable()  # a collection over all that was seen would be measured as the job's latency
        while time.time() < began + seconds:
            for partition, records in consumer.poll(timeout_ms=200).items():
                now = time.time()
                if now >= began:
                    seen += [(now, partition.topic, record.value) for record in records]
        gc.enable()
        history = pipeline.rest(port, "/checkpoints")["history"]
        consumer.close()
    found: dict[str, list[Any]] = {topics["responses"]: [], topics["tokens"]: []}
    for at, topic, value in seen:
        found[topic].append((at, json.loads(value)))
    durations = [one["end_to_end_duration"] for one in history if one["trigger_timestamp"] / 1000 >= began]
    return {
        "results": found[topics["responses"]],
        "tokens": found[topics["tokens"]],
        "checkpoint_p99_ms": float(quantile(durations, 0.99)),
    }


def fast(servers: str, folder: Path, seconds: float, warm_up_s: float) -> dict[str, Any]:
    """The full operator."""
    ideal = CAPACITY / (CALL_MS / 1000)
    seen = observe(servers, folder, "Timed", Script(first_ms=CALL_MS), seconds, warm_up_s, ideal)
    late = [(arrived - value["completed"]) * 1000 for arrived, value in seen["results"] if "completed" in value]
    span = seen["results"][-1][0] - seen["results"][0][0]
    return {
        "completion_to_emit_p50_ms": round(quantile(late, 0.5), 1),
        "completion_to_emit_p99_ms": round(quantile(late, 0.99), 1),
        "checkpoint_p99_ms": seen["checkpoint_p99_ms"],
        "of_ideal": round(len(late) / span / ideal, 3),
    }


def slow(servers: str, folder: Path, seconds: float, warm_up_s: float) -> dict[str, Any]:
    """The slow host."""
    script = Script(text="x" * TOKENS, tokens=TOKENS, first_ms=50, gap_ms=GAP_MS, rate_per_s=SLOW_RATE)
    seen = observe(servers, folder, "Streamed", script, seconds, warm_up_s, SLOW_RATE)
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
    parser.add_argument("--quick", action="store_true", help="5 s of each instead of 40, hardly warm")
    args = parser.parse_args()
    with local_kafka() as (servers, folder):
        seconds, warm_up_s = (5.0, 4.0) if args.quick else (40.0, 100.0)
        found = fast(servers, folder, seconds, warm_up_s)
        print(json.dumps({**found, **slow(servers, folder, seconds, warm_up_s)}))


if __name__ == "__main__":
    main()
