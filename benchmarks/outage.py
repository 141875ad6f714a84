"""What a part's outage costs: the model host killed, then the feature store gone, longer than any deadline.

Requests stream through a job that reads a feature and generates through the real host. The host is killed
with -9 and kept from starting again; later the feature store's file is away for as long. An outage is no
fault of a record: no failure records, no restart, every request answered once.
"""

import argparse
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from kafka import KafkaConsumer, KafkaProducer

from benchmarks import pipeline
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.local import demo_job, processes
from flink_llm.testing import Script

RATE = 20
CALM_S = 4.0
DRAIN_S = 90.0


def measure(servers: str, folder: Path, *, outage_s: float, deadline_s: float) -> dict[str, Any]:
    """One run; see the module."""
    features = demo_job.prepare(folder)
    store = Path(features.state or "") / "online_store.db"
    rest = processes.free_port()
    chosen = {
        "handler": "Grounded",
        "script": Script(text="{last}", tokens=2, first_ms=50, gap_ms=20),
        "flink": FlinkSettings(properties={"rest.port": str(rest)}),
        "operator": OperatorSettings(capacity=64, deadline=deadline_s),
        "features": features,
    }
    with pipeline.Pipeline(servers, folder, **chosen) as running:
        producer = KafkaProducer(bootstrap_servers=servers)
        consumer = KafkaConsumer(
            running.topics["responses"], running.topics["failures"], bootstrap_servers=servers,
            auto_offset_reset="earliest", group_id=None,
        )  # fmt: skip
        pipeline.warm_up(running, producer, consumer)
        count = int(RATE * (2 * outage_s + 4 * CALM_S))
        sender = threading.Thread(target=_send, args=(producer, running.topics["requests"], count), daemon=True)
        sender.start()
        during = []
        answered: Counter[str] = Counter()
        failures: Counter[str] = Counter()

        def follow(seconds: float) -> int:
            """Reads for so long; how many answers came."""
            before, until = sum(answered.values()), time.monotonic() + seconds
            while time.monotonic() < until:
                for records in consumer.poll(timeout_ms=100).values():
                    for record in records:
                        value = json.loads(record.value)
                        failures.update([value["code"]] if "code" in value else [])
                        answered[value["request_id"]] += 1
            return sum(answered.values()) - before

        for gone in (_host_gone(running.folder), _away(store)):
            follow(CALM_S)
            with gone:
                follow(1.0)  # what was said before it went is still on its way
                during.append(follow(outage_s - 1.0))
        sender.join()
        deadline = time.monotonic() + DRAIN_S
        while len(answered) < count and time.monotonic() < deadline:
            follow(0.5)
        follow(2.0)  # a duplicate may come late
        restarts = pipeline.restarts(rest)
        consumer.close()
        producer.close()
    return {
        "requests": count,
        "lost": count - len(answered),
        "duplicated": sum(times - 1 for times in answered.values()),
        "failures": sum(failures.values()),
        "restarts": restarts,
        "outages_s": [outage_s, outage_s],
        "answered_while_out": during,
    }


@contextmanager
def _away(file: Path) -> Iterator[None]:
    """The file is not where it was."""
    hidden = file.with_name(f"{file.name}.away")
    file.rename(hidden)
    try:
        yield
    finally:
        hidden.replace(file)


@contextmanager
def _host_gone(folder: Path) -> Iterator[None]:
    """The model host is killed, and its successors find no script to start from."""
    scripts = folder / "scripts.json"
    with _away(scripts):
        for process in psutil.process_iter(["cmdline"]):
            if str(scripts) in (process.info["cmdline"] or []):
                os.kill(process.pid, signal.SIGKILL)
        yield


def _send(producer: Any, topic: str, count: int) -> None:
    began = time.monotonic()
    for i, (key, value) in enumerate(pipeline.requests(0, count, 50)):
        producer.send(topic, key=key, value=value)
        time.sleep(max(0.0, began + i / RATE - time.monotonic()))
    producer.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="outages of 6 s under a deadline of 2 s, not 20 and 5")
    args = parser.parse_args()
    with pipeline.local_kafka() as (servers, folder):
        outage_s, deadline_s = (6.0, 2.0) if args.quick else (20.0, 5.0)
        found = measure(servers, folder, outage_s=outage_s, deadline_s=deadline_s)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
