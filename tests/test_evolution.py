"""Records and entries of state as other releases wrote them."""

import contextlib

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flink_llm import codec
from flink_llm.arrivals import Arrival
from flink_llm.call import OperatorSettings
from flink_llm.errors import StateError
from flink_llm.handler import AsyncUdf
from flink_llm.kept import Kept, Remembered
from flink_llm.testing import Harness, MemoryMap

NAME = "test.evolving"
NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
VALUES = {int: st.integers(-(2**63), 2**63 - 1), str: st.text(), list: st.lists(st.integers(0, 9)), bytes: st.binary()}
FIELDS = st.dictionaries(NAMES, st.sampled_from(list(VALUES)), max_size=5)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(codec, "_registered", dict(codec._registered))
    monkeypatch.setattr(codec, "_names", dict(codec._names))


def release(*fields, **registered):
    """Another release of the program, with these fields of its record."""
    codec._registered.pop(NAME, None)
    return codec.register(NAME, msgspec.defstruct("Evolving", fields, kw_only=True), **registered)


def with_defaults(fields, defaults):
    return [(name, kind, msgspec.field(default_factory=lambda name=name: defaults[name])) for name, kind in fields]


@given(st.data(), FIELDS, FIELDS)
def test_fields_come_and_go(data, before, after):
    kinds = {**after, **before}  # a field that stays keeps its type
    after = {name: kinds[name] for name in after}
    values = {name: data.draw(VALUES[kind]) for name, kind in before.items()}
    defaults = {name: data.draw(VALUES[kind]) for name, kind in after.items()}
    written = codec.pack({"turns": [release(*before.items())(**values)]})
    [read] = codec.unpack(_later(written, with_defaults(after.items(), defaults)))["turns"]
    assert msgspec.structs.asdict(read) == {name: values.get(name, defaults[name]) for name in after}


def _later(written, fields):
    release(*fields)
    return written


@given(st.data(), FIELDS)
def test_a_renamed_field_keeps_its_value(data, fields):
    assume("a" in fields)
    values = {name: data.draw(VALUES[kind]) for name, kind in fields.items()}
    written = codec.pack(release(*fields.items())(**values))
    renamed = {("new" if name == "a" else name): kind for name, kind in fields.items()}
    release(*renamed.items(), version=2, upgrade=lambda old, version: {**old, "new": old["a"]})
    expected = {("new" if name == "a" else name): value for name, value in values.items()}
    read = codec.unpack(written)
    assert msgspec.structs.asdict(read) == expected
    assert codec.unpack(codec.pack(read)) == read  # what it writes now is upgraded no more


@given(st.integers(1, 5), st.integers(1, 5))
def test_an_upgrade_is_told_the_version_and_a_later_one_is_refused(wrote, reads):
    written = codec.pack({"n": release(("n", int), version=wrote)(n=0)})
    release(("n", int), version=reads, upgrade=lambda old, version: {"n": version})
    if wrote > reads:
        with pytest.raises(StateError, match=rf"'{NAME}' of version {wrote}, this job knows it up to version {reads}"):
            codec.unpack(written)
    else:
        assert codec.unpack(written)["n"].n == (0 if wrote == reads else wrote)


@given(FIELDS)
def test_a_field_that_is_missed_is_named_with_both_versions(fields):
    values = {name: kind() for name, kind in fields.items()}
    written = codec.pack(release(*fields.items())(**values))
    release(*fields.items(), ("needed", int), version=2)
    with pytest.raises(StateError, match=r"written in version 1, Evolving is version 2: .*`needed`"):
        codec.unpack(written)


def test_an_upgrade_that_raises_says_so():
    written = codec.pack(release(("n", int))(n=1))
    release(("n", int), version=2, upgrade=lambda old, version: {"n": old["m"]})
    with pytest.raises(StateError, match=r"no longer fits .* KeyError: 'm'"):
        codec.unpack(written)


def test_nested_records_are_upgraded_first():
    class Inner(msgspec.Struct):
        n: int

    def again(**registered):
        codec._registered.pop("test.inner", None)
        codec.register("test.inner", Inner, **registered)

    again()
    written = codec.pack(release(("inner", Inner))(inner=Inner(1)))
    again(version=2, upgrade=lambda old, version: {"n": old["n"] + 10})
    release(("n", int), version=2, upgrade=lambda old, version: {"n": old["inner"].n})
    assert codec.unpack(written).n == 11


def test_a_version_is_registered_once():
    kind = release(("n", int), version=2)
    assert codec.register(NAME, kind, version=2) is kind
    with pytest.raises(ValueError, match="registered as version 2, and as 3 now"):
        codec.register(NAME, kind, version=3)
    with pytest.raises(ValueError, match="versions begin at 1"):
        codec.register("test.zero", msgspec.defstruct("Zero", []), version=0)


@given(st.binary(max_size=60))
def test_damaged_state_is_a_state_error_or_a_value(data):
    for written in (data, b"\x01" + data, b"\x01\xc7" + bytes([len(data), 1]) + data):
        with contextlib.suppress(StateError):
            codec.unpack(written)


@given(st.integers(1, 11), st.lists(st.integers(0, 9), max_size=3))
def test_an_arrival_of_another_release(length, beyond):
    """One that knew fewer fields, or more behind them."""
    full = Arrival(key="k", value=b"v", from_kafka=True, topic="t", partition=1, offset=2, timestamp=3)
    values = codec.unpack(full.to_bytes())
    assert Arrival.from_bytes(codec.pack([*values, *beyond])) == full
    read = Arrival.from_bytes(codec.pack(values[:length]))
    assert [getattr(read, name) for name in Arrival.__struct_fields__[:length]] == values[:length]
    assert [getattr(read, name) for name in Arrival.__struct_fields__[length:]] == [
        getattr(Arrival(), name) for name in Arrival.__struct_fields__[length:]
    ]


@given(st.binary(), st.none() | st.text(), st.lists(st.integers(0, 9), max_size=3))
def test_entries_of_a_release_that_knew_more(value, topic, beyond):
    kept = Kept(MemoryMap())
    remembered = Remembered(b"d" * 16, b"h" * 32, 7)
    kept.entries.put(remembered.name, codec.pack([value, topic, *beyond]))
    kept.entries.put(b"f" + bytes(8), codec.pack([5, value, *beyond]))
    assert kept.answer(remembered) == (value, topic)
    assert kept.record(0) == (5, value)


class Remembering(AsyncUdf):
    """Keeps the record that is registered under NAME."""

    stateful = True

    async def call(self, request: dict, ctx):
        ctx.state["last"] = codec._registered[NAME].record_type(n=request["n"])
        return {"request_id": request["request_id"]}


def arrived(number):
    return Arrival(key="k", element={"request_id": str(number), "n": number}).to_bytes()


@pytest.mark.parametrize("known", [(("n", int), ("needed", str)), (("n", str),)], ids=["missing", "type"])
def test_a_handler_that_cannot_read_its_state_stops_the_job_and_changes_nothing(known):
    release(("n", int))
    with Harness(Remembering(), settings=OperatorSettings(deadline=None)) as harness:
        harness.outputs += harness.shard.receive(arrived(1))
        harness.finish()
        kept = harness.checkpoint()
    release(*known, version=2)
    before = dict(kept.entries.data)
    with Harness(Remembering(), settings=OperatorSettings(deadline=None), state=kept) as harness:
        with pytest.raises(StateError, match=r"no longer fits its type: written in version 1, Evolving is version 2"):
            harness.outputs += harness.shard.receive(arrived(2))
            harness.finish()
        assert not harness.outputs
    left = {name: value for name, value in kept.entries.data.items() if not name.startswith(b"f")}
    assert left == before
