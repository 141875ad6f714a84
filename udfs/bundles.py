"""What a bundle of PyFlink's costs, brought down: four things beyond PyFlink's API.

A record leaves each Python operator on its way with the end of a bundle (docs/adr/0012):

* A bundle's changes of state are written key by key, each a message whose answer is waited for. The
  messages bear their own key and are worked off in order, so all are sent before the first answer is
  waited for.
* For the same reason any key of the subtask may be read and written while Flink processes an element
  or timer of another: one timer serves all shards.
* Beam samples which step a bundle is in, on a thread that it starts and waits for in each bundle. PyFlink
  throws the samples away.
* What a bundle puts out travels on another stream than the answer that the bundle is done. A worker that
  is killed between the two leaves Flink's task waiting for the outputs for ever: they go in the answer.

These are attributes that are no API. PyFlink 2.3: `RemoteKeyedStateBackend`, `CachingMapStateHandler`; where
they are missing, `KeyedState` says so when the operator opens. Beam: `StateSampler`, `SdkWorker`,
`GrpcClientDataChannelFactory`.
"""

import threading
from typing import Any

from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.worker import sdk_worker, statesampler
from pyflink.datastream.functions import RuntimeContext
from pyflink.version import __version__ as flink_version

from flink_llm.errors import FlinkLlmError


def lean_bundles() -> None:
    """From the next bundle of this process on: no sampling thread, and outputs in the bundle's answer."""
    sampler: Any = statesampler.StateSampler
    sampler.start, sampler.stop = _start, _stop
    worker: Any = sdk_worker.SdkWorker
    worker.process_bundle = _process_bundle


_set_current_tracker: Any = statesampler.set_current_tracker


def _start(sampler: Any) -> None:
    sampler.tracked_thread = threading.current_thread()
    _set_current_tracker(sampler)
    sampler.started = True


def _stop(sampler: Any) -> None:
    _set_current_tracker(None)
    sampler.finished = True


_plain_process_bundle: Any = sdk_worker.SdkWorker.process_bundle


def _process_bundle(worker: Any, request: Any, instruction_id: str) -> Any:
    channels = worker.bundle_processor_cache.data_channel_factory._data_channel_cache.values()
    outboxes = [Outbox.of(channel) for channel in channels]
    for outbox in outboxes:
        outbox.begin(instruction_id)
    kept: list[Any] = []
    try:
        response = _plain_process_bundle(worker, request, instruction_id)
    finally:
        for outbox in outboxes:
            kept += outbox.end(instruction_id)
    timers = [item for item in kept if isinstance(item, beam_fn_api_pb2.Elements.Timers)]
    data = [item for item in kept if not isinstance(item, beam_fn_api_pb2.Elements.Timers)]
    if kept:
        response.process_bundle.elements.CopyFrom(beam_fn_api_pb2.Elements(data=data, timers=timers))
    return response


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
    """The keyed state of one operator; `bundles` counts those that have ended.

    Raises FlinkLlmError for a PyFlink that is made otherwise.
    """

    def __init__(self, runtime_context: RuntimeContext) -> None:
        try:
            self._backend = runtime_context._keyed_state_backend
            handler = self._backend._map_state_handler
            self._writes = handler._underlying = _Writes(handler._underlying)
            self.bundles = 0
            self._commit = self._backend.commit
            self._backend.commit = self._commit_all
        except AttributeError as error:
            raise FlinkLlmError(
                f"PyFlink {flink_version} keeps state in a way this release does not know ({error}): "
                f"use apache-flink 2.3"
            ) from error

    @property
    def key(self) -> Any:
        """Whose state is read and written, and whose timers are set."""
        return self._backend.get_current_key()

    @key.setter
    def key(self, key: Any) -> None:
        self._backend.set_current_key(key)

    def _commit_all(self) -> None:
        self.bundles += 1
        self._commit()
        self._writes.wait()


class _Sent:
    """What PyFlink takes for the answer to a write."""

    def get(self, timeout: float | None = None) -> None:
        """The answer is waited for at the end of the bundle."""


class _Writes:
    """A state handler that does not wait for the answers to its writes. Reads and clears go through."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self._open: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    def append_raw(self, state_key: Any, data: bytes) -> _Sent:
        """Sends a write."""
        self._open.append(self._handler.append_raw(state_key, data))
        return _SENT

    def wait(self) -> None:
        """Until all writes are done. Raises RuntimeError: one was refused, or the connection is lost."""
        sent, self._open = self._open, []
        for answer in reversed(sent):  # answers come in order: one wait, not a dozen
            while not answer.wait(timeout=1):
                if self._handler._exception or self._handler._done:
                    raise RuntimeError("the connection to Flink's state is lost") from self._handler._exception
            if answer.get().error:
                raise RuntimeError(answer.get().error)


_SENT = _Sent()
