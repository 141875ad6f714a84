"""Writes of state to Flink without gRPC's threads: one bundle's in one piece, answered on the thread that waits.

gRPC's Python hands each message of a stream from thread to thread, four times there and back, each of which needs
the interpreter's lock. A bundle of the async operator writes to each of its shards, a message each (docs/adr/0031).
The protocol is Beam's own, messages of gRPC on one stream of
HTTP/2 (RFC 9113, by the library h2), on a connection of its own beside gRPC's.

Source: github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md; Beam's `beam_fn_api.proto`, service BeamFnState.
"""

import select
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from apache_beam.portability.api import beam_fn_api_pb2

PATH = "/org.apache.beam.model.fn_execution.v1.BeamFnState/State"
CONNECT_S = 30.0
READ_BYTES = 65536
WINDOW_BYTES = 1 << 20
"""What Flink may have under way to us: answers are a few bytes each."""
_PREFIX = struct.Struct(">BI")  # whether a message is compressed, and its length
_STREAM = 1


class StateStream:
    """A connection to Flink's state, made at the first write and again when it is found closed. For one thread.

    `address` is "host:port", `worker_id` what Flink calls this worker, None where it has not said so.
    """

    def __init__(self, address: str, worker_id: str | None) -> None:
        self._address = address
        self._worker_id = worker_id
        self._socket: socket.socket | None = None
        self._last_id = 0

    def write(self, instruction_id: str, writes: Sequence[tuple[Any, bytes]]) -> None:
        """Appends to each state key its data, in order, and waits until Flink has done all of it.

        Raises RuntimeError: a write was refused, or the connection is lost, after which some may have been done.
        """
        self._ready()
        open_ids, messages = set(), []
        for state_key, data in writes:
            self._last_id += 1
            request = beam_fn_api_pb2.StateRequest(
                id=str(self._last_id),
                instruction_id=instruction_id,
                state_key=state_key,
                append=beam_fn_api_pb2.StateAppendRequest(data=data),
            )
            message = request.SerializeToString()
            messages += [_PREFIX.pack(0, len(message)), message]
            open_ids.add(request.id)
        try:
            self._send(b"".join(messages))
            while open_ids:
                for answer in self._answers():
                    open_ids.discard(answer.id)
                    if answer.error:
                        raise RuntimeError(answer.error)
                if open_ids:
                    self._receive()
        except BaseException:  # whatever is left on this connection belongs to these writes
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection, if there is one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ready(self) -> None:
        """Connects, unless the connection there was is still open: Flink closes one whose questions are unanswered,
        as those are that it asks between bundles."""
        try:
            while self._socket is not None and select.select([self._socket], [], [], 0)[0]:
                self._receive()
        except RuntimeError:
            self.close()
        if self._socket is None:
            self._connect()

    def _connect(self) -> None:
        host, _, port = self._address.rpartition(":")
        try:
            self._socket = socket.create_connection((host, int(port)), timeout=CONNECT_S)
        except OSError as error:
            raise RuntimeError(f"Flink's state at {self._address} cannot be reached: {error}") from error
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = h2.config.H2Configuration(client_side=True, header_encoding=None)
        self._connection = h2.connection.H2Connection(config)
        self._received = bytearray()
        self._connection.initiate_connection()
        self._connection.increment_flow_control_window(WINDOW_BYTES)
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", self._address),
            ("te", "trailers"), ("content-type", "application/grpc"),
        ]  # fmt: skip
        if self._worker_id is not None:
            headers.append(("worker_id", self._worker_id))
        self._connection.send_headers(_STREAM, headers)
        self._flush()

    def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            room = min(
                self._connection.local_flow_control_window(_STREAM), self._connection.max_outbound_frame_size, len(rest)
            )
            if room:
                self._connection.send_data(_STREAM, rest[:room])
                rest = rest[room:]
            else:
                self._flush()
                self._receive()
        self._flush()

    def _receive(self) -> None:
        """Waits for something from Flink, and answers what is to be answered at once."""
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_BYTES)
            events = self._connection.receive_data(data) if data else [h2.events.ConnectionTerminated()]
        except (OSError, h2.exceptions.ProtocolError) as error:
            raise RuntimeError(f"the connection to Flink's state is lost: {error}") from error
        for event in events:
            if isinstance(event, h2.events.DataReceived):
                self._received += event.data
                self._connection.acknowledge_received_data(event.flow_controlled_length, _STREAM)
            elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset, h2.events.ConnectionTerminated)):
                raise RuntimeError("the connection to Flink's state is lost: Flink has ended it")
        self._flush()

    def _answers(self) -> Iterator[Any]:
        """The whole messages among what has come."""
        while len(self._received) >= _PREFIX.size:
            _, length = _PREFIX.unpack_from(self._received)
            end = _PREFIX.size + length
            if len(self._received) < end:
                return
            message = bytes(self._received[_PREFIX.size : end])
            del self._received[:end]
            yield beam_fn_api_pb2.StateResponse.FromString(message)

    def _flush(self) -> None:
        assert self._socket is not None
        data = self._connection.data_to_send()
        if not data:
            return
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise RuntimeError(f"the connection to Flink's state is lost: {error}") from error
