"""What a call of 30 s and one that never returns do to the calls of 200 ms around them: Kafka to Kafka, 50 a second.

Both ask the real host, whose scripts are as slow. `others_p99_ratio` is the p99 of the others with the two
in flight over their p99 without.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from benchmarks import overhead, pipeline
from benchmarks.pipeline import local_kafka, quantile
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.testing import Script

RATE, CALL_MS, SLOW_MS = 50, 200, 30_000
MORE = {"slow": Script(first_ms=SLOW_MS), "never": Script(fault="hang")}


def measure(servers: str, folder: Path, *, seconds: float, warm_up_s: float) -> dict[str, Any]:
    """First without the two, then with them. `seconds` must be less than the slow one takes."""
    flink, operator = FlinkSettings(expected_rate=RATE), OperatorSettings(deadline=600, remember_s=60)
    script = Script(first_ms=CALL_MS)
    with pipeline.Pipeline(
        servers, folder, handler="Straggling", script=script, more=MORE, flink=flink, operator=operator
    ) as running:
        asked, answered = running.topics["requests"], running.topics["responses"]
        producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
        consumer = KafkaConsumer(answered, bootstrap_servers=servers, group_id=None)
        pipeline.warm_up(running, producer, consumer)
        consumer.close()

        def others() -> list[float]:
            return overhead.latencies(servers, asked, answered, seconds, "read_uncommitted", RATE)

        overhead.latencies(servers, asked, answered, warm_up_s, "read_uncommitted", 4 * RATE)
        without = others()
        for name in MORE:
            value = {"request_id": name, "session_id": name, "messages": [{"role": "user", "content": name}]}
            producer.send(asked, value=json.dumps(value).encode())
        producer.close()
        beside = others()
    return {
        "others_p99_ratio": round(quantile(beside, 0.99) / quantile(without, 0.99), 2),
        "p99_ms": round(quantile(beside, 0.99), 1),
        "p99_without_ms": round(quantile(without, 0.99), 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 s of each, hardly warm")
    args = parser.parse_args()
    seconds, warm_up_s = (5.0, 4.0) if args.quick else (25.0, 60.0)
    with local_kafka() as (servers, folder):
        print(json.dumps(measure(servers, folder, seconds=seconds, warm_up_s=warm_up_s)))


if __name__ == "__main__":
    main()
