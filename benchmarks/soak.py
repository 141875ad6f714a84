"""Does anything grow? The job under an even load, streamed replies, per-key state and results remembered for 60 s.

After five minutes of warm-up (a quarter of shorter runs) the medians of the first and the last three minutes
are compared, of whatever of these grew most: resident memory of Python workers and of the model host, Java's
heap after a collection, state in the last checkpoint, threads, open handles.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from kafka import KafkaConsumer, KafkaProducer

from benchmarks import pipeline
from benchmarks.pipeline import local_kafka
from flink_llm.call import OperatorSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.local import processes
from flink_llm.testing import Script

RATE, KEYS = 100, 1000
WARM_UP_S, WINDOW_S, EVERY_S = 300.0, 180.0, 10.0
HOST = "flink_llm.testing"


def sample(running: pipeline.Pipeline, port: int) -> dict[str, float]:
    """What is looked at, now."""
    found: dict[str, float] = {"workers_rss": 0, "host_rss": 0, "jvm_heap": 0, "threads": 0, "handles": 0}
    workers = running.workers()
    hosts = [process for process in psutil.process_iter() if _is_host(process, running.folder)]
    javas = [process for process in running.job().children(recursive=True) if process.name() == "java"]
    found["workers_rss"] = sum(process.memory_info().rss for process in workers)
    found["host_rss"] = sum(process.memory_info().rss for process in hosts)
    found["jvm_heap"] = sum(heap_after_collection(process.pid) for process in javas)
    for process in [*workers, *hosts, *javas]:
        found["threads"] += process.num_threads()
        found["handles"] += process.num_fds()
    completed = pipeline.rest(port, "/checkpoints")["latest"]["completed"]
    found["state"] = completed["state_size"] if completed else 0
    return found


def _is_host(process: psutil.Process, folder: Path) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return HOST in command and any(str(folder) in word for word in command)


def heap_after_collection(pid: int) -> float:
    """Bytes of a Java process's heap that a full collection leaves; needs a JDK's `jcmd`."""
    jcmd = shutil.which("jcmd")
    if jcmd is None:
        raise RuntimeError("soak needs jcmd, which a JDK has: install one, or put its bin folder on PATH")
    subprocess.run([jcmd, str(pid), "GC.run"], check=True, capture_output=True)
    told = subprocess.run([jcmd, str(pid), "GC.heap_info"], check=True, capture_output=True, text=True).stdout
    return used_kb(told) * 1024


def used_kb(told: str) -> float:
    """The kilobytes in use of the generations that `GC.heap_info` tells of; Metaspace has no total there."""
    lines = [line.split() for line in told.splitlines() if "total" in line and "used" in line]
    return sum(float(words[words.index("used") + 1].strip(",K")) for words in lines)


def growth(samples: list[tuple[float, dict[str, float]]], warm_up_s: float, window_s: float) -> dict[str, float]:
    """By name: how much more the last window's median is than the first's after the warm-up, as a share."""
    first, last = samples[0][0] + warm_up_s, samples[-1][0]
    early = [values for at, values in samples if first <= at <= first + window_s]
    late = [values for at, values in samples if at >= last - window_s]
    found = {}
    for name in samples[0][1]:
        before, after = (statistics.median(values[name] for values in part) for part in (early, late))
        found[name] = after / before - 1 if before else 0.0
    return found


def measure(servers: str, folder: Path, minutes: float) -> dict[str, Any]:
    """One run."""
    port = processes.free_port()
    flink = FlinkSettings(expected_rate=RATE, properties={"rest.port": str(port)})
    operator = OperatorSettings(remember_s=60)
    script = Script(text="{last}", tokens=5, first_ms=100, gap_ms=20)
    share = min(1.0, minutes / 20)
    stop = threading.Event()
    answered = 0
    with pipeline.Pipeline(
        servers, folder, handler="Counted", script=script, flink=flink, operator=operator
    ) as running:
        producer = KafkaProducer(bootstrap_servers=servers, linger_ms=5)
        consumer = KafkaConsumer(running.topics["responses"], bootstrap_servers=servers, group_id=None)
        pipeline.warm_up(running, producer, consumer)

        def send() -> None:
            began = time.monotonic()
            for i, (key, value) in enumerate(pipeline.requests(0, 10**9, KEYS)):
                if stop.is_set():
                    return
                producer.send(running.topics["requests"], key=key, value=value)
                time.sleep(max(0.0, began + i / RATE - time.monotonic()))

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        samples: list[tuple[float, dict[str, float]]] = []
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            until = min(end, time.monotonic() + EVERY_S * share)
            while time.monotonic() < until:
                answered += sum(len(records) for records in consumer.poll(timeout_ms=100).values())
            samples.append((time.monotonic(), sample(running, port)))
        stop.set()
        sender.join()
        producer.close()
        consumer.close()
    grown = growth(samples, WARM_UP_S * share, WINDOW_S * share)
    return {
        "growth": round(max(grown.values()), 4),
        "by": {name: round(value, 4) for name, value in grown.items()},
        "last": {name: int(value) for name, value in samples[-1][1].items()},
        "answered": answered,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="default 20; shorter runs shorten warm-up and windows"
    )
    args = parser.parse_args()
    with local_kafka() as (servers, folder):
        print(json.dumps(measure(servers, folder, args.minutes)))


if __name__ == "__main__":
    main()
