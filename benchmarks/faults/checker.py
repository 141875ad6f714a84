"""Who sends the requests and who counts the answers: kafka-python clients that know nothing of the job."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError
from msgspec import Struct

from benchmarks import pipeline

OPEN, OPEN_S = 600, 4.0
"""While so many requests have no outcome, or as many as are sent in so many seconds, no more are sent."""
PROMPT: dict[str, Any] = {"reconnect_backoff_max_ms": 500, "request_timeout_ms": 5_000}
"""A client that comes back as soon as its broker does: the recovery that is measured is the job's."""
TOKENS_S = 90.0
"""A client whose broker died may take so long to read on."""


class Sender:
    """Sends requests `r0`, `r1`, … at a rate from a thread while it is `on`. A context manager.

    It pauses while many have no outcome (`OPEN`), so that an outage leaves no backlog of its length behind.
    """

    def __init__(self, servers: str, topic: str, rate: float, keys: int, answered: Callable[[], int]) -> None:
        self.sent = 0
        self._answered = answered
        self.on = threading.Event()
        self.refused: list[str] = []
        self._topic, self._rate, self._keys = topic, rate, keys
        self._open = max(OPEN, rate * OPEN_S)
        self._producer = KafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True, **PROMPT)
        self._ended = False
        self._thread = threading.Thread(target=self._send, name="sender", daemon=True)

    def __enter__(self) -> "Sender":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True
        self.on.set()
        self._thread.join()
        with contextlib.suppress(KafkaError):  # a broker that is down when a run is given up
            self._producer.close(timeout=5)

    def flush(self) -> None:
        """Waits until the broker has all that was sent. Raises RuntimeError where it refused some."""
        self._producer.flush(timeout=120)
        if self.refused:
            raise RuntimeError(f"{len(self.refused)} requests could not be sent: {self.refused[0]}")

    def _send(self) -> None:
        due = time.monotonic()
        while self.on.wait() and not self._ended:
            now = time.monotonic()
            due = max(due + 1 / self._rate, now - 0.1)
            time.sleep(max(0.0, due - now))
            if self.sent - self._answered() >= self._open:
                continue
            ((key, value),) = pipeline.requests(self.sent, 1, self._keys)
            future = self._producer.send(self._topic, key=key, value=value)
            future.add_errback(lambda error: self.refused.append(str(error)))
            self.sent += 1


class Tally(Struct):
    """What came out for the requests of one scenario."""

    requests: int = 0
    lost: int = 0
    duplicated: int = 0
    failures: int = 0
    not_stop: int = 0
    state_errors: int = 0
    torn_texts: int = 0
    """Results whose text is not what a reader of the tokens puts together."""


class Checker:
    """Reads results and failures committed, and tokens as they come. A context manager."""

    def __init__(self, servers: str, topics: dict[str, str]) -> None:
        self._topics = topics
        self._outcomes = self._consumer(servers, "read_committed", topics["responses"], topics["failures"])
        self._tokens = self._consumer(servers, "read_uncommitted", topics["tokens"])
        self._results: dict[str, dict[str, Any]] = {}
        self._times: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._pieces: dict[tuple[str, str], dict[int, str]] = {}
        self._per_key: Counter[str] = Counter()
        self._counts: dict[str, int] = {}
        self._contradictions: set[str] = set()
        self._blow = float("inf")
        self.first_new: float | None = None
        self._ended = False
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_tokens)]

    @staticmethod
    def _consumer(servers: str, level: str, *topics: str) -> Any:
        return KafkaConsumer(
            *topics, bootstrap_servers=servers, isolation_level=level, auto_offset_reset="earliest", group_id=None,
            **PROMPT,
        )  # fmt: skip

    def __enter__(self) -> "Checker":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join(10)

    def await_new(self) -> None:
        """From now on the first result of a call that ends later than now is noted in `first_new`."""
        self._blow, self.first_new = time.time(), None

    @property
    def answered(self) -> int:
        """How many requests have an outcome."""
        return len(self._times)

    def torn(self, name: str) -> bool:
        """Whether the text of a result is not what its tokens, read by the rule, put together."""
        result = self._results.get(name)
        if result is None:
            return False
        pieces = self._pieces.get((name, result["generation_id"]), {})
        ordered = sorted(pieces)
        return "".join(pieces[number] for number in ordered) != result["text"] or ordered != list(range(len(ordered)))

    def judge(self, first: int, sent: int) -> Tally:
        """Of the requests `r<first>` up to `r<sent>`, once the tokens are read; forgets their texts."""
        names = [f"r{number}" for number in range(first, sent)]
        deadline = time.monotonic() + TOKENS_S
        while any(self.torn(name) for name in names) and time.monotonic() < deadline:
            time.sleep(0.5)
        found = Tally(requests=len(names))
        for name in names:
            found.lost += self._times[name] == 0
            found.duplicated += max(0, self._times[name] - 1)
            found.failures += self._failed[name]
            found.torn_texts += self.torn(name)
            result = self._results.pop(name, None)
            found.not_stop += result is not None and result["finish_reason"] != "stop"
        found.torn_texts += len(self._contradictions)
        found.state_errors = sum(self._counts[key] != number for key, number in self._per_key.items())
        self._contradictions.clear()
        self._pieces.clear()
        return found

    def _read(self) -> None:
        for topic, value in self._follow(self._outcomes):
            name = value["request_id"]
            self._times[name] += 1
            if topic == self._topics["failures"]:
                self._failed[name] += 1
                continue
            self._results[name] = value
            session, count = value["session_id"], value["count"]
            self._per_key[session] += 1
            self._counts[session] = max(self._counts.get(session, 0), count)
            if self.first_new is None and value["ended_at"] > self._blow:
                self.first_new = time.time()

    def _read_tokens(self) -> None:
        for _, value in self._follow(self._tokens):
            pieces = self._pieces.setdefault((value["request_id"], value["generation_id"]), {})
            if pieces.setdefault(value["sequence"], value["text"]) != value["text"]:
                self._contradictions.add(value["request_id"])

    def _follow(self, consumer: Any) -> Any:
        try:
            while not self._ended:
                for records in consumer.poll(timeout_ms=100).values():
                    for record in records:
                        yield record.topic, json.loads(record.value)
        finally:
            consumer.close()
