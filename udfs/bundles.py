"""What a bundle of PyFlink's costs, brought down: six things beyond PyFlink's API.

A record leaves each Python operator on its way with the end of a bundle (docs/adr/0012, docs/adr/0023):

* A bundle's changes of state are written key by key, each a message whose answer is waited for. The
  messages bear their own key and are worked off in order, so all are sent together, by a way that needs
  no other thread (`flink_llm.udfs.state_stream`).
* For the same reason any key of the subtask may be read and written while Flink processes an element
  or timer of another: one timer serves all shards. PyFlink's own map, which is looked up, cached and
  encoded again for each entry, is left out: `KeyedMap` holds what a bundle has changed.
* A bundle's elements come in one piece, and an operator can know which is the last: what serves all of
  them is done once.
* Beam samples which step a bundle is in, on a thread that it starts and waits for in each bundle. PyFlink
  throws the samples away.
* Each bundle's answer tells all metrics, whether anything was counted or not: a fifth of what a small bundle
  costs this thread. They are told when there is something to tell, and our own gauges once a second.
* What a bundle puts out travels on another stream than the answer that the bundle is done. A worker that
  is killed between the two leaves Flink's task waiting for the outputs for ever: they go in the answer.

These are attributes that are no API. PyFlink 2.3: `RemoteKeyedStateBackend`, `CachingMapStateHandler`; where
they are missing, `KeyedState` says so when the operator opens. Beam: `StateSampler`, `SdkWorker`,
`GrpcClientDataChannelFactory`, `DataInputOperation`, `BundleProcessor.monitoring_infos`.
"""

import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from apache_beam.metrics import cells
from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker import bundle_processor, sdk_worker, statesampler, worker_id_interceptor
from pyflink.datastream.functions import RuntimeContext
from pyflink.datastream.state import MapStateDescriptor
from pyflink.fn_execution.state_impl import CachingMapStateHandler, IterateType
from pyflink.version import __version__ as flink_version

from flink_llm.errors import FlinkLlmError
from flink_llm.udfs.counters import GROUP
from flink_llm.udfs.state_stream import StateStream


def lean_bundles() -> None:
    """From the next bundle of this process on: no sampling thread, outputs in the answer, elements counted."""
    sampler: Any = statesampler.StateSampler
    sampler.start, sampler.stop = _start, _stop
    worker: Any = sdk_worker.SdkWorker
    worker.process_bundle = _process_bundle
    operation: Any = bundle_processor.DataInputOperation
    operation.process_encoded = _process_encoded
    processor: Any = bundle_processor.BundleProcessor
    processor.monitoring_infos = _monitoring_infos


_set_current_tracker: Any = statesampler.set_current_tracker


def _start(sampler: Any) -> None:
    sampler.tracked_thread = threading.current_thread()
    _set_current_tracker(sampler)
    sampler.started = True


def _stop(sampler: Any) -> None:
    _set_current_tracker(None)
    sampler.finished = True


_processing = threading.local()  # `worker`: whose bundle this thread is at
_plain_process_bundle: Any = sdk_worker.SdkWorker.process_bundle


def _process_bundle(worker: Any, request: Any, instruction_id: str) -> Any:
    channels = worker.bundle_processor_cache.data_channel_factory._data_channel_cache.values()
    outboxes = [Outbox.of(channel) for channel in channels]
    for outbox in outboxes:
        outbox.begin(instruction_id)
    kept: list[Any] = []
    _processing.worker = worker
    try:
        response = _plain_process_bundle(worker, request, instruction_id)
    finally:
        _processing.worker = None
        for outbox in outboxes:
            kept += outbox.end(instruction_id)
    timers = [item for item in kept if isinstance(item, beam_fn_api_pb2.Elements.Timers)]
    data = [item for item in kept if not isinstance(item, beam_fn_api_pb2.Elements.Timers)]
    if kept:
        response.process_bundle.elements.CopyFrom(beam_fn_api_pb2.Elements(data=data, timers=timers))
    return response


GAUGES_S = 1.0
"""How often our own gauges are told where nothing was counted."""
_OUR_GROUP = f'["{GROUP}"'  # a metric's namespace is its groups, as JSON
_BEAMS_OWN = bundle_processor.DataInputOperation, bundle_processor.DataOutputOperation


def _monitoring_infos(processor: Any) -> list[Any]:
    """What a bundle tells of metrics. Beam's own counts of what it moved are nothing that Flink's side reads."""
    now, found = time.monotonic(), {}
    due = now - getattr(processor, "told_at", -GAUGES_S) >= GAUGES_S
    for name, operation in processor.ops.items():
        if not isinstance(operation, _BEAMS_OWN) and (due or _to_tell(operation.metrics_container)):
            found.update(operation.monitoring_infos(name, {}))
    if due:
        processor.told_at = now
    return list(found.values())


def _to_tell(container: Any) -> bool:
    """Whether a bundle has counted anything, or holds metrics that are not only ours: nobody else's may wait."""
    for key, cell in container.metrics.items():
        if key.cell_type is cells.CounterCell:
            if cell.value:
                return True
        elif key.cell_type is not cells.GaugeCell or not key.metric_name.namespace.startswith(_OUR_GROUP):
            return True
    return False


_plain_process_encoded: Any = bundle_processor.DataInputOperation.process_encoded
_arriving = threading.local()  # `left`: elements of the piece in hand that are still to come


def _process_encoded(operation: Any, data: bytes) -> None:
    _arriving.left = count_frames(data)
    try:
        _plain_process_encoded(operation, data)
    finally:
        _arriving.left = 0


def count_frames(data: bytes) -> int:
    """How many elements a piece of a bundle holds: each has its length before it (base 128, lowest first)."""
    count = position = 0
    end = len(data)
    while position < end:
        length = shift = 0
        while True:
            byte = data[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80 or position >= end:
                break
        position += length
        count += 1
    return count


def more_to_come() -> bool:
    """To be asked once for each element: whether another follows in the same piece, which is processed at once."""
    left: int = getattr(_arriving, "left", 0) - 1
    _arriving.left = left
    return left > 0


class Outbox:
    """In place of the queue that a data channel sends from: keeps what the bundles in hand put out."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._kept: dict[str, list[Any]] = {}

    @classmethod
    def of(cls, channel: Any) -> "Outbox":
        """The channel's own, put in place at the first asking."""
        if not isinstance(channel._to_send, cls):
            channel._to_send = cls(channel._to_send)
        found: Outbox = channel._to_send
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def begin(self, instruction_id: str) -> None:
        """Outputs of this bundle are kept from now on."""
        self._kept[instruction_id] = []

    def end(self, instruction_id: str) -> list[Any]:
        """What the bundle has put out, in order."""
        return self._kept.pop(instruction_id)

    def put(self, item: Any) -> None:
        """From the channel's streams, and from its close."""
        kept = self._kept.get(item.instruction_id)
        if kept is None:
            self._queue.put(item)
        else:
            kept.append(item)


class KeyedState:
    """The keyed state of one operator: maps of bytes, which nobody else may read or write.

    `at_end` is called at the end of each bundle, before its changes are written. Raises FlinkLlmError for a
    PyFlink that is made otherwise.
    """

    def __init__(self, runtime_context: RuntimeContext, at_end: Callable[[], None] = lambda: None) -> None:
        try:
            self._context = runtime_context
            self._backend = runtime_context._keyed_state_backend
            self._handler = self._backend._map_state_handler
            self._writes = self._handler._underlying = _Writes(self._handler._underlying)
            self._at_end = at_end
            self._maps: list[KeyedMap] = []
            self._commit = self._backend.commit
            self._backend.commit = self._commit_all
            self._set_key = self._backend.set_current_key
            self._backend.set_current_key = self._name_key
        except AttributeError as error:
            raise FlinkLlmError(
                f"PyFlink {flink_version} keeps state in a way this release does not know ({error}): "
                f"use apache-flink 2.3"
            ) from error

    def map(self, descriptor: MapStateDescriptor, key: Any, *, once: bytes = b"") -> "KeyedMap":
        """The map of one key, made once. Entries whose names begin with `once` are put once in all eternity."""
        before, self._backend._current_key = self._backend._current_key, None
        self._set_key(key)
        made = KeyedMap(self._handler, self._context.get_map_state(descriptor).get_internal_state(), once)
        self._backend._current_key = before
        self._maps.append(made)
        return made

    def _name_key(self, key: Any) -> None:
        self._backend._current_key = key  # for timers; its bytes are for PyFlink's own states, which have no part here

    def _commit_all(self) -> None:
        self._at_end()
        self._commit()
        for each in self._maps:
            each.write()
        self._writes.wait()


class KeyedMap:
    """The bytes of one key's map state: read at once, written with the end of the bundle."""

    def __init__(self, handler: Any, internal: Any, once: bytes) -> None:
        self._handler = handler
        self._state_key = internal._state_key
        self._encode, self._decode = internal._map_key_encoder, internal._map_value_decoder
        self._once = once
        self._changes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        """Asks Flink, unless this bundle has changed the entry."""
        if key in self._changes:
            return self._changes[key]
        found, value = self._handler._get_raw(self._state_key, key, self._encode, self._decode)
        return bytes(value) if found else None

    def put(self, key: bytes, value: bytes) -> None:
        """Sets a value."""
        self._changes[key] = value

    def remove(self, key: bytes) -> None:
        """Removes a value that may not exist."""
        if self._once and key.startswith(self._once) and self._changes.get(key) is not None:
            del self._changes[key]  # came and went within a bundle: Flink need not know
        else:
            self._changes[key] = None

    def keys(self) -> Iterable[bytes]:
        """All keys, as Flink has them: nothing may have been changed in this bundle."""
        found = self._handler.lazy_iterator(self._state_key, IterateType.KEYS, self._decode, self._decode, {})
        return [bytes(key) for key, _ in found]

    def write(self) -> None:
        """Sends what has changed; the answer is waited for by whoever has this map."""
        if self._changes:
            changes, self._changes = self._changes, {}
            self._handler._underlying.append_raw(self._state_key, packed(changes))


def packed(changes: dict[bytes, bytes | None]) -> bytes:
    """Changes of a map of bytes as PyFlink writes them: each name and value has its length twice, from two coders."""
    parts = [struct.pack(">i", len(changes))]
    for key, value in changes.items():
        kind = CachingMapStateHandler.DELETE if value is None else CachingMapStateHandler.SET_VALUE
        parts += _HEAD.pack(kind, len(key) + 4, len(key)), key
        if value is not None:
            parts += _LENGTHS.pack(len(value) + 4, len(value)), value
    return b"".join(parts)


_HEAD, _LENGTHS = struct.Struct(">Bii"), struct.Struct(">ii")


class _Sent:
    """What PyFlink takes for the answer to a write."""

    def get(self, timeout: float | None = None) -> None:
        """The answer is waited for at the end of the bundle."""


class _Writes:
    """A state handler whose writes are sent together, by a way of their own once it is known where to. Reads and
    clears go through."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self._open: list[tuple[Any, bytes]] = []
        self._stream: StateStream | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    def append_raw(self, state_key: Any, data: bytes) -> _Sent:
        """Keeps a write until `wait`."""
        self._open.append((state_key, data))
        return _SENT

    def wait(self) -> None:
        """Until all writes are done. Raises RuntimeError: one was refused, or the connection is lost."""
        writes, self._open = self._open, []
        if not writes:
            return
        if self._stream is None:
            self._stream = self._found()
        if self._stream is not None:
            self._stream.write(self._handler._context.process_instruction_id, writes)
            return
        sent = [self._handler.append_raw(*write) for write in writes]
        for answer in reversed(sent):  # answers come in order: one wait, not a dozen
            while not answer.wait(timeout=1):
                if self._handler._exception or self._handler._done:
                    raise RuntimeError("the connection to Flink's state is lost") from self._handler._exception
            if answer.get().error:
                raise RuntimeError(answer.get().error)

    def _found(self) -> StateStream | None:
        """To where the handler that reads has its connection; None in the first bundle, which began unobserved."""
        worker = getattr(_processing, "worker", None)
        if worker is None:
            return None
        handlers = worker.bundle_processor_cache.state_handler_factory._state_handler_cache
        found = [url for url, handler in handlers.items() if handler._underlying is self._handler]
        return StateStream(found[0], worker_id_interceptor.WorkerIdInterceptor._worker_id) if found else None


_SENT = _Sent()
