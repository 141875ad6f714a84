"""A Python thread's calls of Flink are done by one Java thread, whatever else calls Java meanwhile."""

import threading
import time

import pytest
from pyflink.java_gateway import get_gateway

from flink_llm.gateway import _Connections, one_java_thread


def java_thread():
    return get_gateway().jvm.java.lang.Thread.currentThread().getId()


def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def seen_beside_another():
    """The Java threads that a caller gets while others hold connections, and when they have given them back."""
    java, found = get_gateway().jvm.java.lang, {java_thread()}
    for wait_ms in (400, 200, 300):  # given back in another order than taken
        threading.Thread(target=java.Thread.sleep, args=[wait_ms]).start()
        time.sleep(0.05)
        found.add(java_thread())
    time.sleep(0.5)
    return found | {java_thread()}


@pytest.mark.parametrize("keeps", [False, True])
def test_a_thread_keeps_its_java_thread_beside_others(keeps):
    def call():
        if keeps:
            one_java_thread()
        return seen_beside_another()

    assert (len(in_a_thread(call)) == 1) is keeps  # py4j alone hands out any


def test_threads_keep_threads_of_their_own():
    def call():
        one_java_thread()
        return java_thread(), java_thread()

    first, again = in_a_thread(call)
    assert first == again
    own, once_more = call()
    assert own == once_more != first


def test_a_connection_that_an_interrupted_call_took_along_is_replaced():
    idle = _Connections()
    idle.keep()
    idle.append("first")
    idle.append("of another thread")
    assert idle.pop() == "first"
    assert idle.pop() == "of another thread", "a finalizer in the middle of the call"
    idle.append("of another thread")
    idle.keep()  # the first was closed
    assert idle.pop() == "of another thread"
    idle.append("of another thread")
    idle.append("third")
    assert [idle.pop(), idle.pop()] == ["of another thread", "third"]
