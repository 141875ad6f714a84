"""From the engine's token to a Kafka consumer: at least once, parallelism 1, 500 tokens a second.

The scripted host writes into each token when it said it. The floor is a bare client of a host with the same
script, in a process of its own, that hands each token to a kafka-python producer (acks=all, linger 0). Both
stream 25 replies a second of 20 tokens, 100 ms apart, and alternate; figures are medians over the pairs.
"""

import argparse
import asyncio
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
from flink_llm.engine.client import open_engine
from flink_llm.engine.generation import Model
from flink_llm.flink_settings import FlinkSettings
from flink_llm.local import processes
from flink_llm.local.broker import create_topics
from flink_llm.testing import Script

REPLIES_PER_S, TOKENS, GAP_MS = 25, 20, 100
SCRIPT = Script(text="{now}" * TOKENS, tokens=TOKENS, first_ms=50, gap_ms=GAP_MS)
SETTLE_S = TOKENS * GAP_MS / 1000
"""Until as many replies stream as will."""
TAIL_S = 1.0


async def floor(servers: str, topic: str, folder: Path) -> None:
    """Replies for each line on stdin, all at once; ends with it."""
    producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
    engine = open_engine(pipeline.scripted_host(folder, {"scripted": SCRIPT}))
    model = Model(engine, "scripted", "scripted")
    await model.load()

    async def stream(line: str) -> None:
        async for token in model.chat([{"role": "user", "content": line}]):
            producer.send(topic, value=json.dumps({"text": token.text}).encode())

    loop, running = asyncio.get_running_loop(), set()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        running.add(task := loop.create_task(stream(line)))
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    producer.close()
    await engine.close()


def request() -> bytes:
    """One of a session of its own."""
    mark = uuid.uuid4().hex
    value = {"request_id": mark, "session_id": mark, "messages": [{"role": "user", "content": "x"}]}
    return json.dumps(value).encode()


def delays(servers: str, topic: str, ask: Any, seconds: float, seen: stages.Seen | None = None) -> list[float]:
    """Milliseconds from the host's token to its consumer, at full rate for `seconds`. `ask` asks for a reply.

    `seen` is told each token's record.
    """
    consumer = KafkaConsumer(topic, bootstrap_servers=servers, group_id=None, auto_offset_reset="latest")
    while not consumer.assignment():
        consumer.poll(timeout_ms=50)
    for partition in consumer.assignment():
        consumer.position(partition)
    began = time.time()
    whole = SETTLE_S + seconds + TAIL_S

    def send() -> None:
        for i in range(int(REPLIES_PER_S * whole)):
            time.sleep(max(0.0, began + i / REPLIES_PER_S - time.time()))
            ask()

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    found: list[float] = []
    while time.time() < began + whole:
        for records in consumer.poll(timeout_ms=200).values():
            now = time.time()
            for record in records:
                said = float(json.loads(record.value)["text"])
                if began + SETTLE_S <= said < began + SETTLE_S + seconds:
                    found.append((now - said) * 1000)
                    if seen is not None:
                        seen(record, now)
    sender.join()
    consumer.close()
    if len(found) < 0.8 * REPLIES_PER_S * TOKENS * seconds:
        raise RuntimeError(f"{len(found)} tokens came within {seconds} s: the rate was not reached")
    return found


def measure(servers: str, folder: Path, *, pairs: int, seconds: float, warm_up_s: float) -> dict[str, Any]:
    """Pairs of the floor and of ours, in turns."""
    flink, operator = FlinkSettings(), OperatorSettings(capacity=256, deadline=120)
    topic = f"floor.tokens.{uuid.uuid4().hex[:8]}"
    create_topics(servers, [topic])
    own = folder / "floor"
    own.mkdir()
    command = [sys.executable, "-m", "benchmarks.streaming", "--floor", servers, topic, str(own)]
    root = Path(__file__).parents[1]
    bare = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=root)
    runs: dict[str, list[list[float]]] = {"floor": [], "ours": []}
    try:
        with pipeline.Pipeline(
            servers, folder, handler="Streamed", script=SCRIPT, flink=flink, operator=operator
        ) as running:
            producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
            consumer = KafkaConsumer(running.topics["responses"], bootstrap_servers=servers, group_id=None)
            pipeline.warm_up(running, producer, consumer)
            consumer.close()

            def ours() -> None:
                producer.send(running.topics["requests"], value=request())

            def floors() -> None:
                print("x", file=bare.stdin, flush=True)

            delays(servers, running.topics["tokens"], ours, warm_up_s)
            delays(servers, topic, floors, min(warm_up_s, 5.0))
            for _ in range(pairs):
                runs["floor"].append(delays(servers, topic, floors, seconds))
                runs["ours"].append(delays(servers, running.topics["tokens"], ours, seconds))
            producer.close()
    finally:
        bare.kill()
        bare.wait()
    return {
        f"{prefix}{label}_ms": round(statistics.median(quantile(run, share) for run in runs[name]), 1)
        for name, prefix in (("ours", ""), ("floor", "floor_"))
        for label, share in (("p50", 0.5), ("p99", 0.99))
    }


def by_stage(servers: str, folder: Path, *, seconds: float, warm_up_s: float) -> list[str]:
    """Ours once, and where each token's time went."""
    port = processes.free_port()
    flink = FlinkSettings(properties={"rest.port": str(port), "web.checkpoints.history": "1000"})
    operator = OperatorSettings(capacity=256, deadline=120)
    rows: list[dict[str, float]] = []

    def seen(record: Any, now: float) -> None:
        token, (_, _, emitted) = json.loads(record.value), stages.stamps(record)
        rows.append({"said": float(token["text"]), "had": token["had"], "emitted": emitted}
                    | {"appended": record.timestamp / 1000, "seen": now})  # fmt: skip

    with pipeline.Pipeline(
        servers, folder, handler="StagedStream", script=SCRIPT, flink=flink, operator=operator
    ) as running:
        producer = KafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=0)
        consumer = KafkaConsumer(running.topics["responses"], bootstrap_servers=servers, group_id=None)
        pipeline.warm_up(running, producer, consumer)
        consumer.close()

        def ask() -> None:
            producer.send(running.topics["requests"], value=request())

        delays(servers, running.topics["tokens"], ask, warm_up_s)
        delays(servers, running.topics["tokens"], ask, seconds, seen)
        producer.close()
        return stages.told(rows, stages.Spans(running.folder, port))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of 3 s, hardly warm")
    parser.add_argument("--stages", action="store_true", help="where the time of ours goes, and nothing else")
    parser.add_argument("--floor", nargs=3, metavar=("SERVERS", "TOPIC", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.floor:
        asyncio.run(floor(args.floor[0], args.floor[1], Path(args.floor[2])))
        return
    pairs, seconds, warm_up_s = (1, 3.0, 3.0) if args.quick else (5, 10.0, 60.0)
    if args.stages:
        with local_kafka(stages.BROKER) as (servers, folder):
            print(*by_stage(servers, folder, seconds=2 * seconds, warm_up_s=warm_up_s), sep="\n")
        return
    with local_kafka() as (servers, folder):
        print(json.dumps(measure(servers, folder, pairs=pairs, seconds=seconds, warm_up_s=warm_up_s)))


if __name__ == "__main__":
    main()
