import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm import codec
from flink_llm.arrivals import Arrival, EventTimes, Keyer, shard_of
from flink_llm.errors import RecordError
from flink_llm.records import ChatRequest, Message

VALUE = b'{"request_id": "r", "session_id": "s", "messages": [{"role": "user", "content": "x"}]}'


@given(
    st.builds(
        Arrival,
        key=st.none() | st.text(),
        value=st.none() | st.binary(),
        headers=st.dictionaries(st.text(), st.none() | st.binary(), max_size=3),
        topic=st.none() | st.text(),
        offset=st.none() | st.integers(0, 2**62),
    )
)
def test_an_arrival_survives_state(arrival):
    assert Arrival.from_bytes(arrival.to_bytes()) == arrival


def test_the_shard_of_a_key_never_changes():
    assert [shard_of(key, 16) for key in ("", "a", "session-1", "é")] == [
        int.from_bytes(bytes.fromhex(digest), "big") % 16 for digest in ("e3b0c442", "ca978112", "84097828", "4a99557e")
    ]


@pytest.mark.parametrize(
    ("spec", "key"),
    [("session_id", "s"), (lambda request: request.messages[0].content, "x"), (lambda request: 7, "7")],
)
def test_a_key_is_a_field_or_a_function_of_the_request(spec, key):
    by, arrival = Keyer(spec, ChatRequest).arrive(Arrival(value=VALUE, from_kafka=True))
    assert (by, arrival.key) == (key, key)
    assert arrival.request(ChatRequest).session_id == "s"


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\tb", "a.b", "é", ""])
@pytest.mark.parametrize("from_kafka", [True, False])
def test_a_key_field_may_have_any_name(name, from_kafka):
    data = codec.encode({"other": 1, name: "v"})
    arrival = Arrival(value=data, from_kafka=True) if from_kafka else Arrival(element=data.decode())
    assert Keyer(name, dict).arrive(arrival)[1].key == "v"
    missing = Keyer(name, dict).arrive(Arrival(value=b"[]", from_kafka=True, topic="t"))[1]
    assert "Expected `object`, got `array`" in missing.key_error


class Untellable(Exception):
    def __str__(self):
        raise RuntimeError


def untellable(request):
    raise Untellable


def unkeepable(request):
    raise ValueError("half a character: \ud800")


def exiting(request):
    raise SystemExit


@pytest.mark.parametrize(
    "spec",
    ["nothing", "messages", lambda request: 1 / 0, lambda request: 1.5, untellable, unkeepable, exiting],
)
def test_a_record_without_a_key_is_keyed_by_its_place_and_fails_there(spec):
    arrival = Arrival(value=VALUE, from_kafka=True, topic="t", partition=1, offset=2)
    by, arrival = Keyer(spec, ChatRequest).arrive(arrival)
    assert by == "t/1/2"
    arrival = Arrival.from_bytes(arrival.to_bytes())
    with pytest.raises(RecordError) as caught:
        arrival.request(ChatRequest)
    assert caught.value.code == "bad_key"


@pytest.mark.parametrize(
    "element",
    [VALUE.decode(), VALUE, codec.decode(VALUE)],
    ids=["text", "bytes", "mapping"],
)
def test_elements_of_any_stream_become_requests(element):
    _, arrival = Keyer("session_id", ChatRequest).arrive(Arrival(element=element))
    assert arrival.request(ChatRequest).messages == [Message("user", "x")]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20))))
def test_the_oldest_in_flight_is_the_smallest_that_has_not_left(steps):
    times, held = EventTimes(), []
    for arrives, number in steps:
        if arrives or not held:
            times.add(number)
            held.append(number)
        else:
            times.remove(held.pop(number % len(held)))
        assert times.oldest() == min(held, default=None)


def test_a_trace_is_whole_in_a_failures_headers_however_many_others_there_are():
    trace = {"traceparent": b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", "tracestate": b"x=" + b"1" * 500}
    headers = {**{f"other-{n}": b"v" * 300 for n in range(20)}, **trace}
    kept = Arrival(value=b"{}", headers=headers).short_headers()
    assert {name: kept[name].encode() for name in trace} == trace
    assert len(kept) == 16
    assert len(kept["other-0"]) == 256
