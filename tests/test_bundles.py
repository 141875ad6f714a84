"""Writes to Flink's state are sent together, once a bundle; what a bundle puts out is in its answer."""

import queue
import threading
from types import SimpleNamespace

import pytest
from apache_beam.coders import coder_impl
from apache_beam.metrics.execution import MetricsContainer
from apache_beam.metrics.metricbase import MetricName
from apache_beam.portability.api import beam_fn_api_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from pyflink.common import Types
from pyflink.fn_execution.coders import from_type_info
from pyflink.fn_execution.state_impl import CachingMapStateHandler, InternalSynchronousMapRuntimeState

from flink_llm.errors import FlinkLlmError
from flink_llm.udfs import bundles
from flink_llm.udfs.bundles import KeyedMap, KeyedState, count_frames, more_to_come


class Answer:
    error = ""


class Future:
    def __init__(self, log, name):
        self._log, self._name, self.value = log, name, Answer()
        self.event = threading.Event()

    def wait(self, timeout=None):
        self._log.append(f"wait {self._name}")
        return self.event.wait(timeout and 0.01)

    def get(self, timeout=None):
        return self.value


class Handler:
    """Answers when told to."""

    _exception = None
    _done = False

    def __init__(self):
        self.log = []
        self.futures = []

    def append_raw(self, key, data):
        self.log.append(f"send {data.decode()}")
        self.futures.append(Future(self.log, data.decode()))
        return self.futures[-1]

    def get_raw(self, key, token):
        self.log.append("read")
        return b"", None


class Backend:
    """As PyFlink's: `commit` writes one key after the other and waits for each."""

    def __init__(self, handler):
        self._map_state_handler = type("Map", (), {"_underlying": handler})()
        self.key = None
        self.changes = []

    def get_current_key(self):
        return self.key

    def set_current_key(self, key):
        self.key = key

    def commit(self):
        for change in self.changes:
            self._map_state_handler._underlying.append_raw(None, change).get()


def made(handler):
    backend = Backend(handler)
    return KeyedState(type("Context", (), {"_keyed_state_backend": backend})()), backend


def test_all_writes_are_sent_before_the_first_answer_is_waited_for():
    handler = Handler()
    _, backend = made(handler)
    backend.changes = [b"a", b"b", b"c"]
    threading.Timer(0.05, lambda: [future.event.set() for future in handler.futures]).start()
    backend.commit()
    assert handler.log[:3] == ["send a", "send b", "send c"]
    assert {f"wait {name}" for name in "abc"} <= set(handler.log[3:])


def test_a_write_that_is_refused_fails_the_bundle():
    handler = Handler()
    _, backend = made(handler)
    backend.changes = [b"a", b"b"]

    def answer():
        for future in handler.futures:
            future.event.set()
        handler.futures[0].value.error = "no room"

    threading.Timer(0.05, answer).start()
    with pytest.raises(RuntimeError, match="no room"):
        backend.commit()


def test_a_lost_connection_does_not_hang():
    handler = Handler()
    _, backend = made(handler)
    backend.changes = [b"a"]
    handler._exception = ConnectionError("gone")
    with pytest.raises(RuntimeError, match="connection to Flink's state is lost"):
        backend.commit()


def test_reads_go_through_and_the_end_of_a_bundle_is_told():
    handler, ends = Handler(), []
    backend = Backend(handler)
    KeyedState(type("Context", (), {"_keyed_state_backend": backend})(), lambda: ends.append(list(handler.log)))
    backend._map_state_handler._underlying.get_raw(None, b"")
    assert handler.log == ["read"]
    backend.commit()
    assert ends == [["read"]]


CODER = from_type_info(Types.PRIMITIVE_ARRAY(Types.BYTE()))


class FlinkSide:
    """Flink's side of one key's map: what is there after all that it was sent."""

    def __init__(self):
        self.entries, self.messages = {}, []

    def append_raw(self, state_key, data):
        self.messages.append(data)
        stream = coder_impl.create_InputStream(data)
        for _ in range(stream.read_bigendian_int32()):
            kind, key = stream.read_byte(), self._field(stream)
            if kind == CachingMapStateHandler.DELETE:
                self.entries.pop(key, None)
            else:
                self.entries[key] = self._field(stream)

    def get_raw(self, state_key, token):
        key = token[1 + 4 :]
        if key not in self.entries:
            return bytes([CachingMapStateHandler.NOT_EXIST_FLAG]), b""
        value = self.entries[key]
        return bytes([CachingMapStateHandler.EXIST_FLAG]) + len(value).to_bytes(4, "big") + value, b""

    @staticmethod
    def _field(stream):
        size = stream.read_bigendian_int32()
        return stream.read(size)[4:]


def keyed_map():
    flink = FlinkSide()
    caching = SimpleNamespace(
        _state_cache=SimpleNamespace(is_cache_enabled=lambda: False), _underlying=flink, _context=None
    )
    handler = CachingMapStateHandler(caching, 0)
    internal = InternalSynchronousMapRuntimeState(handler, None, CODER, CODER, 1000)
    return KeyedMap(handler, internal, b"f"), flink, internal


NAMES = st.sampled_from([b"fa", b"fb", b"a", b"s"])
CHANGE = st.tuples(NAMES, st.none() | st.binary(max_size=5))


@settings(deadline=None)
@given(st.lists(st.lists(CHANGE, max_size=8), max_size=5))
def test_flink_holds_what_a_map_of_bytes_would(bundles):
    kept, flink, _ = keyed_map()
    wanted, used = {}, set()
    for changes in bundles:
        for name, value in changes:
            if value is None:
                kept.remove(name)
                wanted.pop(name, None)
            elif not (name.startswith(b"f") and name in used):  # those are put once
                kept.put(name, value)
                wanted[name] = value
                used.add(name)
            assert kept.get(name) == wanted.get(name)
        kept.write()
        assert flink.entries == wanted


@settings(deadline=None)
@given(st.dictionaries(st.binary(max_size=5), st.none() | st.binary(max_size=5), min_size=1))
def test_changes_are_written_as_pyflink_writes_them(changes):
    _, flink, internal = keyed_map()
    for name, value in changes.items():
        internal.remove(name) if value is None else internal.put(name, value)
    internal.commit()
    assert flink.messages == [bundles.packed(changes)]


def test_a_record_that_comes_and_goes_in_a_bundle_is_no_write():
    kept, flink, _ = keyed_map()
    kept.put(b"f1", b"x")
    kept.remove(b"f1")
    kept.write()
    assert flink.messages == []


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300)))
def test_the_last_element_of_a_piece_is_known(elements):
    stream = coder_impl.create_OutputStream()
    for element in elements:
        stream.write(element, nested=True)
    assert count_frames(stream.get()) == len(elements)
    seen = []

    def process(operation, data):
        seen.extend(more_to_come() for _ in elements)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "_plain_process_encoded", process)
        bundles._process_encoded(None, stream.get())
    assert seen == [True] * (len(elements) - 1) + [False] * bool(elements)
    assert more_to_come() is False


def test_another_pyflink_is_named():
    with pytest.raises(FlinkLlmError, match=r"use apache-flink 2\.3"):
        KeyedState(type("Context", (), {"_keyed_state_backend": object()})())


Data, Timers = beam_fn_api_pb2.Elements.Data, beam_fn_api_pb2.Elements.Timers


@pytest.fixture
def channel():
    return SimpleNamespace(_to_send=queue.Queue())


def run(channel, monkeypatch, outputs, *, fails=False):
    """The answer of bundle "b" of a worker with this channel, whose operators put out `outputs`."""

    def process(worker, request, instruction_id):
        for item in outputs:
            channel._to_send.put(item)
        if fails:
            raise ValueError("the bundle fails")
        return beam_fn_api_pb2.InstructionResponse(process_bundle=beam_fn_api_pb2.ProcessBundleResponse())

    monkeypatch.setattr(bundles, "_plain_process_bundle", process)
    factory = SimpleNamespace(_data_channel_cache={"url": channel})
    worker = SimpleNamespace(bundle_processor_cache=SimpleNamespace(data_channel_factory=factory))
    return bundles._process_bundle(worker, None, "b")


def test_what_a_bundle_puts_out_is_in_its_answer(channel, monkeypatch):
    data = [Data(instruction_id="b", data=b"1"), Data(instruction_id="b", is_last=True)]
    timers = [Timers(instruction_id="b", timers=b"2")]
    for _ in range(2):  # the outbox is put in place once
        answer = run(channel, monkeypatch, [data[0], timers[0], data[1]])
        assert list(answer.process_bundle.elements.data) == data
        assert list(answer.process_bundle.elements.timers) == timers
    assert channel._to_send.empty()


def test_another_bundle_and_the_end_of_the_channel_go_the_old_way(channel, monkeypatch):
    others = [Data(instruction_id="other", data=b"1"), Data()]
    answer = run(channel, monkeypatch, others)
    assert not answer.process_bundle.HasField("elements")
    assert [channel._to_send.get_nowait() for _ in others] == others


def test_a_bundle_that_fails_leaves_nothing_behind(channel, monkeypatch):
    with pytest.raises(ValueError, match="the bundle fails"):
        run(channel, monkeypatch, [Data(instruction_id="b", data=b"1")], fails=True)
    assert channel._to_send.empty()
    assert not run(channel, monkeypatch, []).process_bundle.HasField("elements")


OURS = '["flink_llm", "MetricGroupType.generic"]'


class Operation:
    """One of a user's functions: tells what its container holds."""

    def __init__(self):
        self.metrics_container = MetricsContainer("step")

    def monitoring_infos(self, name, _):
        return self.metrics_container.to_runner_api_monitoring_infos(name)


def test_a_bundle_tells_what_was_counted_at_once_and_gauges_once_a_second(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(bundles, "time", SimpleNamespace(monotonic=lambda: clock.now))
    one, other = Operation(), Operation()
    processor = SimpleNamespace(ops={"one": one, "other": other})

    def told():
        infos = bundles._monitoring_infos(processor)
        for operation in (one, other):
            operation.metrics_container.reset()
        return sorted((info.labels["PTRANSFORM"], info.labels["NAME"]) for info in infos)

    def count(operation, by):
        operation.metrics_container.get_counter(MetricName(OURS, "results")).inc(by)

    for operation in (one, other):
        operation.metrics_container.get_gauge(MetricName(OURS, "in_flight")).set(3)
    count(one, 1)
    all_of_one = [("one", "in_flight"), ("one", "results")]
    assert told() == [*all_of_one, ("other", "in_flight")]
    count(one, 0)
    assert told() == []
    count(one, 2)
    assert told() == all_of_one  # nothing that was counted waits, however short a time it is since
    clock.now += bundles.GAUGES_S
    assert told() == [*all_of_one, ("other", "in_flight")]
    other.metrics_container.get_gauge(MetricName('["theirs", "MetricGroupType.generic"]', "level")).set(7)
    assert told() == [("other", "in_flight"), ("other", "level")]  # as PyFlink does, in each bundle
