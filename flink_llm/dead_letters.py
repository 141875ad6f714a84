"""Dead letters: what a job could not answer, read from its topic of failures and sent again.

A `Failure` names the place of its original: that very record goes to its topic once more, with its key,
value and headers, so that a request keeps its id and a repeat is harmless. Only a point in time that was
its deadline is left out: it has passed.
"""

import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from flink_llm.call import DEADLINE_HEADER
from flink_llm.errors import ConfigError, LocalError
from flink_llm.kafka_settings import KafkaSettings, beyond_this_client, client_options, reason
from flink_llm.records import Failure

REPLAYED = "flink-llm-replay"
"""Header of a record that was sent again: the place of the first one."""
POLL_MS, SILENCE_S = 500, 30
LAST_MS = 253_402_300_800_000
"""The year 10,000: no failure is from there, whatever it says."""
LARGEST = 1 << 30
"""Bytes of an original, as far as this client is concerned: its topic took it."""
SKIP = 2000
"""So many offsets that nobody asks for are jumped over, fewer are read."""


@dataclass(frozen=True)
class Choice:
    """Which failures are meant: their codes, all if none is given, when they failed (epoch ms), and their requests."""

    codes: frozenset[str] = frozenset()
    since_ms: int = 0
    until_ms: int | None = None
    request_ids: frozenset[str] = frozenset()

    def takes(self, failure: Failure) -> bool:
        """Whether the failure is one of them."""
        return (
            (not self.codes or failure.code in self.codes)
            and failure.failed_at >= self.since_ms
            and (self.until_ms is None or failure.failed_at < self.until_ms)
            and (not self.request_ids or failure.request_id in self.request_ids)
        )


class Place(NamedTuple):
    """Where a record lies."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass
class Letters:
    """Failures that were read; `unread` counts records that are none."""

    found: list[Failure] = field(default_factory=list)
    unread: int = 0


@dataclass
class Replay:
    """What became of the originals: sent (or to be sent), or why not. Counts, and what a broker refused."""

    there: int = 0
    gone: int = 0
    changed: int = 0
    placeless: int = 0
    elsewhere: int = 0
    empty: int = 0
    repeated: int = 0
    refused: list[Exception] = field(default_factory=list)


def read(settings: KafkaSettings, topic: str, choice: Choice) -> Letters:
    """The failures in a topic as it is now, oldest first. Raises ConfigError, LocalError."""
    letters = Letters()
    decoder = msgspec.json.Decoder(Failure)
    for record in _records(settings, topic):
        try:
            failure = decoder.decode(record.value or b"")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            letters.unread += 1
            continue
        if not 0 <= failure.failed_at < LAST_MS:
            letters.unread += 1
        elif choice.takes(failure):
            letters.found.append(failure)
    letters.found.sort(key=lambda failure: failure.failed_at)
    return letters


def replay(
    settings: KafkaSettings,
    failures: Sequence[Failure],
    topics: Collection[str],
    *,
    send: bool,
    tell: Callable[[str], None] = lambda line: None,
) -> Replay:
    """Finds each failure's original in `topics` and, if told to `send`, writes it to its topic again, once.

    Of several failures of one request, an id with one payload in one topic, the last is taken. An original that
    has expired, was compacted away, or is another record by now is told of, counted and left out. Those of
    other topics are counted and left out: jobs may share one of failures. Raises ConfigError, LocalError.
    """
    done = Replay()
    wanted: dict[tuple[str, int], dict[int, Failure]] = defaultdict(dict)
    latest: dict[Any, Failure] = {}
    for failure in failures:
        place = _place(failure)
        if place is None:
            done.placeless += 1
            tell(f"{failure.request_id or 'a record without an id'}: its failure names no place in Kafka")
            continue
        if place.topic not in topics:
            done.elsewhere += 1
            continue
        known = failure.request_id and failure.payload_sha256  # a failure of a table's row has no hash
        name = (place.topic, failure.key, failure.request_id, failure.payload_sha256) if known else place
        done.repeated += name in latest
        latest[name] = failure
    for failure in latest.values():
        place = _place(failure)
        assert place is not None
        wanted[place.topic, place.partition][place.offset] = failure
    with _sender(settings, send, done.refused, tell) as write:
        for (topic, partition), by_offset in sorted(wanted.items()):
            for offset, record in _originals(settings, topic, partition, sorted(by_offset)):
                failure, place = by_offset[offset], Place(topic, partition, offset)
                if record is None:
                    done.gone += 1
                    tell(f"{place}: expired or compacted away, {failure.request_id} cannot be sent again")
                elif failure.payload_sha256 not in (None, hashlib.sha256(record.value or b"").hexdigest()):
                    done.changed += 1
                    tell(f"{place}: holds another record by now; was the topic made anew?")
                elif record.key is None and record.value is None:
                    done.empty += 1
                    tell(f"{place}: has neither key nor value, and would fail as it did")
                else:
                    done.there += 1
                    write(record, place)
    done.there -= len(done.refused)
    return done


def _place(failure: Failure) -> Place | None:
    if failure.topic is None or failure.partition is None or failure.offset is None:
        return None
    return Place(failure.topic, failure.partition, failure.offset)


@contextlib.contextmanager
def _asked(settings: KafkaSettings) -> Iterator[None]:
    """Errors of kafka-python as ours."""
    from kafka.errors import KafkaError

    why = beyond_this_client(settings)
    if why is not None:
        raise ConfigError(f"kafka.properties: {why}; replay from a machine with other credentials")
    try:
        yield
    except KafkaError as error:
        raise LocalError(f"kafka: {settings.bootstrap_servers} cannot be asked: {reason(error)}") from error


def _consumer(settings: KafkaSettings) -> Any:
    from kafka import KafkaConsumer  # slow to import

    return KafkaConsumer(
        **client_options(settings), group_id=None, enable_auto_commit=False, auto_offset_reset="earliest",
        isolation_level="read_committed", max_poll_records=2000,
    )  # fmt: skip


def _records(settings: KafkaSettings, topic: str) -> Iterator[Any]:
    """All committed records of a topic up to its present end."""
    from kafka import TopicPartition

    with _asked(settings), contextlib.closing(_consumer(settings)) as consumer:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        if not partitions:
            raise ConfigError(f"topics.failures: {settings.bootstrap_servers} has no topic {topic!r}")
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        yield from _until(consumer, consumer.end_offsets(partitions))


def _until(consumer: Any, ends: dict[Any, int]) -> Iterator[Any]:
    """Records of the assigned partitions before the offsets `ends`. Raises LocalError when nothing comes for long."""
    heard = time.monotonic()
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        before = {partition: consumer.position(partition) for partition in ends}
        for partition, records in consumer.poll(timeout_ms=POLL_MS).items():
            yield from (record for record in records if record.offset < ends[partition])
        if any(consumer.position(partition) != position for partition, position in before.items()):
            heard = time.monotonic()
        elif time.monotonic() - heard > SILENCE_S:
            raise LocalError(f"kafka: nothing came for {SILENCE_S} s; is a broker down, or a transaction open?")


def _originals(settings: KafkaSettings, topic: str, partition: int, offsets: list[int]) -> Iterator[tuple[int, Any]]:
    """The record at each offset of a partition, in order; None where there is none any more."""
    from kafka import TopicPartition

    place = TopicPartition(topic, partition)
    with _asked(settings), contextlib.closing(_consumer(settings)) as consumer:
        if partition not in (consumer.partitions_for_topic(topic) or ()):
            yield from ((offset, None) for offset in offsets)
            return
        consumer.assign([place])
        end, first = consumer.end_offsets([place])[place], consumer.beginning_offsets([place])[place]
        for run in _runs(offsets):
            there = [offset for offset in run if first <= offset < end]
            records: Iterator[Any] = iter(())
            if there:
                consumer.seek(place, there[0])
                records = _until(consumer, {place: there[-1] + 1})
            yield from _picked(records, run)


def _picked(records: Iterator[Any], offsets: list[int]) -> Iterator[tuple[int, Any]]:
    """The records at these offsets, None for each that is passed over; both ascend. One is held at a time."""
    record = next(records, None)
    for offset in offsets:
        while record is not None and record.offset < offset:
            record = next(records, None)
        yield offset, record if record is not None and record.offset == offset else None


def _runs(offsets: Sequence[int]) -> Iterator[list[int]]:
    """Ascending offsets in runs without a gap of more than `SKIP`."""
    run: list[int] = []
    for offset in offsets:
        if run and (offset - run[-1] > SKIP or len(run) >= SKIP):
            yield run
            run = []
        run.append(offset)
    if run:
        yield run


@contextlib.contextmanager
def _sender(
    settings: KafkaSettings, send: bool, refused: list[Exception], tell: Callable[[str], None]
) -> Iterator[Callable[[Any, Place], None]]:
    """What writes a record to its topic again, done when this ends; what does nothing unless told to `send`.

    What a broker refuses is told of, and kept in `refused`.
    """
    if not send:
        yield lambda record, place: None
        return
    from kafka import KafkaProducer

    options = {"acks": "all", "linger_ms": 5, "max_request_size": LARGEST, "compression_type": "gzip"}
    options |= {"enable_idempotence": False}  # else what comes behind a refused record is refused as well
    with _asked(settings), contextlib.closing(KafkaProducer(**client_options(settings), **options)) as producer:

        def write(record: Any, place: Place) -> None:
            def refuse(error: Exception) -> None:
                refused.append(error)
                tell(f"{place}: not sent again: {reason(error)}")

            left_out = (REPLAYED, DEADLINE_HEADER)
            headers = [each for each in record.headers if each[0] not in left_out and each[1] is not None]
            headers.append((REPLAYED, str(place).encode()))
            producer.send(
                place.topic, key=record.key, value=record.value, headers=headers, partition=place.partition
            ).add_errback(refuse)

        yield write
        producer.flush()
