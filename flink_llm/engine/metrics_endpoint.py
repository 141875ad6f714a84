"""Where metrics can be read: HTTP, on a thread of its own."""

import logging
import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

log = logging.getLogger(__name__)
OF_A_HOST = "host.metrics_port: no metrics on %s:%d (%s); the models are served, and it is tried again"
RETRY_S = 10.0
"""How soon another try is made for an address that somebody else has."""


class MetricsEndpoint:
    """Serves `registry` as Prometheus reads it at `http://host:port/metrics`; `port` 0 is any that is free.

    An address that cannot be had is tried again, and is no error of whoever wants it. Two hosts with one
    configuration are nothing wrong (two GPUs of one machine, the old and the new release during an upgrade),
    jobs need their models more than their metrics, and the one that is left takes the port over. `told` says
    in the log why there are none meanwhile; it is given host, port and reason.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int, *, told: str = OF_A_HOST) -> None:
        self.address: tuple[str, int] | None = None
        self._registry = registry
        self._wanted = (host, port)
        self._told = told
        self._over = threading.Event()
        self._server: WSGIServer | None = None
        # Binding asks for the machine's name, which may take seconds where the resolver is slow.
        self._thread = threading.Thread(target=self._run, name="flink-llm metrics", daemon=True)

    def start(self) -> None:
        """Begins to serve, soon."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each that nobody plots
        self._thread.start()

    def stop(self) -> None:
        """Ends it; the port is free afterwards."""
        self._over.set()
        self._thread.join()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _run(self) -> None:
        host, port = self._wanted
        told: str | None = self._told
        while not self._over.is_set():
            try:
                self._server, _ = start_http_server(port, host, self._registry)
            except (OSError, ValueError) as error:  # ValueError: a name that can be no host's
                if told is not None:
                    log.error(told, host, port, getattr(error, "strerror", None) or error)
                told = None
                self._over.wait(RETRY_S)
            else:
                self.address = (host, self._server.server_port)
                log.info("metrics are at http://%s:%d/metrics", host, self._server.server_port)
                return
