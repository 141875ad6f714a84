"""What outlives a release, literally: bytes of state, records of topics, frames between client and host.

A test that fails here says that a savepoint, a consumer or a host of the release before would be lost.
What was written once stays here and must be read; a compatible addition stands beside it.
"""

import asyncio
from typing import get_args

import msgspec
import pytest

from flink_llm import codec, shard
from flink_llm.arrivals import Arrival
from flink_llm.call import OperatorSettings
from flink_llm.engine import protocol
from flink_llm.engine.protocol import Entity, FrameReader, frame
from flink_llm.handler import AsyncUdf
from flink_llm.kept import Kept
from flink_llm.records import (
    ChatResponse,
    ClassifyResponse,
    EmbedResponse,
    EntityRecord,
    Failure,
    Logprob,
    Message,
    RerankResponse,
    TagResponse,
    Timings,
    TokenRecord,
    Usage,
)
from flink_llm.testing import Harness, MemoryMap

EXPIRY_MS = 4_102_444_800_000
NO_LIMITS = OperatorSettings(deadline=None, remember_s=600)


def holds(new, old):
    """Whether all that `old` says stands in `new`, which may name more fields."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(name in new and holds(new[name], old[name]) for name in old)
    if isinstance(old, list):
        return len(new) == len(old) and all(map(holds, new, old))
    return bool(new == old)


ARRIVAL = Arrival(
    key="s1",
    value=b'{"session_id": "s1"}',
    from_kafka=True,
    kafka_key=b"k",
    headers={"trace": b"\xff", "none": None},
    topic="chat.requests",
    partition=3,
    offset=42,
    timestamp=1_700_000_000_000,
)
ARRIVAL_BYTES = (
    "019ba27331c0c4147b2273657373696f6e5f6964223a20227331227dc0c3c4016b82a57472616365c401ffa46e6f6e65c0"
    "ad636861742e7265717565737473032acf0000018bcfe56800"
)


def test_an_arrival_in_flight():
    assert ARRIVAL.to_bytes().hex() == ARRIVAL_BYTES
    assert Arrival.from_bytes(bytes.fromhex(ARRIVAL_BYTES)) == ARRIVAL


KEPT = {
    b"m": b"\x01\x92\x10\xcc\x80",
    b"s\xc3\xa9": b"\x01\x81\xa1n\x01",
    b"a\xff\xd9\x02\x122&=\xaaF\x06\x06Gbe\nB"  # digest of key and request id
    b"\x1c\x9dx\x9dJ\x16\x7f\r\x85\xbe\x96-\xd4Ra\xfc\xaen\x06b\x8d\xf6\rg\x7f\xb0\xc7\x06\x87h\xb2?"  # of the payload
    b"\x00\x00\x03\xbb,\xc3\xd8\x00": b'\x01\x92\xc4\x19{"request_id":"r1","n":1}\xc0',
    b"f\x00\x00\x00\x00\x00\x00\x00\x01": b"\x01\x92\xcf\x00\x00\x03\xbb,\xba\xb0@\xc46"
    b'\x01\x9b\xa2\xc3\xa9\xc0\xc4%{"request_id":"r2","session_id":"\xc3\xa9"}\xc0\xc3\xc0\x80\xa1t\x00\x01\xc0',
}


class Counting(AsyncUdf):
    """Counts a key's requests; one that is to be in flight never ends."""

    stateful = True

    def __init__(self, *, ends):
        self.ends = ends

    async def call(self, request: dict, ctx):
        if request["request_id"] == "r2" and not self.ends:
            await asyncio.Event().wait()
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        return {"request_id": request["request_id"], "n": ctx.state["n"]}


def arrived(request_id, offset):
    value = b'{"request_id":"%s","session_id":"\xc3\xa9"}' % request_id.encode()
    return Arrival(key="é", value=value, from_kafka=True, topic="t", partition=0, offset=offset).to_bytes()


def test_what_a_shard_writes(monkeypatch):
    monkeypatch.setattr(shard.Shard, "_now_ms", lambda self: EXPIRY_MS - 600_000)
    with Harness(Counting(ends=False), settings=NO_LIMITS) as harness:
        list(harness.shard.receive(arrived("r1", 0)))
        harness.finish()
        list(harness.shard.receive(arrived("r2", 1)))
        assert harness.checkpoint().entries.data == KEPT


def test_what_a_shard_reads():
    entries = MemoryMap()
    entries.data = dict(KEPT)
    with Harness(Counting(ends=True), settings=NO_LIMITS, state=Kept(entries)) as harness:
        harness.finish()
        harness.outputs += harness.shard.receive(arrived("r1", 2))
        assert harness.results() == [{"request_id": "r2", "n": 2}, {"request_id": "r1", "n": 1}]


MESSAGES = b"\x01\x81\xa5turns\x91\xc7#\x01\x92\xacchat.message\x82\xa4role\xa4user\xa7content\xa1x"


def test_a_dialogue_in_a_keys_state():
    state = {"turns": [Message("user", "x")]}
    assert codec.unpack(MESSAGES) == state
    assert codec.pack(state) == MESSAGES


class Order(msgspec.Struct):
    """A record that has had another version."""

    number: int


def test_a_record_of_a_later_version(monkeypatch):
    monkeypatch.setattr(codec, "_registered", dict(codec._registered))
    monkeypatch.setattr(codec, "_names", dict(codec._names))
    codec.register("order", Order, version=2, upgrade=lambda old, version: {"number": old["n"]})
    assert codec.pack(Order(7)) == b"\x01\xc7\x11\x01\x93\xa5order\x81\xa6number\x07\x02"
    assert codec.unpack(codec.pack(Order(7))) == Order(7)
    assert codec.unpack(b"\x01\xc7\x0b\x01\x92\xa5order\x81\xa1n\x07") == Order(7)


LOGPROB = Logprob(id=7, text="a", logprob=-0.5, top=[Logprob(id=7, text="a", logprob=-0.5)])
BY = {"request_id": "r", "model": "m", "model_hash": "ab", "usage": Usage(prompt_tokens=1, completion_tokens=2)}
BY_BYTES = b'"model":"m","model_hash":"ab","usage":{"prompt_tokens":1,"completion_tokens":2}'
RECORDS = [
    (
        ChatResponse(
            **BY,
            session_id="s",
            text="a",
            finish_reason="stop",
            generation_id="g",
            timings=Timings(queue_ms=1.5, first_token_ms=2.5, per_token_ms=3.5, total_ms=4.5),
            features={"n": 1},
            feature_age_s=0.5,
            masked=["email"],
            logprobs=[LOGPROB],
        ),
        b'{"request_id":"r","session_id":"s","text":"a","finish_reason":"stop",%s,"generation_id":"g",'
        b'"timings":{"queue_ms":1.5,"first_token_ms":2.5,"per_token_ms":3.5,"total_ms":4.5},'
        b'"features":{"n":1},"feature_age_s":0.5,"masked":["email"],"logprobs":[{"id":7,"text":"a",'
        b'"logprob":-0.5,"top":[{"id":7,"text":"a","logprob":-0.5,"top":[]}]}]}' % BY_BYTES,
    ),
    (
        TokenRecord(request_id="r", generation_id="g", sequence=0, text="a"),
        b'{"request_id":"r","generation_id":"g","sequence":0,"text":"a"}',
    ),
    (EmbedResponse(**BY, vector=[0.5, -1.0]), b'{"request_id":"r","vector":[0.5,-1.0],%s}' % BY_BYTES),
    (
        ClassifyResponse(**BY, label="a", scores={"a": 0.75, "b": 0.25}),
        b'{"request_id":"r","label":"a","scores":{"a":0.75,"b":0.25},%s}' % BY_BYTES,
    ),
    (
        TagResponse(**BY, entities=[EntityRecord(label="PER", score=0.5, start=0, end=3, text="Ada")]),
        b'{"request_id":"r","entities":[{"label":"PER","score":0.5,"start":0,"end":3,"text":"Ada"}],%s}' % BY_BYTES,
    ),
    (
        RerankResponse(**BY, scores=[0.25, 0.75], order=[1, 0]),
        b'{"request_id":"r","scores":[0.25,0.75],"order":[1,0],%s}' % BY_BYTES,
    ),
    (
        Failure(
            code="invalid",
            message="no",
            key="s",
            request_id="r",
            topic="t",
            partition=3,
            offset=42,
            handler="h",
            failed_at=7,
            headers={"a": "b"},
            generation_id="g",
            payload_sha256="ab",
            payload="x",
        ),
        b'{"code":"invalid","message":"no","key":"s","request_id":"r","topic":"t","partition":3,"offset":42,'
        b'"handler":"h","failed_at":7,"headers":{"a":"b"},"generation_id":"g","payload_sha256":"ab","payload":"x"}',
    ),
]


@pytest.mark.parametrize(("record", "written"), RECORDS, ids=lambda each: type(each).__name__)
def test_a_record_of_a_topic(record, written):
    assert codec.decode(written, type(record)) == record
    assert holds(codec.decode(codec.encode(record)), codec.decode(written))


FRAMES = [
    (
        "host",
        protocol.Hello(protocol=1, package="0.1.0", client="c"),
        b"\x00\x00\x00-\x84\xa4type\xa5hello\xa8protocol\x01\xa7package\xa50.1.0\xa6client\xa1c",
    ),
    (
        "host",
        protocol.Load(call=1, folder="/m", sha256="ab"),
        b"\x00\x00\x00%\x84\xa4type\xa4load\xa4call\x01\xa6folder\xa2/m\xa6sha256\xa2ab",
    ),
    (
        "host",
        protocol.Submit(
            call=2,
            model="ab",
            kind="generate",
            work="w",
            request_id="r",
            messages=[{"role": "user", "content": "x"}],
            features={"n": 1},
            deadline=2.5,
            priority=1,
            documents=["d"],
            dimensions=8,
        ),
        b"\x00\x00\x01\x8e\x8f\xa4type\xa6submit\xa4call\x02\xa5model\xa2ab\xa4kind\xa8generate\xa4work\xa1w"
        b"\xaarequest_id\xa1r\xa8messages\x91\x82\xa4role\xa4user\xa7content\xa1x\xa8features\x81\xa1n\x01"
        b"\xa6prompt\xc0\xa4text\xc0\xa7options\x8f\xaamax_tokens\xcd\x01\x00\xabtemperature\xcb" + bytes(8) +
        b"\xa5top_k\x00\xa5top_p\xcb?\xf0" + bytes(6) + b"\xa4seed\x00\xa4stop\x90\xabjson_schema\xa0\xa5regex\xa0"
        b"\xa7choices\x90\xa5min_p\xcb" + bytes(8) + b"\xb2repetition_penalty\xcb?\xf0" + bytes(6) +
        b"\xb0presence_penalty\xcb" + bytes(8) + b"\xb1frequency_penalty\xcb" + bytes(8) +
        b"\xaalogit_bias\x90\xa8logprobs\xc0\xa8deadline\xcb@\x04" + bytes(6) +
        b"\xa8priority\x01\xa9documents\x91\xa1d\xaadimensions\x08",
    ),
    ("host", protocol.Cancel(call=2), b"\x00\x00\x00\x13\x82\xa4type\xa6cancel\xa4call\x02"),
    ("host", protocol.Ping(call=3), b"\x00\x00\x00\x11\x82\xa4type\xa4ping\xa4call\x03"),
    (
        "client",
        protocol.Welcome(protocol=1, package="0.1.0", pid=9, device="cpu"),
        b"\x00\x00\x006\x85\xa4type\xa7welcome\xa8protocol\x01\xa7package\xa50.1.0\xa3pid\t\xa6device\xa3cpu",
    ),
    (
        "client",
        protocol.Loaded(call=1, name="m", sha256="ab", kind="decoder", context_length=64, labels=["a"]),
        b"\x00\x00\x00K\x87\xa4type\xa6loaded\xa4call\x01\xa4name\xa1m\xa6sha256\xa2ab\xa4kind\xa7decoder"
        b"\xaecontext_length@\xa6labels\x91\xa1a",
    ),
    (
        "client",
        protocol.Tokens(call=2, generation="g", sequence=0, text="a", model="ab"),
        b"\x00\x00\x00:\x86\xa4type\xa6tokens\xa4call\x02\xaageneration\xa1g\xa8sequence\x00\xa4text\xa1a\xa5model\xa2ab",
    ),
    (
        "client",
        protocol.Done(
            call=2,
            generation="g",
            text="a",
            finish="length",
            prompt_tokens=1,
            completion_tokens=2,
            vector=b"\0\1",
            scores=[0.5],
            logprobs=[LOGPROB],
            entities=[Entity("l", 0.5, 0, 1)],
            model="ab",
        ),
        b"\x00\x00\x016\x8f\xa4type\xa4done\xa4call\x02\xaageneration\xa1g\xa4text\xa1a\xa6finish\xa6length"
        b"\xadprompt_tokens\x01\xb1completion_tokens\x02\xa8queue_ms\xcb" + bytes(8) + b"\xaefirst_token_ms\xcb" +
        bytes(8) + b"\xacper_token_ms\xcb" + bytes(8) +
        b"\xa6vector\xc4\x02\x00\x01\xa6scores\x91\xcb?\xe0" + bytes(6) + b"\xa8logprobs\x91\x84\xa2id\x07"
        b"\xa4text\xa1a\xa7logprob\xcb\xbf\xe0" + bytes(6) +
        b"\xa3top\x91\x84\xa2id\x07\xa4text\xa1a\xa7logprob\xcb\xbf\xe0" + bytes(6) + b"\xa3top\x90"
        b"\xa8entities\x91\x84\xa5label\xa1l\xa5score\xcb?\xe0" + bytes(6) + b"\xa5start\x00\xa3end\x01\xa5model\xa2ab",
    ),
    (
        "client",
        protocol.Fault(call=2, kind="record", code="invalid", message="no", retry_after=0.5),
        b"\x00\x00\x00K\x86\xa4type\xa5fault\xa4call\x02\xa4kind\xa6record\xa4code\xa7invalid\xa7message\xa2no"
        b"\xabretry_after\xcb?\xe0" + bytes(6),
    ),
    ("client", protocol.Pong(call=3), b"\x00\x00\x00\x11\x82\xa4type\xa4pong\xa4call\x03"),
]  # fmt: skip


@pytest.mark.parametrize(("side", "message", "sent"), FRAMES, ids=lambda each: type(each).__name__)
def test_a_frame_of_the_protocol(side, message, sent):
    assert FrameReader(side).feed(sent) == [message]
    now = frame(message)
    assert int.from_bytes(now[:4], "big") == len(now) - 4
    assert holds(msgspec.msgpack.decode(now[4:]), msgspec.msgpack.decode(sent[4:]))


def test_every_message_of_the_protocol_stands_here():
    assert {type(message) for _, message, _ in FRAMES} == set(get_args(protocol.ToHost) + get_args(protocol.ToClient))
