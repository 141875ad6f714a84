"""The forms of the library beside each other: `apply` on a DataStream and on a Table, SQL, stock `AsyncFunction`.

All jobs are up at once, each from a topic to another of one broker, over one real host whose scripted model takes
`WORK_MS` on the average, exponentially distributed, with at most 256 records in flight. They take turns: records
at an even rate for the latency from send to answer, then many at once for the rate. Figures are medians over
the rounds. Every answer is compared with its question.
"""

import argparse
import json
import statistics
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from benchmarks import form_jobs
from benchmarks.machine import CORES, isa
from benchmarks.pipeline import local_kafka, quantile, scripted_host
from flink_llm.local.broker import create_topics
from flink_llm.services import ServiceSettings
from flink_llm.testing import Script

WORK_MS = 50.0
RATE = 50
PATIENCE_S = 60.0
START_S = 120.0


class Lane:
    """A form's two topics, from outside."""

    def __init__(self, servers: str, name: str, services: ServiceSettings) -> None:
        mark = uuid.uuid4().hex[:8]
        self.form = form_jobs.Form(
            name=name, servers=servers, asked=f"{name}.asked.{mark}", answered=f"{name}.answered.{mark}",
            services=services,
        )  # fmt: skip
        create_topics(servers, [self.form.asked, self.form.answered])
        self._producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
        self._consumer = KafkaConsumer(
            self.form.answered, bootstrap_servers=servers, group_id=None, auto_offset_reset="earliest"
        )
        self._sent: dict[str, float] = {}

    def send(self, count: int, rate: float | None = None) -> list[float]:
        """Sends so many, `rate` a second or all at once, and waits for all answers; each one's seconds.

        Raises RuntimeError for an answer that is not its question's, and where one is missing.
        """
        mark = uuid.uuid4().hex[:6]
        began = time.perf_counter()
        took: list[float] = []
        for number in range(count):
            wait = 0.0 if rate is None else began + number / rate - time.perf_counter()
            while wait > 0:
                took += self._receive(min(wait, 0.05))
                wait = began + number / (rate or 1) - time.perf_counter()
            identifier = f"{mark}-{number}"
            value = {"request_id": identifier, "session_id": f"s{number % 100}", "text": f"said {identifier}"}
            self._sent[identifier] = time.perf_counter()
            self._producer.send(self.form.asked, value=json.dumps(value).encode())
        deadline = time.perf_counter() + (START_S if count == 1 else PATIENCE_S)
        while len(took) < count:
            if time.perf_counter() > deadline:
                raise RuntimeError(f"{self.form.name}: {count - len(took)} of {count} were not answered")
            took += self._receive(0.2)
        return took

    def _receive(self, seconds: float) -> list[float]:
        found = []
        for records in self._consumer.poll(timeout_ms=int(seconds * 1000)).values():
            arrived = time.perf_counter()
            for record in records:
                answer = json.loads(record.value)
                identifier = answer["request_id"]
                if answer["text"] != f"said {identifier}":
                    raise RuntimeError(f"{self.form.name}: {identifier} was answered with {answer['text']!r}")
                sent = self._sent.pop(identifier, None)
                if sent is not None:
                    found.append(arrived - sent)
        return found

    def close(self) -> None:
        """Of what is outside only."""
        self._producer.close()
        self._consumer.close()


def run(lanes: list[Lane], *, rounds: int, seconds: float, burst: int) -> dict[str, dict[str, float]]:
    """The figures of each form."""
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for lane in lanes:
            figures = seen[lane.form.name]
            took = lane.send(int(RATE * seconds), RATE)
            figures["p50_ms"].append(quantile(took, 0.5) * 1000)
            figures["p99_ms"].append(quantile(took, 0.99) * 1000)
            began = time.perf_counter()
            lane.send(burst)
            figures["per_s"].append(burst / (time.perf_counter() - began))
    return {name: {key: statistics.median(them) for key, them in each.items()} for name, each in seen.items()}


def summary(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The last line."""
    rates = {name: figures["per_s"] for name, figures in found.items()}
    return {
        **{f"{name}_{key}": round(value, 1) for name, figures in found.items() for key, value in figures.items()},
        **{f"x_stock_{name}": round(rate / rates["stock"], 2) for name, rate in rates.items() if name != "stock"},
        "isa": isa(), "cores": CORES,
    }  # fmt: skip


def measure(servers: str, folder: Path, **sizes: Any) -> dict[str, Any]:
    """Starts all forms, warms them up, and lets them take turns."""
    host = scripted_host(folder, {form_jobs.MODEL: Script(first_ms=WORK_MS, delay="exponential")})
    services = ServiceSettings(models={form_jobs.MODEL: form_jobs.MODEL}, host=host)
    lanes = [Lane(servers, name, services) for name in form_jobs.FORMS]
    jobs = []
    try:
        jobs = [form_jobs.start(lane.form) for lane in lanes]
        for lane in lanes:
            lane.send(1)
        for lane in lanes:
            lane.send(sizes["burst"] // 2)
        return summary(run(lanes, **sizes))
    finally:
        for job in jobs:
            job.cancel().result()
        for lane in lanes:
            lane.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    args = parser.parse_args()
    sizes = (
        {"rounds": 1, "seconds": 2.0, "burst": 1000} if args.quick else {"rounds": 5, "seconds": 10.0, "burst": 10_000}
    )
    with local_kafka() as (servers, folder):
        print(json.dumps(measure(servers, folder, **sizes)))


if __name__ == "__main__":
    main()
