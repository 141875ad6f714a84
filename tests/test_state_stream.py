"""Writes of state over our own connection, to a server of gRPC's that speaks Beam's protocol."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc, endpoints_pb2
from apache_beam.runners.worker import sdk_worker, statecache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flink_llm.local.processes import free_port
from flink_llm.udfs import bundles
from flink_llm.udfs.state_stream import StateStream

KEY = beam_fn_api_pb2.StateKey(runner=beam_fn_api_pb2.StateKey.Runner(key=b"k"))


class State(beam_fn_api_pb2_grpc.BeamFnStateServicer):
    """Flink's side: keeps what is written, in order, and says no to what begins with "no"."""

    def __init__(self, port: int = 0, **options: int) -> None:
        self.written: list[tuple[str, bytes, bytes]] = []
        self.workers: list[str] = []
        self.ends_after = 10**9
        given = [(f"grpc.{name}", value) for name, value in options.items()]
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1), *given])
        beam_fn_api_pb2_grpc.add_BeamFnStateServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def State(self, requests, context):
        self.workers.append(dict(context.invocation_metadata()).get("worker_id", ""))
        for number, request in enumerate(requests):
            if number == self.ends_after:
                context.abort(grpc.StatusCode.INTERNAL, "told to")
            data = request.append.data
            self.written.append((request.instruction_id, request.state_key.runner.key, data))
            error = data.decode() if data.startswith(b"no") else ""
            yield beam_fn_api_pb2.StateResponse(
                id=request.id, error=error, append=beam_fn_api_pb2.StateAppendResponse()
            )

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def state():
    server = State()
    yield server
    server.stop()


@pytest.fixture
def stream(state):
    made = StateStream(state.address, "w-1")
    yield made
    made.close()


written_bundles = st.lists(st.lists(st.tuples(st.binary(max_size=4), st.integers(0, 300_000)), max_size=20), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(written_bundles)
def test_all_is_written_in_order_however_much_it_is(state, stream, asked):
    state.written.clear()
    wanted = []
    for number, bundle in enumerate(asked):
        writes = [
            (beam_fn_api_pb2.StateKey(runner=beam_fn_api_pb2.StateKey.Runner(key=key)), bytes([65 + number]) * size)
            for key, size in bundle
        ]
        stream.write(f"i-{number}", writes)
        wanted += [(f"i-{number}", key.runner.key, data) for key, data in writes]
        assert state.written == wanted  # when `write` is back, not some time later
    assert state.workers in ([], ["w-1"])


def test_a_write_that_is_refused_says_why_and_the_next_is_done(state, stream):
    with pytest.raises(RuntimeError, match="no room"):
        stream.write("i", [(KEY, b"a"), (KEY, b"no room"), (KEY, b"b")])
    stream.write("j", [(KEY, b"c")])
    assert ("j", b"k", b"c") in state.written


def test_a_stream_that_ends_in_between_is_an_error_and_no_endless_wait(state, stream):
    state.ends_after = 2
    with pytest.raises(RuntimeError, match="connection to Flink's state is lost"):
        stream.write("i", [(KEY, b"x")] * 5)
    assert len(state.written) == 2


def test_a_connection_that_was_closed_meanwhile_is_made_again():
    port = free_port()
    first = State(port)
    stream = StateStream(first.address, "w-1")
    stream.write("i", [(KEY, b"a")])
    first.stop()
    with pytest.raises(RuntimeError, match=f"127.0.0.1:{port} cannot be reached"):
        stream.write("j", [(KEY, b"b")])
    second = State(port)
    stream.write("k", [(KEY, b"c")])
    assert second.written == [("k", b"k", b"c")]
    stream.close()
    second.stop()


def test_a_server_that_asks_whether_we_live_is_answered_or_connected_to_again():
    """With the next write: nobody reads in between."""
    server = State(keepalive_time_ms=100, keepalive_timeout_ms=400, keepalive_permit_without_calls=1)
    stream = StateStream(server.address, "w-1")
    stream.write("i", [(KEY, b"0")])
    for idle_s in (0.3, 1.5):
        time.sleep(idle_s)
        stream.write("i", [(KEY, b"1")])
    assert [data for _, _, data in server.written] == [b"0", b"1", b"1"]
    stream.close()
    server.stop()


def test_writes_while_flink_reads_slowly(state, stream, monkeypatch):
    """Its window is full: the rest waits until it has read, and nothing is sent beyond it."""
    gate, plain = threading.Event(), state.State
    counted = itertools.count()

    def slowly(requests, context):
        def held():
            for request in requests:
                if next(counted) == 0:
                    gate.wait(10)
                yield request

        yield from plain(held(), context)

    monkeypatch.setattr(state, "State", slowly)
    threading.Timer(0.3, gate.set).start()
    stream.write("i", [(KEY, b"x" * 1_000_000)] * 10)
    assert len(state.written) == 10


def test_writes_of_a_bundle_go_where_its_reads_do(state, monkeypatch):
    """From the second bundle on: the first begins before anybody looks."""
    factory = sdk_worker.GrpcStateHandlerFactory(statecache.StateCache(0))
    reads = factory.create_state_handler(endpoints_pb2.ApiServiceDescriptor(url=state.address))._underlying
    writes = bundles._Writes(reads)
    monkeypatch.setattr(bundles._processing, "worker", None, raising=False)
    for number, connections in enumerate((1, 2, 2)):
        with reads.process_instruction_id(f"i-{number}"):
            writes.append_raw(KEY, b"a")
            writes.append_raw(KEY, b"b")
            writes.wait()
        assert state.written[-2:] == [(f"i-{number}", b"k", b"a"), (f"i-{number}", b"k", b"b")]
        assert len(state.workers) == connections
        cache = SimpleNamespace(state_handler_factory=factory)
        monkeypatch.setattr(bundles._processing, "worker", SimpleNamespace(bundle_processor_cache=cache))
    writes._stream.close()
    factory.close()
    for thread in [thread for thread in threading.enumerate() if thread.name == "read_state"]:
        thread.join(10)  # gRPC's reader takes a server that stops for an error
