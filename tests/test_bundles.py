"""Writes to Flink's state are sent together and waited for together."""

import threading

import pytest

from flink_llm.errors import FlinkLlmError
from flink_llm.udfs.bundles import KeyedState


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
    state, backend = made(handler)
    backend.changes = [b"a", b"b", b"c"]
    threading.Timer(0.05, lambda: [future.event.set() for future in handler.futures]).start()
    backend.commit()
    assert handler.log[:3] == ["send a", "send b", "send c"]
    assert {f"wait {name}" for name in "abc"} <= set(handler.log[3:])
    assert state.bundles == 1


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


def test_reads_go_through_and_the_key_can_be_changed():
    handler = Handler()
    state, backend = made(handler)
    backend._map_state_handler._underlying.get_raw(None, b"")
    state.key = 5
    assert handler.log == ["read"]
    assert state.key == backend.key == 5


def test_another_pyflink_is_named():
    with pytest.raises(FlinkLlmError, match=r"use apache-flink 2\.3"):
        KeyedState(type("Context", (), {"_keyed_state_backend": object()})())
