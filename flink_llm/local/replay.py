"""What `flink-llm failures` says."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from flink_llm import dead_letters
from flink_llm.config import JobConfig, load
from flink_llm.dead_letters import Choice, Letters
from flink_llm.errors import CODES, ConfigError, LocalError
from flink_llm.kafka_settings import reason
from flink_llm.names import unknown

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def when_ms(option: str, text: str | None) -> int | None:
    """Epoch milliseconds of `30m` ago or of an ISO time, local unless it says otherwise. Raises ConfigError."""
    if text is None:
        return None
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if ago is not None:
        return int((time.time() - min(float(ago[1]) * _UNITS[ago[2]], time.time())) * 1000)
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ConfigError(f"{option} {text!r}: write 30m, 2h or 3d, or a time like 2026-01-31T12:00") from None


def listed(
    config: Path, limit: int, codes: Sequence[str], since: str | None, until: str | None, requests: Sequence[str]
) -> Iterator[str]:
    """Lines: the latest `limit` failures, then how many of each code there are. Raises ConfigError, LocalError."""
    _, letters = _read(config, codes, since, until, requests)
    for failure in letters.found[-limit:] if limit else ():
        at = datetime.fromtimestamp(failure.failed_at / 1000).isoformat(" ", "seconds")
        place = f"{failure.topic}/{failure.partition}/{failure.offset}" if failure.topic else "-"
        yield f"{at}  {failure.code:20}  {failure.request_id or '-'}  {place}  {' '.join(failure.message.split())}"
    if len(letters.found) > limit:
        yield f"... and {len(letters.found) - limit} before; --limit shows more"
    yield from _summary(letters)


def replayed(
    config: Path,
    send: bool,
    codes: Sequence[str],
    since: str | None,
    until: str | None,
    requests: Sequence[str],
    *,
    tell: Callable[[str], None],
) -> Iterator[str]:
    """Sends, or says what would be sent. Raises ConfigError, LocalError."""
    job, letters = _read(config, codes, since, until, requests)
    yield from _summary(letters)
    done = dead_letters.replay(job.kafka, letters.found, job.topics.requests, send=send, tell=tell)
    if done.repeated:
        yield f"{done.repeated} failed more than once, and count once"
    for count, why in ((done.gone, "expired or compacted away"), (done.changed, "another record by now"),
                       (done.placeless, "without a place in Kafka"), (done.empty, "with neither key nor value"),
                       (done.elsewhere, "of topics that are not in topics.requests")):  # fmt: skip
        if count:
            yield f"{count} skipped: {why}"
    yield f"{done.there} sent again" if send else f"{done.there} would be sent again: add --send"
    if done.refused:
        raise LocalError(
            f"kafka: {len(done.refused)} could not be sent again: {reason(done.refused[0])}; once that is mended, the "
            f"same command sends all of them: those that were answered meanwhile are repeats"
        )


def _read(
    config: Path, codes: Sequence[str], since: str | None, until: str | None, requests: Sequence[str]
) -> tuple[JobConfig, Letters]:
    choice = Choice(frozenset(codes), when_ms("--since", since) or 0, when_ms("--until", until), frozenset(requests))
    job = load(config)
    if job.files is not None:
        raise ConfigError(f"{config}: the job writes files, not Kafka: its failures are beside them")
    letters = dead_letters.read(job.kafka, job.topics.failures, choice)
    for code in codes:  # a handler may have codes of its own
        if not letters.found and code not in CODES:
            raise ConfigError(unknown("--code", code, CODES))
    return job, letters


def _summary(letters: Letters) -> Iterator[str]:
    counts = Counter(failure.code for failure in letters.found)
    told = ", ".join(f"{code} {count}" for code, count in counts.most_common())
    yield f"{len(letters.found)} failures: {told}" if told else "no failures"
    if letters.unread:
        yield f"{letters.unread} records of the topic are no failures of this library"
