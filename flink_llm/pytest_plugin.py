"""Fixtures for tests of handlers and jobs, of pytest's own accord where flink-llm is installed.

`harness` runs a handler without Flink. `flink_llm_broker`, `flink_llm_topics` and `flink_llm_env` need
Java: a real Kafka broker and a Flink mini-cluster, one of each for the whole session (with pytest-xdist,
for each worker). docs/testing.md shows them. Whatever takes time to import is imported in the fixtures: a
test suite that uses none of them pays nothing.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from flink_llm.local.broker import Broker
    from flink_llm.testing import FakeFeatures, Harness, Script

WITHOUT_JAVA = "flink_llm_without_java"
SLOTS = 4


class MakeHarness(Protocol):
    """What the fixture `harness` is."""

    def __call__(
        self,
        udf: Any,
        models: "dict[str, Script | list[Script]] | None" = None,
        features: "dict[str, dict[str, dict[str, Any]] | FakeFeatures] | None" = None,
        **options: Any,
    ) -> "Harness": ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """See pytest."""
    parser.addini(WITHOUT_JAVA, "What tests that need Java do without one: skip or fail.", default="skip")


@pytest.fixture
def harness() -> Iterator[MakeHarness]:
    """Makes harnesses that have been entered: `harness(Reply(), models={"m": Script()}, key="user_id")`.

    `models` and `features` are those of `FakeServices`, all else is `Harness`'s.
    """
    from flink_llm.testing import FakeServices, Harness

    with contextlib.ExitStack() as stack:

        def make(udf: Any, models: Any = None, features: Any = None, **options: Any) -> Harness:
            services = options.pop("services", None) or FakeServices(models, features)
            return stack.enter_context(Harness(udf, services, **options))

        yield make


@pytest.fixture(scope="session")
def flink_llm_broker(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> "Iterator[Broker]":
    """A real Kafka broker on a free port, gone with all its topics when the session ends."""
    from flink_llm.local.broker import Broker

    broker = Broker(tmp_path_factory.mktemp("flink-llm-broker"))
    with _java(pytestconfig):
        broker.up([])
    yield broker
    broker.wipe()


@pytest.fixture
def flink_llm_topics(flink_llm_broker: "Broker") -> Callable[..., list[str]]:
    """Makes topics with names of their own: `requests, responses = flink_llm_topics("requests", "responses")`."""
    from flink_llm.local.broker import create_topics

    def make(*names: str, partitions: int = 1) -> list[str]:
        made = [f"{name}.{uuid.uuid4().hex[:8]}" for name in names]
        create_topics(flink_llm_broker.bootstrap_servers, [f"{name}:{partitions}" for name in made])
        return made

    return make


@pytest.fixture(scope="session")
def flink_llm_cluster(pytestconfig: pytest.Config) -> Iterator[int]:
    """A Flink mini-cluster of 4 slots in this process; the port of its REST interface."""
    from flink_llm.local import jars

    with _java(pytestconfig):
        jars.java()  # before anything of PyFlink's, which only says that a process ended
    from pyflink.java_gateway import get_gateway

    from flink_llm.environment import leave_loopback
    from flink_llm.local.processes import free_port

    leave_loopback()
    port = free_port()
    configuration = _configuration(port, {"rest.bind-address": "127.0.0.1", "taskmanager.memory.managed.size": "512m"})
    minicluster = get_gateway().jvm.org.apache.flink.runtime.minicluster
    builder = minicluster.MiniClusterConfiguration.Builder().setConfiguration(configuration._j_configuration)
    cluster = minicluster.MiniCluster(builder.setNumTaskManagers(1).setNumSlotsPerTaskManager(SLOTS).build())
    cluster.start()
    yield port
    cluster.close()


@pytest.fixture
def flink_llm_env(flink_llm_cluster: int, pytestconfig: pytest.Config) -> Iterator[Any]:
    """An environment on that mini-cluster, configured for jobs of this library, with the Kafka connector.

    Python runs in processes of its own, as on a cluster, which find the modules that the test can import.
    Jobs that still run when the test ends are cancelled.
    """
    import os
    import sys

    from pyflink.datastream import StreamExecutionEnvironment
    from pyflink.java_gateway import get_gateway

    from flink_llm.environment import configure
    from flink_llm.flink_settings import FlinkSettings
    from flink_llm.local import jars

    with _java(pytestconfig):
        connector = jars.connector_jar().as_uri()
    gateway = get_gateway()
    environments = gateway.jvm.org.apache.flink.streaming.api.environment.StreamExecutionEnvironment
    more = {"pipeline.jars": connector, "python.pythonpath": os.pathsep.join(filter(None, sys.path))}
    configuration = _configuration(flink_llm_cluster, more)._j_configuration
    none = gateway.new_array(gateway.jvm.String, 0)
    env = StreamExecutionEnvironment(
        environments.createRemoteEnvironment("127.0.0.1", flink_llm_cluster, configuration, none)
    )
    configure(env, FlinkSettings(checkpoint_interval_ms=200))
    yield env
    _cancel_all(flink_llm_cluster)


def _configuration(port: int, more: dict[str, str]) -> Any:
    import sys

    from pyflink.common import Configuration

    configuration = Configuration()
    options = {
        "rest.address": "127.0.0.1",
        "rest.port": str(port),
        "python.executable": sys.executable,
        "python.client.executable": sys.executable,
        **more,
    }
    for name, value in options.items():
        configuration.set_string(name, value)
    return configuration


def _cancel_all(port: int) -> None:
    """Cancels what runs and waits for its end, so that the next test finds its slots free."""
    import json
    import time
    import urllib.request

    def ask(path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or b"{}")

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ended = ("FINISHED", "CANCELED", "FAILED")
        running = [job["id"] for job in ask("/jobs")["jobs"] if job["status"] not in ended]
        if not running:
            return
        for job in running:
            with contextlib.suppress(OSError):  # it may end meanwhile
                ask(f"/jobs/{job}", "PATCH")
        time.sleep(0.2)


@contextlib.contextmanager
def _java(config: pytest.Config) -> Iterator[None]:
    """Skips or fails, in one line, where there is no Java, no Maven or no jars."""
    from flink_llm.errors import LocalError

    try:
        yield
    except LocalError as error:
        what = str(config.getini(WITHOUT_JAVA))
        if what not in ("skip", "fail"):
            raise pytest.UsageError(f"{WITHOUT_JAVA} is {what!r}: write skip or fail") from None
        (pytest.skip if what == "skip" else pytest.fail)(f"flink-llm: {error}")
