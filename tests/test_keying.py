"""A record's way to its shard, and what of it arrives there."""

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from types import SimpleNamespace

import msgspec
import pytest

from flink_llm.arrivals import Arrival, shard_of
from flink_llm.errors import ConfigError
from flink_llm.udfs import keying


def arrive(value, stamp=5):
    step = keying._Arrive("k", dict, 16, False)
    step.open(None)
    ((_, data),) = step.process_element(value, SimpleNamespace(timestamp=lambda: stamp))
    return Arrival.from_bytes(data)


def deep():
    value = {}
    for _ in range(100_000):
        value = {"v": value}
    return {"k": "a", "v": value}


@pytest.mark.parametrize("value", [{"k": "a", "n": 2**70}, deep(), {"k": "a", "s": "\ud800"}], ids=["n", "deep", "s"])
def test_an_element_that_state_cannot_hold_arrives_as_a_failure_to_be(value):
    arrival = arrive(value)
    assert arrival.element is None
    assert "cannot be kept" in arrival.key_error


class Colour(Enum):
    RED = "red"


class Line(msgspec.Struct, rename="camel", tag=True):
    unit_price: Decimal
    digest: bytes


@dataclass
class Order:
    k: str
    day: date
    colour: Colour
    lines: list[Line]


class Plain:
    def __init__(self, k, held):
        self.k, self.held = k, held


class Renamed(msgspec.Struct, rename="camel"):
    k: str
    line_of: Line


LINE = Line(Decimal("1.10"), b"x")
ORDER = Order("a", date(2026, 1, 2), Colour.RED, [LINE])


@pytest.mark.parametrize("value", [ORDER, Renamed("a", LINE)], ids=["dataclass", "struct"])
def test_an_object_reaches_a_handler_of_its_class_as_it_was(value):
    arrival = arrive(value)
    assert arrival.key == "a"
    assert arrival.request(type(value)) == value


def test_an_object_without_declared_fields_is_its_attributes():
    assert arrive(Plain("a", [Plain("b", {1: Colour.RED})])).request(dict) == {
        "k": "a",
        "held": [{"k": "b", "held": {"1": "red"}}],
    }


@pytest.mark.parametrize("key", ["\ud800", b"\xff", 7])
def test_any_key_can_be_carried(key):
    step = keying._Arrive(lambda _: key, dict, 16, False)
    step.open(None)
    ((shard, data),) = step.process_element({"k": 1}, SimpleNamespace(timestamp=lambda: 5))
    assert 0 <= shard < 16
    assert Arrival.from_bytes(data).key


@pytest.mark.parametrize("stamp", [-(2**63), -1, None])
def test_a_stream_without_times_has_none(stamp):
    assert arrive({"k": "a"}, stamp=stamp).timestamp is None


@pytest.mark.parametrize("stamp", [7, 0, -2, -86_400_000])
def test_a_time_before_1970_is_one(stamp):
    assert arrive({"k": "a"}, stamp=stamp).timestamp == stamp


@pytest.mark.parametrize(("shards", "groups"), [(0, 128), (129, 128), (12, 128)])
def test_shards_that_cannot_be_spread_evenly_are_refused(shards, groups):
    with pytest.raises(ConfigError, match="must be a multiple of"):
        keying.shard_keys(shards, groups)


def read(value, shard):
    reader = keying.Reader("k", dict, 16)
    reader.open()
    data, arrival = reader((b"kafka", value, None, "t", 0, 7), shard, 5)
    assert Arrival.from_bytes(data) == arrival
    return arrival


def test_a_record_keyed_in_java_arrives_whole():
    arrival = read(b'{"k": "a"}', shard_of("a", 16))
    assert (arrival.key, arrival.kafka_key, arrival.topic, arrival.offset) == ("a", b"kafka", "t", 7)
    assert arrival.timestamp == 5
    assert arrival.from_kafka


def test_a_record_in_the_wrong_shard_never_runs_beside_its_key():
    arrival = read(b'{"k": "a"}', (shard_of("a", 16) + 1) % 16)
    assert arrival.key is None
    assert "nesting beyond 1,000, no number beyond 1,000 digits" in arrival.key_error


def test_a_record_without_a_key_may_be_anywhere():
    assert read(b"{}", 3).key is None
    assert read(None, 4).key is None
