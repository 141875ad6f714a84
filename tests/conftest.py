"""The library's own fixtures, by the names that these tests call them."""

from collections.abc import Callable

import pytest

from flink_llm.local.broker import Broker


@pytest.fixture(scope="session")
def broker(flink_llm_broker: Broker) -> Broker:
    return flink_llm_broker


@pytest.fixture
def topics(flink_llm_topics: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return flink_llm_topics
