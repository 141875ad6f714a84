"""The demo and the first look: the real job over a real broker, real features and the shipped model."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from flink_llm.errors import LocalError
from flink_llm.feature_settings import FeatureSettings
from flink_llm.local import demo_data, processes
from flink_llm.local.broker import Broker

CONFIG = "llm_inference.yaml"
START_S = 180.0
ANSWER_S = 120.0
LINGER_S = 3.0
"""The model host leaves soon after the demo; a job's own default lets it wait for a restart."""
QUESTIONS = (
    "Where is order {order}?",
    "When will order {order} arrive?",
    "What is the status of order {order}?",
    "How do I return order {order}?",
    "What can you recommend?",
    "Which loyalty tier am I in?",
    "Where is my order 999999?",
)


def shipped(name: str) -> Path:
    """A folder that comes with the library: `models`, `feature_repo`, `jobs`. Raises LocalError."""
    package = Path(__file__).parents[1]
    folders = [package / "shipped" / name, package / name]
    if (package.parent / "pyproject.toml").exists():  # a clone; in site-packages it would be anybody's
        folders.append(package.parent / name)
    for folder in folders:
        if folder.is_dir():
            return folder
    raise LocalError(f"this installation has no {name}/ folder: use a clone of the repository")


def demo_model() -> Path:
    """The demo model's folder. Raises LocalError with the command that makes it."""
    folder = shipped("models") / "support-chat"
    if not (folder / "manifest.json").exists():
        raise LocalError(f"{folder} holds no model yet: `make train-demo` trains it, about an hour on two cores")
    return folder


def prepare(state: Path) -> FeatureSettings:
    """Applies and fills the demo's feature repository below `state`, once."""
    settings = FeatureSettings(repo=str(shipped("feature_repo")), state=str(state / "features"))
    done = state / "features" / ".filled"
    if not done.exists() or time.time() - done.stat().st_mtime > 86_400:  # dates lie around today
        from flink_llm.feature_admin import apply_repo, fill_demo  # Feast is slow to import

        apply_repo(settings)
        fill_demo(settings)
        done.touch()
    return settings


def configuration(state: Path, **changes: Any) -> dict[str, Any]:
    """The main job's configuration for this machine, as plain values."""
    raw: dict[str, Any] = yaml.safe_load((shipped("jobs") / CONFIG).read_text())
    raw["models"] = changes.pop("models", None) or {"support-chat": str(demo_model())}
    raw["features"] = {"repo": str(shipped("feature_repo")), "state": str(state / "features")}
    raw.pop("kafka")
    raw["host"] = {"linger_s": LINGER_S}
    return {**raw, **changes}


def forget(state: Path) -> None:
    """Deletes the demo's features below `state`. Raises OSError."""
    if (state / "features").exists():
        shutil.rmtree(state / "features")


def ask(question: str, user: str, state: Path) -> None:
    """Runs the main job over one request in a file, and prints the reply."""
    console = Console(stderr=True)
    demo_model()
    with console.status("preparing features ..."):
        prepare(state)
    with tempfile.TemporaryDirectory(prefix="flink-llm-try-") as folder:
        requests, outcomes = Path(folder) / "requests.jsonl", Path(folder) / "outcomes"
        requests.write_text(json.dumps(_request(question, user, "try")) + "\n")
        raw = configuration(state, files={"requests": str(requests), "outcomes": str(outcomes)})
        config = Path(folder) / "try.yaml"
        config.write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "flink_llm", "run", str(config)]
        with console.status("running the job on a mini-cluster ..."):
            ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if ran.returncode:
            words = [line for line in ran.stderr.splitlines() if line.strip()]
            raise LocalError(f"the job failed: {words[-1] if words else 'no reason given'}")
        _show(outcomes)


def _show(outcomes: Path) -> None:
    console = Console()
    for file in sorted(outcomes.rglob("*")):
        if not file.is_file():
            continue
        for line in file.read_text().splitlines():
            outcome = json.loads(line)
            if "code" in outcome:
                raise LocalError(f"{outcome['code']}: {outcome['message']}")
            if "finish_reason" in outcome:
                console.print(outcome["text"])


def _request(question: str, user: str, session: str) -> dict[str, Any]:
    return {
        "request_id": uuid.uuid4().hex,
        "session_id": session,
        "user_id": user,
        "messages": [{"role": "user", "content": question}],
    }


class Demo:
    """Broker, features, job, sample events, a table, and then questions. Leaves no process behind."""

    def __init__(self, state: Path, events: int) -> None:
        self._state = state
        self._events = events
        self._console = Console()
        self._broker = Broker(state)
        self._broker_was_up = False
        self._job_file = state / "demo.json"
        self._log = state / "demo.log"
        self._sent: dict[str, float] = {}
        self._clients: list[Any] = []

    def run(self) -> bool:
        """The whole demo; whether every sample event got a reply.

        Raises LocalError. Ctrl-C, SIGTERM and SIGHUP end it as they do any command, but at the prompt
        Ctrl-C is the end like any other; nothing cuts the clean-up.
        """
        demo_model()
        self._state.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._state / "demo.lock", timeout=0):
                self._stop_job()  # of a demo that was killed
                self._broker_was_up = self._broker.process is not None
                with processes.cleaned_up(self._clean_up):
                    return self._play()
        except Timeout as error:
            raise LocalError(f"a demo runs in {self._state} already: give another folder with --state") from error

    def _play(self) -> bool:
        self._start()
        good = self._sample()
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(EOFError, KeyboardInterrupt):
                self._converse()
        return good

    def _clean_up(self) -> None:
        with contextlib.ExitStack() as stack:  # the last one first, and each whatever the others raise
            if not self._broker_was_up:
                stack.callback(self._broker.down)
            for client in self._clients:
                stack.callback(client.close)
            stack.callback(self._stop_job)
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._console.print("\nstopping ...")

    def _stop_job(self) -> None:
        job = processes.recall(self._job_file)
        if job is not None:
            processes.stop(job)
        self._job_file.unlink(missing_ok=True)

    def _start(self) -> None:
        with self._console.status("starting a Kafka broker ..."):
            self._broker.up()
        self._console.print(f"Kafka broker at {self._broker.bootstrap_servers}")
        with self._console.status("filling the feature store ..."):
            prepare(self._state)
        self._console.print(f"features of {demo_data.CUSTOMERS} customers and {demo_data.ORDERS} orders in Feast")
        kafka = {"bootstrap_servers": self._broker.bootstrap_servers, "group": f"demo-{uuid.uuid4().hex[:8]}"}
        config = self._state / "demo.yaml"
        config.write_text(yaml.safe_dump(configuration(self._state, kafka=kafka, name="demo")))
        self._follow()
        command = [sys.executable, "-m", "flink_llm", "run", str(config)]
        self._log.unlink(missing_ok=True)
        processes.start(command, self._log, {**os.environ, "PYTHONUNBUFFERED": "1"}, file=self._job_file)
        with self._console.status("starting the Flink job on a mini-cluster ..."):
            self._warm_up()
        self._console.print(f"the job runs (log: {self._log})\n")

    def _follow(self) -> None:
        from kafka import KafkaConsumer, KafkaProducer  # slow to import

        address = self._broker.bootstrap_servers
        self._producer = KafkaProducer(bootstrap_servers=address, linger_ms=0)
        self._consumer = KafkaConsumer(
            "chat.responses",
            "chat.tokens",
            "chat.failures",
            bootstrap_servers=address,
            auto_offset_reset="latest",
            group_id=None,
        )
        self._clients = [self._consumer, self._producer]
        deadline = time.monotonic() + 30
        while len(self._consumer.assignment()) < 3 and time.monotonic() < deadline:
            self._consumer.poll(timeout_ms=100)
        for partition in self._consumer.assignment():
            self._consumer.position(partition)

    def _send(self, question: str, user: str, session: str) -> str:
        request = _request(question, user, session)
        identifier: str = request["request_id"]
        self._sent[identifier] = time.monotonic()
        self._producer.send("chat.requests", key=session.encode(), value=json.dumps(request).encode())
        return identifier

    def _outcomes(self, patience: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """What arrives: topic and value, until nothing came for `patience` seconds."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self._check_job()
            for records in self._consumer.poll(timeout_ms=100).values():
                for record in records:
                    deadline = time.monotonic() + patience
                    yield record.topic, json.loads(record.value)

    def _check_job(self) -> None:
        if processes.recall(self._job_file) is None:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise LocalError(f"the job ended: {lines[-1] if lines else 'no output'} (log: {self._log})")

    def _warm_up(self) -> None:
        wanted = self._send("hello", "user-1", "warm-up")
        for topic, value in self._outcomes(START_S):
            if topic != "chat.tokens" and value["request_id"] == wanted:
                return
        raise LocalError(f"the job gave no answer within {START_S:.0f} s (log: {self._log})")

    def _sample(self) -> bool:
        """Sends the sample events and reports; whether each got a reply."""
        orders = [row["order_id"] for row in demo_data.orders()]
        questions = itertools.cycle(QUESTIONS)
        began = time.monotonic()
        for i in range(self._events):
            question = next(questions).format(order=orders[i % len(orders)])
            self._send(question, f"user-{1 + i % demo_data.CUSTOMERS}", f"session-{i % 40}")
        self._producer.flush()
        first: dict[str, float] = {}
        latency: list[float] = []
        responses: list[dict[str, Any]] = []
        failures = 0
        shown = 0
        for topic, value in self._outcomes(ANSWER_S):
            now, identifier = time.monotonic(), value["request_id"]
            if identifier not in self._sent:
                continue
            if topic == "chat.tokens":
                first.setdefault(identifier, now - self._sent[identifier])
                continue
            latency.append(now - self._sent[identifier])
            failures += topic == "chat.failures"
            if topic == "chat.responses":
                responses.append(value)
                if shown < 12 or len(latency) % 25 == 0:
                    self._console.print(f"[dim]{len(latency):4}[/]  {value['text']}", highlight=False)
                    shown += 1
            if len(latency) == self._events:
                break
        self._report(latency, list(first.values()), responses, failures, time.monotonic() - began)
        return len(responses) == self._events

    def _report(
        self,
        latency: list[float],
        first: list[float],
        responses: list[dict[str, Any]],
        failures: int,
        seconds: float,
    ) -> None:
        tokens = sum(response["usage"]["completion_tokens"] for response in responses)
        each = [response["timings"]["per_token_ms"] for response in responses] or [0.0]
        rows = {
            "answered": f"{len(responses)} of {self._events}",
            "failures": str(failures),
            "throughput": f"{len(responses) / seconds:.0f} replies/s, {tokens / seconds:.0f} tokens/s",
            "to the first token, p50": f"{_quantile(first, 0.5) * 1000:.0f} ms",
            "per further token, p50": f"{_quantile(each, 0.5):.1f} ms",
            "end to end, p50 / p99": f"{_quantile(latency, 0.5) * 1000:.0f} / {_quantile(latency, 0.99) * 1000:.0f} ms",
        }
        table = Table(title=f"{self._events} events at once, Kafka to Kafka", show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        self._console.print(table)

    def _converse(self) -> None:
        self._console.print("Ask about an order, for example 1042. An empty line ends.")
        session = uuid.uuid4().hex
        while question := self._console.input("[bold]> [/]").strip():
            wanted = self._send(question, "user-1", session)
            self._producer.flush()
            streamed = ""
            for topic, value in self._outcomes(60):
                if value["request_id"] != wanted:
                    continue
                if topic == "chat.tokens":
                    streamed += value["text"]
                    self._console.print(value["text"], end="", highlight=False, markup=False)
                    continue
                if topic == "chat.failures":
                    rest = f"{value['code']}: {value['message']}"
                else:  # the reply may overtake its last tokens, which are another topic
                    whole = value["text"]
                    rest = whole[len(streamed) :] if whole.startswith(streamed) else f"\n{whole}"
                self._console.print(rest, highlight=False, markup=False)
                break


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
