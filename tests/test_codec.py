import dataclasses
import pickle
from decimal import Decimal

import cloudpickle
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm import codec
from flink_llm.errors import RecordError, StateError
from flink_llm.handler import AsyncUdf, signature_of
from flink_llm.records import ChatRequest, Message

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
GOOD = b'{"request_id":"r","session_id":"s","messages":[{"role":"user","content":"hi"}],"colour":"red"}'


@given(JSON | st.binary())
def test_state_bytes_give_back_what_was_packed(value):
    assert codec.unpack(codec.pack(value)) == value


@given(st.text(), st.sampled_from(["user", "assistant", "system"]))
def test_registered_records_survive_in_state(content, role):
    turns = {"turns": [Message(role, content)]}
    assert codec.unpack(codec.pack(turns)) == turns


def test_the_first_version_of_state_stays_readable():
    assert codec.pack({"n": 1, "m": Message("user", "hi")}).hex() == (
        "0182a16e01a16dc7240192ac636861742e6d65737361676582a4726f6c65a475736572a7636f6e74656e74a26869"
    )


def test_unknown_version_is_refused_with_both_versions():
    with pytest.raises(StateError, match="version 9, this release reads version 1"):
        codec.unpack(b"\x09\xc0")


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {3}}, [ValueError()]], ids=repr)
def test_what_state_cannot_hold_is_refused(value):
    with pytest.raises(TypeError):
        codec.pack(value)


def test_unknown_fields_are_kept():
    request = codec.decode(GOOD, ChatRequest)
    assert request.unknown_fields == {"colour": "red"}
    assert codec.decode(codec.encode(request), ChatRequest) == request


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (None, "null_value", "no value"),
        (b"{", "malformed", "not valid JSON"),
        (b'"\xff"', "malformed", "not valid JSON"),
        (b"[" * 100_000, "malformed", "not valid JSON"),
        (b"[]", "invalid", "Expected `object`"),
        (GOOD.replace(b'"hi"', b"5"), "invalid", "$.messages[0].content"),
        (GOOD.replace(b'"request_id":"r",', b""), "invalid", "missing required field `request_id`"),
        (GOOD.replace(b'"colour":"red"', b'"max_tokens":-1'), "invalid", "max_tokens"),
    ],
)
def test_bad_values_say_where_and_what(data, code, text):
    with pytest.raises(RecordError) as caught:
        codec.decode(data, ChatRequest)
    assert caught.value.code == code
    assert text in caught.value.message


@dataclasses.dataclass
class Money:
    total: Decimal
    count: int = 0

    def __post_init__(self):
        if self.count < 0:
            raise LookupError("nothing is below zero")


@pytest.mark.parametrize("digits", ["123456789012345678.91", "0.10", "1234567890123456789012345678901234567890"])
def test_a_decimal_keeps_its_digits(digits):
    assert str(codec.decode(f'{{"total":{digits}}}'.encode(), Money).total) == digits


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (None, "null_value", "no value"),
        (b'{"count":"x","total":1', "malformed", "not valid JSON: Input data was truncated"),
        (b'{"total":1,"count":"x","later":}', "malformed", "not valid JSON"),
        (b'{"total":1,"unread":"\xff"}', "malformed", "not valid JSON: 'utf-8' codec can't decode"),
        (b'{"total":1,"unread":' + b"[" * 100_000, "malformed", "not valid JSON"),
        (b'{"total":1,"count":"x"}', "invalid", "Expected `int`, got `str` - at `$.count`"),
        (b'{"total":1,"count":-1}', "invalid", "LookupError: nothing is below zero"),
    ],
)
def test_bad_values_of_ones_own_type_say_where_and_what(data, code, text):
    with pytest.raises(RecordError) as caught:
        codec.decode(data, Money)
    assert caught.value.code == code
    assert text in caught.value.message


class Renamed(msgspec.Struct, rename="camel"):
    user_id: str = ""
    turn_count: int = 0


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    inner: Renamed


codec.register("test.renamed", Renamed)
codec.register("test.kept", Kept)


def test_state_keeps_fields_by_their_python_names():
    value = {"a": Renamed("u", 3), "b": [Kept(name="x", inner=Renamed("v", 4))]}
    assert codec.unpack(codec.pack(value)) == value


def test_a_record_that_no_longer_fits_is_refused_by_name():
    bytes_of = codec.pack(Renamed("u", 3)).replace(b"\xaaturn_count\x03", b"\xaaturn_count\xc3")
    with pytest.raises(StateError, match=r"'test\.renamed' that no longer fits"):
        codec.unpack(bytes_of)


def test_an_array_like_record_cannot_be_registered():
    class Positional(msgspec.Struct, array_like=True):
        a: int

    with pytest.raises(ValueError, match="array_like"):
        codec.register("test.positional", Positional)


@pytest.mark.parametrize("value", [2**64, {"deep": "\ud800"}, {"a": {1: 2}}, object()], ids=str)
def test_what_state_cannot_hold_is_a_type_error(value):
    with pytest.raises(TypeError):
        codec.pack(value)


@given(
    st.lists(
        st.none() | st.text() | st.binary() | st.integers(-(2**63), 2**63) | st.dictionaries(st.text(), st.binary())
    )
)
def test_plain_values_have_the_same_bytes(values):
    try:
        packed = codec.pack(values)
    except TypeError:
        with pytest.raises(TypeError):
            codec.pack_plain(values)
    else:
        assert codec.pack_plain(values) == packed


def test_a_dataclass_of_the_jobs_own_file_can_go_to_the_workers():
    @dataclasses.dataclass
    class Inner:
        number: int

    @dataclasses.dataclass
    class Outer:
        inner: list[Inner] | None

    class Handler(AsyncUdf):
        async def call(self, request: Outer, ctx) -> Outer:
            return request

    signature_of(Handler())
    copy = pickle.loads(cloudpickle.dumps(Outer))
    assert msgspec.convert({"inner": [{"number": 1}]}, copy).inner[0].number == 1
