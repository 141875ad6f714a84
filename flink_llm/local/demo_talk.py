"""The demo's end of Kafka: requests are sent, and what comes back is shown while it comes."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from flink_llm.local import demo_job

CONNECT_S = 30.0
TOKENS = "chat.tokens"
TOPICS = ("chat.responses", TOKENS, "chat.failures")


class Talk:
    """A client of the job's topics. `check` is called while it waits, and raises when that is in vain."""

    def __init__(self, console: Console, check: Callable[[], None]) -> None:
        self._console = console
        self._check = check
        self._clients: list[Any] = []

    def open(self, bootstrap_servers: str) -> None:
        """Connects, and listens to what is written from now on."""
        from kafka import KafkaConsumer, KafkaProducer  # slow to import

        self._producer = KafkaProducer(bootstrap_servers=bootstrap_servers, linger_ms=0)
        self._clients.append(self._producer)
        self._consumer = KafkaConsumer(
            *TOPICS, bootstrap_servers=bootstrap_servers, auto_offset_reset="latest", group_id=None
        )
        self._clients.append(self._consumer)
        deadline = time.monotonic() + CONNECT_S
        while len(self._consumer.assignment()) < len(TOPICS) and time.monotonic() < deadline:
            self._consumer.poll(timeout_ms=100)
        for partition in self._consumer.assignment():
            self._consumer.position(partition)

    def close(self) -> None:
        """Disconnects, also when `open` has failed."""
        while self._clients:
            self._clients.pop().close()

    def send(self, question: str, user: str, session: str) -> str:
        """Queues a request; its id. `flush` waits until all have left."""
        request = demo_job.request(question, user, session)
        self._producer.send("chat.requests", key=session.encode(), value=json.dumps(request).encode())
        identifier: str = request["request_id"]
        return identifier

    def flush(self) -> None:
        """Waits until the broker has what was sent."""
        self._producer.flush()

    def outcomes(self, patience: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """What arrives: topic and value, until nothing came for `patience` seconds."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self._check()
            found = self._consumer.poll(timeout_ms=100)
            for partition in sorted(found, key=lambda each: each.topic != TOKENS):  # before the reply they belong to
                for record in found[partition]:
                    deadline = time.monotonic() + patience
                    yield record.topic, json.loads(record.value)

    def show(self, wanted: str, patience: float, begins: Callable[[], None] = lambda: None) -> int | None:
        """Prints a reply while its tokens arrive; how many came before it was whole.

        None where there is no reply: a failure is printed, and after `patience` seconds of silence it gives up.
        `begins` is called when there is something to print.
        """
        streamed, pieces = "", 0
        for topic, value in self.outcomes(patience):
            if value["request_id"] != wanted:
                continue
            begins()
            if topic == TOKENS:
                streamed, pieces = streamed + value["text"], pieces + 1
                self._console.print(value["text"], end="", highlight=False, markup=False, soft_wrap=True)
                continue
            failed = topic == "chat.failures"
            if failed:
                rest = f"{value['code']}: {value['message']}"
            else:  # the reply may overtake its last tokens, which are another topic
                whole = value["text"]
                rest = whole[len(streamed) :] if whole.startswith(streamed) else f"\n{whole}"
            self._console.print(rest, highlight=False, markup=False, soft_wrap=True)
            return None if failed else pieces
        return None

    def converse(self, patience: float) -> None:
        """Asks the terminal for questions until a line is empty."""
        self._console.print("Ask about an order, for example 1042. An empty line ends.")
        session = demo_job.request("", "", "")["request_id"]
        while question := self._console.input("[bold]> [/]").strip():
            wanted = self.send(question, "user-1", session)
            self.flush()
            self.show(wanted, patience)
