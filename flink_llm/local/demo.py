"""The demo: the real job over a real broker, real features and the shipped model."""

import contextlib
import itertools
import os
import sys
import time
import uuid
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from rich.console import Console

from flink_llm.config import load
from flink_llm.errors import LocalError
from flink_llm.local import demo_data, demo_job, processes
from flink_llm.local.broker import Broker
from flink_llm.local.demo_table import Tally
from flink_llm.local.talk import Talk

DEADLINE_S = 300
"""Hundreds of questions at once are asked of whatever machine this is: a slow one takes its time."""
START_S = 180.0
ANSWER_S = 120.0
TALK_S = 60.0
SHOWN, THEN_EVERY = 12, 25
"""Of the sample events' replies so many are printed, and of the others one in so many."""
FIRST = "Where is order 1042?"
QUESTIONS = (
    "Where is order {order}?",
    "When will order {order} arrive?",
    "What is the status of order {order}?",
    "How do I return order {order}?",
    "What can you recommend?",
    "Which loyalty tier am I in?",
    "Where is my order 999999?",
)


class Demo:
    """Broker, features, job, a first reply, sample events, a table, and then questions.

    Leaves no process behind. `began` is when the command was given, in seconds since the epoch.
    """

    def __init__(self, state: Path, events: int, began: float | None = None) -> None:
        self._state = state
        self._events = events
        self._began = time.time() if began is None else began
        self._console = Console()
        self._broker = Broker(state)
        self._broker_was_up = False
        self._job_file = state / "demo.json"
        self._log = state / "demo.log"
        self._talk = Talk(self._console, self._check_job)
        self._first_reply = ""

    def run(self) -> bool:
        """The whole demo; whether every sample event got a reply.

        Raises LocalError. Ctrl-C, SIGTERM and SIGHUP end it as they do any command, but at the prompt
        Ctrl-C is the end like any other; nothing cuts the clean-up.
        """
        demo_job.demo_model()
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
            self._console.print("Ask about an order, for example 1042. An empty line ends.")
            self._talk.converse(TALK_S)
        return good

    def _clean_up(self) -> None:
        with contextlib.ExitStack() as stack:  # the last one first, and each whatever the others raise
            if not self._broker_was_up:
                stack.callback(self._broker.down)
            stack.callback(self._talk.close)
            stack.callback(self._stop_job)
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._console.print("\nstopping ...")

    def _stop_job(self) -> None:
        job = processes.recall(self._job_file)
        if job is not None:
            processes.stop(job)
        self._job_file.unlink(missing_ok=True)

    def _check_job(self) -> None:
        if processes.recall(self._job_file) is None:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise LocalError(f"the job ended: {lines[-1] if lines else 'no output'} (log: {self._log})")

    def _start(self) -> None:
        with self._console.status("starting a Kafka broker ..."):
            self._broker.up()
        self._console.print(f"Kafka broker at {self._broker.bootstrap_servers}")
        with self._console.status("filling the feature store ..."):
            demo_job.prepare(self._state)
        self._console.print(f"features of {demo_data.CUSTOMERS} customers and {demo_data.ORDERS} orders in Feast")
        kafka = {"bootstrap_servers": self._broker.bootstrap_servers, "group": f"demo-{uuid.uuid4().hex[:8]}"}
        config = self._state / "demo.yaml"
        job = demo_job.configuration(self._state, kafka=kafka, name="demo")
        job["operator"]["deadline"] = DEADLINE_S
        config.write_text(yaml.safe_dump(job))
        self._talk.open(load(config))
        command = [sys.executable, "-m", "flink_llm", "run", str(config)]
        self._log.unlink(missing_ok=True)
        processes.start(command, self._log, {**os.environ, "PYTHONUNBUFFERED": "1"}, file=self._job_file)
        self._console.print(f"starting the Flink job on a mini-cluster (log: {self._log})\n")
        self._ask_first()

    def _ask_first(self) -> None:
        """A first question, its reply printed as it streams: it waits in Kafka until the job is there."""
        self._console.print(f"[bold]> [/]{FIRST}", highlight=False)
        wanted = self._talk.send(FIRST, "user-1", "first")
        with self._console.status("waiting for the job ...") as waiting:
            pieces = self._talk.show(wanted, START_S, waiting.stop)  # a spinner would overwrite the tokens
        if pieces is None:
            raise LocalError(f"the first question got no reply within {START_S:.0f} s (log: {self._log})")
        self._first_reply = f"after {time.time() - self._began:.1f} s"
        kind = "streamed reply" if pieces else "reply (its tokens came behind it)"
        self._console.print(f"[dim]first {kind} {self._first_reply}[/]\n", highlight=False)

    def _sample(self) -> bool:
        """Sends the sample events and reports; whether each got a reply."""
        orders = [row["order_id"] for row in demo_data.orders()]
        questions = itertools.cycle(QUESTIONS)
        tally = Tally()
        began = time.monotonic()
        for i in range(self._events):
            question, now = next(questions).format(order=orders[i % len(orders)]), time.monotonic()
            tally.sent[self._talk.send(question, f"user-{1 + i % demo_data.CUSTOMERS}", f"session-{i % 40}")] = now
        self._talk.flush()
        for topic, value in self._talk.outcomes(ANSWER_S):
            if tally.note(topic, value) and (len(tally.replies) <= SHOWN or tally.ended % THEN_EVERY == 0):
                self._console.print(f"[dim]{tally.ended:4}[/]  {value['text']}", highlight=False)
            if tally.ended == self._events:
                break
        self._console.print(tally.table(time.monotonic() - began, self._first_reply))
        return len(tally.replies) == self._events
