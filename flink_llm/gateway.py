"""The planner of Flink 2.3 wants to be called from one Java thread only, and PyFlink's gateway chooses any."""

import threading
from collections import deque
from typing import Any

from pyflink.java_gateway import get_gateway


class _Connections(deque[Any]):
    """py4j's idle connections, each of which has a Java thread; a Python thread that wants one to itself keeps it."""

    def __init__(self, idle: deque[Any]) -> None:
        super().__init__(idle)
        self._threads = threading.local()

    def keep(self) -> None:
        self._threads.keeps = True

    def pop(self) -> Any:  # type: ignore[override]
        own = self._threads.__dict__
        connection = own.get("idle")
        if connection is None:  # in use: the collector lets go of Java objects in the middle of a call
            return super().pop()
        own["idle"] = None
        return connection

    def append(self, connection: Any) -> None:
        own = self._threads.__dict__
        if own.get("keeps") and own.setdefault("kept", connection) is connection:
            own["idle"] = connection
        else:
            super().append(connection)


def one_java_thread() -> None:
    """From now on, all that this Python thread asks of Flink is done by one Java thread.

    Flink plans tables with what it keeps in the Java thread that made their environment (Calcite's metadata
    provider), and fails with a NullPointerException on every other: FLINK-36298, mended after 2.3. py4j takes any
    idle connection, and a second one appears as soon as two threads call Java, or free its objects, at a time.
    """
    gateway = get_gateway()
    client = gateway._gateway_client
    if not isinstance(client.deque, _Connections):
        client.deque = _Connections(client.deque)
    client.deque.keep()
    gateway.jvm.java.lang.System.nanoTime()  # the first answer's connection is the one that is kept
