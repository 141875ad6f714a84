"""The other end of a job's topics: requests are sent, and what comes back is shown while it comes."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from flink_llm.config import JobConfig, Topics
from flink_llm.errors import ConfigError, LocalError
from flink_llm.kafka_settings import beyond_this_client, client_options
from flink_llm.local import checks, demo_job

CONNECT_S = 30.0
SILENCE = "no reply within {:g} s"


def ask(config: JobConfig, question: str | None, user: str, session: str | None, patience: float) -> None:
    """Asks a running job one question and prints the reply, or asks the terminal for questions.

    Raises ConfigError: it is no job that is asked over Kafka; LocalError: a failure, or silence for `patience` seconds.
    """
    if config.job == "embedding" or config.files is not None:
        raise ConfigError(
            "it is jobs that chat over Kafka that can be asked: this one "
            + ("reads files" if config.files is not None else "makes vectors")
        )
    if (why := beyond_this_client(config.kafka)) is not None:
        raise ConfigError(f"kafka.properties: {why}; ask with a client of yours, docs/records.md")
    checks.kafka(config)
    checks.topics(config)
    talk = Talk(Console(), lambda: None)
    try:
        talk.open(config)
        if question is None:
            return talk.converse(patience, user, session)
        with Console(stderr=True).status("waiting for the job ...") as waiting:
            wanted = talk.send(question, user, session or demo_job.identifier())
            talk.flush()
            if talk.show(wanted, patience, waiting.stop) is None:
                raise LocalError(f"{SILENCE.format(patience)}: does the job run, and with this configuration?")
    finally:
        talk.close()


class Unanswered(LocalError):
    """What came for a request is a failure."""


class Talk:
    """A client of a job's topics. `check` is called while it waits, and raises when that is in vain."""

    def __init__(self, console: Console, check: Callable[[], None]) -> None:
        self._console = console
        self._check = check
        self._clients: list[Any] = []
        self._topics = Topics()

    def open(self, config: JobConfig) -> None:
        """Connects, and listens to what is written from now on."""
        from kafka import KafkaConsumer, KafkaProducer  # slow to import

        options = client_options(config.kafka)
        self._topics = config.topics
        self._producer = KafkaProducer(linger_ms=0, **options)
        self._clients.append(self._producer)
        topics = {topic for topic in (self._topics.responses, self._topics.tokens, self._topics.failures) if topic}
        self._consumer = KafkaConsumer(
            *topics, auto_offset_reset="latest", group_id=None, isolation_level="read_committed", **options
        )
        self._clients.append(self._consumer)
        deadline = time.monotonic() + CONNECT_S
        while len({each.topic for each in self._consumer.assignment()}) < len(topics) and time.monotonic() < deadline:
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
        self._producer.send(self._topics.requests[0], key=session.encode(), value=json.dumps(request).encode())
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
            for partition in sorted(
                found, key=lambda each: each.topic != self._topics.tokens
            ):  # before the reply they belong to
                for record in found[partition]:
                    value = _object(record.value)
                    if value is not None:
                        deadline = time.monotonic() + patience
                        yield record.topic, value

    def show(self, wanted: str, patience: float, begins: Callable[[], None] = lambda: None) -> int | None:
        """Prints a reply while its tokens arrive; how many came before it was whole.

        None after `patience` seconds of silence. `begins` is called when there is something to print. Raises
        Unanswered, and what `check` does.
        """
        streamed, pieces, deadline = "", 0, time.monotonic() + patience
        for topic, value in self.outcomes(patience):
            if value.get("request_id") != wanted:  # others' are no sign of life of this one's
                if time.monotonic() > deadline:
                    break
                continue
            deadline = time.monotonic() + patience
            begins()
            if topic == self._topics.tokens:
                streamed, pieces = streamed + value["text"], pieces + 1
                self._console.print(value["text"], end="", highlight=False, markup=False, soft_wrap=True)
                continue
            if topic == self._topics.failures:
                raise Unanswered(f"{value['code']}: {value['message']}")
            whole = value["text"]  # may overtake the last tokens, which are another topic
            rest = whole[len(streamed) :] if whole.startswith(streamed) else f"\n{whole}"
            self._console.print(rest, highlight=False, markup=False, soft_wrap=True)
            return pieces
        return None

    def converse(self, patience: float, user: str = "user-1", session: str | None = None) -> None:
        """Asks the terminal for questions until a line is empty or there is none."""
        session = session or demo_job.identifier()
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while question := self._console.input("[bold]> [/]").strip():
                wanted = self.send(question, user, session)
                self.flush()
                try:
                    if self.show(wanted, patience) is None:
                        self._console.print(SILENCE.format(patience))
                except Unanswered as error:
                    self._console.print(str(error), markup=False)


def _object(data: bytes | None) -> dict[str, Any] | None:
    """A record's JSON object; None for what others may have written to the topic."""
    try:
        value = json.loads(data or b"null")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
