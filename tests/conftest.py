"""A real broker for the whole session, and topics of its own for each test."""

import uuid
from collections.abc import Callable, Iterator

import pytest

from flink_llm.local.broker import Broker, create_topics


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.up([])
    yield broker
    broker.wipe()


@pytest.fixture
def topics(broker: Broker) -> Callable[..., list[str]]:
    """Makes topics with names of their own: `topics("requests", "responses")`."""

    def make(*names: str, partitions: int = 1) -> list[str]:
        made = [f"{name}.{uuid.uuid4().hex[:8]}" for name in names]
        create_topics(broker.bootstrap_servers, [f"{name}:{partitions}" for name in made])
        return made

    return make
