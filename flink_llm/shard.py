"""One shard of an operator: what Flink's state must hold so that nothing is lost or said twice.

Everything here runs on Flink's thread, for the key that Flink has set. A record is in state from its
arrival until the very call in which its outcome is emitted, so a checkpoint holds either the record or
the outcome, never both and never neither. `flink_llm.kept` says what is kept, and in which bytes. Names
are mirrored in memory, since asking Flink for something it does not have is a blocking round trip.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from flink_llm import codec
from flink_llm.arrivals import Arrival
from flink_llm.call import DEADLINE_HEADER, EMPTY_STATE, Call, Failed, Outcome, Result
from flink_llm.errors import RecordError, StateError
from flink_llm.kept import Kept, Remembered
from flink_llm.records import Failure
from flink_llm.runner import Runner
from flink_llm.telemetry import Telemetry, watched
from flink_llm.turns import conflict

CACHED_BYTES = 16 * 1024 * 1024
"""Of the states of a shard's keys, how much is kept in memory as well."""
KEY_LIMIT, MESSAGE_LIMIT = 1024, 2000
"""Characters of a key or id, and of a message, in a failure record."""
PURGE_PER_DRAIN = 50


class Output(Struct, frozen=True):
    """One record to emit. `kind` is "result", "partial" or "failure"; `timestamp` its record's."""

    kind: str
    key: bytes
    value: bytes
    headers: dict[str, bytes]
    topic: str | None
    timestamp: int | None


class Shard:
    """Takes arrivals in, gives outputs back. Made at the first touch of its key, restored or new.

    Raises StateError when the state was written for another configuration.
    """

    def __init__(self, number: int, kept: Kept, runner: Runner, telemetry: Telemetry | None = None) -> None:
        self.number = number
        self.runner = runner
        self.events: deque[tuple[Call, bytes | None]] = deque()
        self.newest: Call | None = None
        self.restored = 0
        self.alive_ms: int | None = None
        self._kept = kept
        self._settings = runner.settings
        self._telemetry = telemetry
        self._open: dict[int, Call] = {}
        self._per_key: dict[str, int] = {}
        self._answers: dict[bytes, Remembered] = {}
        self._expiries: deque[Remembered] = deque()
        self._known_states: set[str] = set()
        self._states: OrderedDict[str, bytes] = OrderedDict()
        self._states_bytes = 0
        self._next = 0
        self._restore()

    @property
    def in_flight(self) -> int:
        """Records that wait for their outcome to be emitted."""
        return len(self._open)

    def receive(self, data: bytes, arrival: Arrival | None = None) -> list[Output]:
        """Takes one arrival in. Waits for a place; gives what needs no call at once.

        `arrival` is what `data` holds, where it is at hand.
        """
        return self._admit(self._next, data, arrival or Arrival.from_bytes(data), self._now_ms())

    def drain(self) -> Iterator[Output]:
        """Gives all that is ready: partials, and outcomes together with their changes of state."""
        self.runner.check()
        events = self.events
        for _ in range(len(events)):  # no more than there are now: handlers go on streaming meanwhile
            call, partial = events.popleft()
            if partial is None:
                outcome = self._commit(call)
                if outcome is not None:
                    yield outcome
                self.runner.event_times.remove(call.arrival.timestamp)  # not before: its time may pass now
            else:
                call.sent += 1
                if call.sequence in self._open:
                    yield self._output("partial", call.arrival, partial, None)
        self._purge()

    def beat(self) -> None:
        """Writes down that the shard is alive: `alive_ms` of a restored one is when it last was."""
        self._kept.set_meta(self._settings.shards, self._settings.max_parallelism, self._now_ms())

    # Arrival.

    def _admit(
        self, sequence: int, data: bytes, arrival: Arrival, arrived_ms: int, *, restored: bool = False
    ) -> list[Output]:
        self._next = max(self._next, sequence + 1)
        arrival, watch = watched(self._telemetry, arrival)
        try:
            request = arrival.request(self.runner.takes)
            call = Call(self, sequence, arrival, request, arrived_ms)
            if call.reply_to is not None and call.reply_to not in self._settings.reply_topics:
                raise RecordError("bad_reply_to", f"reply_to {call.reply_to!r} is not a configured topic")
        except RecordError as error:
            call = Call(self, sequence, arrival, None, arrived_ms)
            call.outcome = Failed(error.code, error.message)
        else:
            call.outcome = self._remembered(call) or (None if restored else self.runner.refusal(call))
        call.watch = watch
        if call.outcome is not None and not self._settings.ordered:
            outcome = self._settle(call)
            if restored:
                self._kept.remove_record(sequence)
            return [] if outcome is None else [outcome]
        if not restored:
            self._kept.add_record(sequence, arrived_ms, data)
        call.restored = restored
        self._open[sequence] = call
        self.runner.event_times.add(arrival.timestamp)
        if self.runner.stateful and not self._per_key.get(call.key):
            call.committed_state = self._state_of(call.key)
        self._per_key[call.key] = self._per_key.get(call.key, 0) + 1
        self.newest = call
        self.runner.submit(call, wait=not restored)
        return []

    def _remembered(self, call: Call) -> Outcome | None:
        if call.identity is None:
            return None
        known = self._answers.get(call.identity[1])
        if known is None or known.expiry <= self._now_ms():
            return None
        if known.payload_hash != call.payload_hash:
            return conflict(call.request_id)
        answer = self._kept.answer(known)
        if answer is None:
            return None
        self.runner.metrics.add("repeats")
        return Result(*answer)

    def _state_of(self, key: str) -> bytes | None:
        if key not in self._known_states:
            return None
        state = self._states.get(key) or self._kept.state(key)
        if state is not None:
            self._cache_state(key, state)
        return state

    def _set_state(self, key: str, state: bytes) -> None:
        if state != EMPTY_STATE:
            self._kept.set_state(key, state)
            self._known_states.add(key)
            self._cache_state(key, state)
        elif key in self._known_states:
            self._kept.remove_state(key)
            self._known_states.discard(key)
            self._states_bytes -= len(self._states.pop(key, b""))

    def _cache_state(self, key: str, state: bytes) -> None:
        self._states_bytes += len(state) - len(self._states.pop(key, b""))
        self._states[key] = state  # the last one used is the last to go
        while self._states_bytes > CACHED_BYTES:
            self._states_bytes -= len(self._states.popitem(last=False)[1])

    # Outcome.

    def _commit(self, call: Call) -> Output | None:
        del self._open[call.sequence]
        self._kept.remove_record(call.sequence)
        left = self._per_key[call.key] - 1
        if left:
            self._per_key[call.key] = left
        else:
            del self._per_key[call.key]
        output = self._settle(call)
        self.runner.committed(call, last_of_key=not left)
        return output

    def _settle(self, call: Call) -> Output | None:
        call.outcome = outcome = self._sized(call)
        call.watch.emitted(call)
        if isinstance(outcome, Result):
            if outcome.state is not None:
                self._set_state(call.key, outcome.state)
            self._remember(call, outcome)
            self.runner.metrics.add("results")
            return self._output("result", call.arrival, outcome.value, outcome.topic)
        if isinstance(outcome, Failed):
            self.runner.metrics.add(f"failures.{outcome.code}")
            return self._failure(call, outcome)
        return None

    def _sized(self, call: Call) -> Outcome | None:
        """The outcome, or why it is none: a repeat has not run, and has headers of its own."""
        try:
            if call.task is None and isinstance(call.outcome, Result):
                call.check_size(len(call.outcome.value), "the result")
        except RecordError as error:
            return Failed(error.code, error.message)
        return call.outcome

    def _remember(self, call: Call, result: Result) -> None:
        if call.identity is None or self._settings.remember_s <= 0:
            return
        digest = call.identity[1]
        known = self._answers.get(digest)
        if known is not None and known.expiry > self._now_ms():
            return  # a repeat, whose first answer stays the one remembered
        new = Remembered(digest, call.payload_hash, self._now_ms() + int(self._settings.remember_s * 1000))
        self._answers[digest] = new
        self._expiries.append(new)
        self._kept.add_answer(new, result.value, result.topic)

    def _purge(self) -> None:
        now = self._now_ms()
        for _ in range(PURGE_PER_DRAIN):
            if not self._expiries or self._expiries[0].expiry > now:
                return
            known = self._expiries.popleft()
            if self._answers.get(known.digest) is known:  # and not run again since, and remembered anew
                del self._answers[known.digest]
            self._kept.remove_answer(known)

    def _failure(self, call: Call, failed: Failed) -> Output:
        """Why, and where the original is, cut to sizes that any topic takes: docs/records.md states them."""
        arrival = call.arrival
        key = None if arrival.key is None else codec.printable(arrival.key, KEY_LIMIT)
        request_id = call.request_id or _raw_request_id(arrival)
        headers = arrival.short_headers()
        failure = Failure(
            code=codec.printable(failed.code, KEY_LIMIT),
            message=codec.printable(failed.message, MESSAGE_LIMIT),
            key=key,
            request_id=None if request_id is None else codec.printable(request_id, KEY_LIMIT),
            topic=arrival.topic,
            partition=arrival.partition,
            offset=arrival.offset,
            handler=self.runner.name,
            failed_at=self._now_ms(),
            headers=headers,
            generation_id=failed.generation_id,
            payload_sha256=call.payload_hash.hex(),
        )
        value = codec.encode(failure)
        if self._settings.keep_payload:
            payload = arrival.payload().decode("utf-8", "replace")
            whole = codec.encode(msgspec.structs.replace(failure, payload=payload))
            value = whole if len(whole) + 2 * len(value) <= self._settings.max_result_bytes else value
        written = (arrival.kafka_key or b"")[:KEY_LIMIT] if key is None else key.encode()
        carried = {name: text.encode() for name, text in headers.items() if name != DEADLINE_HEADER}
        return Output("failure", written, value, carried, None, arrival.timestamp)

    def _output(self, kind: str, arrival: Arrival, value: bytes, topic: str | None) -> Output:
        key = (arrival.key or "").encode()
        headers = {
            name: header for name, header in arrival.headers.items() if header is not None and name != DEADLINE_HEADER
        }
        return Output(kind, key, value, headers, topic, arrival.timestamp)

    def _now_ms(self) -> int:
        return int(self.runner.wall() * 1000)

    # State of an earlier run.

    def _restore(self) -> None:
        self._held, remembered, keys, known = self._kept.names()
        wanted = [self._settings.shards, self._settings.max_parallelism]
        if not known:
            self._kept.set_meta(*wanted)
        elif (found := self._kept.meta())[:2] != wanted:
            raise StateError(
                f"state was written with shards={found[0]} and max_parallelism={found[1]}; "
                f"the job says shards={wanted[0]} and max_parallelism={wanted[1]}: set them back"
            )
        elif len(found) > 2:
            self.alive_ms = found[2]
        self._expiries.extend(remembered)
        self._answers = {known.digest: known for known in remembered}
        if self.runner.stateful:
            self._known_states.update(keys)
        self._next = self._held[-1] + 1 if self._held else 0

    def resume(self) -> Iterator[Output]:
        """Runs again, in order of arrival, what was in flight when the state was written."""
        held, self._held = self._held, []
        self.restored = len(held)
        if held:
            self.runner.metrics.add("restored", len(held))
        for sequence in held:
            arrived_ms, data = self._kept.record(sequence)
            yield from self._admit(sequence, data, Arrival.from_bytes(data), arrived_ms, restored=True)


def _raw_request_id(arrival: Arrival) -> str | None:
    """The request id of a record that failed to decode, where one can still be read."""
    try:
        value = codec.decode(arrival.value) if arrival.from_kafka else arrival.element
    except RecordError:
        return None
    found = value.get("request_id") if isinstance(value, dict) else None
    return str(found)[:256] if isinstance(found, (str, int)) else None
