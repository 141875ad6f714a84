"""The planner of Flink 2.3 wants to be called from one Java thread only, and PyFlink's gateway chooses any."""

import threading
from collections import deque
from typing import Any

from pyflink.java_gateway import get_gateway

_replacing = threading.Lock()


class _Connections(deque[Any]):
    """py4j's idle connections, each of which has a Java thread; a Python thread that wants one to itself keeps it.

    Of a thread: `keeps`, it wants one; `kept`, the one it has; `idle`, that one while it is not in use.
    """

    def __init__(self) -> None:
        super().__init__()
        self._threads = threading.local()

    def keep(self) -> None:
        """Keeps the connection that comes next, where none is kept: one that was interrupted does not come back."""
        own = self._threads.__dict__
        own["keeps"] = True
        if own.get("idle") is None:
            own.pop("kept", None)

    def pop(self) -> Any:  # type: ignore[override]
        own = self._threads.__dict__
        connection = own.get("idle")
        if connection is None:  # none is kept, or it is in use: Java objects are let go of in the middle of a call
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
    """From now on, what this Python thread asks of Flink is done by one Java thread.

    Flink plans tables with what it keeps in the Java thread that made their environment (Calcite's metadata
    provider), and fails with a NullPointerException on every other: FLINK-36298, mended after 2.3. py4j takes any
    idle connection, and a second one appears as soon as two threads call Java, or free its objects, at a time. So
    tables are planned in the Python thread that made their environment. A call that was interrupted (Ctrl-C) takes
    its Java thread with it: environments are to be made anew then.
    """
    gateway = get_gateway()
    client = gateway._gateway_client
    with _replacing:
        if not isinstance(client.deque, _Connections):
            idle, client.deque = client.deque, _Connections()
            while idle:
                client.deque.append(idle.pop())
    client.deque.keep()
    gateway.jvm.java.lang.System.nanoTime()  # the first answer's connection is the one that is kept
