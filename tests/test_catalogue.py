"""The ready handlers, over scripted models, through the library's own runner and state."""

import json

import msgspec
import pytest

from flink_llm.config import Chat
from flink_llm.engine.protocol import Done, Options
from flink_llm.records import Logprob
from flink_llm.testing import FakeServices, Harness, Script, ScriptedBackend
from flink_llm.udfs.catalogue import Classify, Embed, Enrich, Generate, Rerank, Tag

CUSTOMERS = {"customer": {"user-1": {"first_name": "Ada", "open_orders": 2}}}


def asked(text="hello", **fields):
    return {
        "request_id": "r1",
        "session_id": "s1",
        "messages": [{"role": "user", "content": text}],
        **fields,
    }


def run(udf, *requests, services=None, key="session_id"):
    with Harness(udf, services or FakeServices(CHAT, CUSTOMERS), key=key) as harness:
        for request in requests:
            harness.send(request)
        harness.finish()
    return harness


CHAT = {"demo": Script(text="you said {last}", tokens=5), "slow": Script(first_ms=50, gap_ms=5000, tokens=3)}


def test_a_reply_is_streamed_and_whole():
    ran = run(Generate(Chat(model="demo")), asked())
    [response] = ran.results()
    assert response["text"] == "you said hello"
    assert response["finish_reason"] == "stop"
    assert response["model"] == "demo"
    assert response["masked"] == []
    assert len(ran.partials()) > 1
    assert [token["sequence"] for token in ran.partials()] == list(range(len(ran.partials())))
    assert {token["generation_id"] for token in ran.partials()} == {response["generation_id"]}


def test_the_response_holds_the_features_it_was_grounded_in():
    [response] = run(Generate(Chat(model="demo", features="customer")), asked(user_id="user-1")).results()
    assert response["features"] == {"first_name": "Ada", "open_orders": 2}
    assert response["feature_age_s"] == 0.0


@pytest.mark.parametrize(
    ("text", "shown", "found"),
    [
        ("mail ada@example.org today", "mail [e-mail] today", ["email"]),
        ("pay with 4111 1111 1111 1111 now", "pay with [card] now", ["card"]),
        ("order 1042, 2026-11-26", "order 1042, 2026-11-26", []),
    ],
)
def test_what_is_private_is_masked_in_tokens_too(text, shown, found):
    ran = run(Generate(Chat(model="demo")), asked(text))
    [response] = ran.results()
    assert response["text"] == f"you said {shown}"
    assert response["masked"] == found
    assert "".join(token["text"] for token in ran.partials()) == response["text"]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (asked(model="other"), "unknown_model"),
        (asked("x" * 101), "too_large"),
        (asked(max_tokens=-1), "invalid"),
        (asked(max_tokens=10**9), "invalid"),
        ({"request_id": "r1", "session_id": "s1"}, "invalid"),
        (b"{", "malformed"),
        (None, "null_value"),
    ],
)
def test_what_cannot_be_answered_is_a_failure(request_, code):
    ran = run(Generate(Chat(model="demo", max_characters=100)), request_)
    assert [failure["code"] for failure in ran.failures()] == [code]
    assert ran.results() == []


class Asked(ScriptedBackend):
    """Keeps the options that it was asked with, and reports log-probabilities."""

    def start(self, work, generation, emit):
        self.options = work.options
        self.adapter = work.adapter

        def told(event):
            emit(msgspec.structs.replace(event, logprobs=LOGPROBS) if isinstance(event, Done) else event)

        return super().start(work, generation, told)


LOGPROBS = [Logprob(id=7, text="you", logprob=-0.5, top=[Logprob(id=7, text="you", logprob=-0.5)])]
OPTIONS = {
    "max_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 4, "stop": ["."],
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logprobs": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked_for", "adapter"),
    [
        ({}, "polite"),
        ({"adapter": "legal"}, "legal"),
        ({"adapter": ""}, ""),
        ({"model": "demo"}, "polite"),
        ({"model": "slow"}, ""),  # the default is the default model's
        ({"model": "slow", "adapter": "legal"}, "legal"),
    ],
)
def test_a_request_chooses_its_adapter(asked_for, adapter):
    services = FakeServices(backend=Asked({"demo": CHAT["demo"], "slow": CHAT["demo"]}))
    run(Generate(Chat(model="demo", adapter="polite"), others=["slow"]), asked(**asked_for), services=services)
    assert services.backend.adapter == adapter


def test_options_of_a_request_are_those_of_its_generation():
    services = FakeServices(backend=Asked(CHAT))
    bias = {"logit_bias": {"7": -100}}  # a JSON object has no other keys than texts
    ran = run(Generate(Chat(model="demo")), asked(**OPTIONS, **bias), services=services)
    assert ran.failures() == []
    [response] = ran.results()
    assert services.backend.options == Options(**OPTIONS, logit_bias=[(7, -100.0)])
    assert response["logprobs"][0]["top"][0]["text"] == "you"
    for name, value in {"json_schema": {"type": "integer"}, "regex": "a+", "choices": ["a", "b"]}.items():
        services = FakeServices(backend=Asked(CHAT))
        run(Generate(Chat(model="demo")), asked(**{name: value}), services=services)
        said = getattr(services.backend.options, name)
        assert (json.loads(said) if name == "json_schema" else said) == value


def test_log_probabilities_do_not_show_what_was_masked():
    services = FakeServices(backend=Asked(CHAT))
    ran = run(Generate(Chat(model="demo")), asked("mail ada@example.org", logprobs=0), services=services)
    assert ran.results()[0]["masked"] == ["email"]
    assert ran.results()[0]["logprobs"] == []


@pytest.mark.parametrize("field", [{"min_p": 2}, {"logit_bias": {"x": 1}}, {"logprobs": 21}, {"choices": []}])
def test_an_option_out_of_its_range_is_an_invalid_record(field):
    [failure] = run(Generate(Chat(model="demo")), asked(**field)).failures()
    assert failure["code"] == "invalid"
    assert next(iter(field)) in failure["message"]


def test_another_model_may_be_asked_for_by_name():
    [response] = run(Generate(Chat(model="slow"), ["demo"]), asked(model="demo")).results()
    assert response["model"] == "demo"


def test_the_deadline_leaves_what_there_is():
    ran = run(Generate(Chat(model="slow")), asked("abcdef", deadline=0.3))
    [response] = ran.results()
    assert (response["text"], response["finish_reason"]) == ("ab", "deadline")
    assert ran.services.backend.cancelled == 1


def test_a_text_becomes_a_vector():
    services = FakeServices({"e": Script(kind="embedding", dimension=4)})
    [response] = run(Embed("e"), {"request_id": "r1", "text": "hi"}, services=services, key="request_id").results()
    assert len(response["vector"]) == 4
    assert response["model"] == "e"


@pytest.mark.parametrize(("dimensions", "outcome"), [(3, 3), (4, 4), (0, "bad_option"), (5, "bad_option")])
def test_a_vector_can_be_cut(dimensions, outcome):
    services = FakeServices({"e": Script(kind="embedding", dimension=4)})
    ran = run(Embed("e", dimensions), {"request_id": "r1", "text": "hi"}, services=services, key="request_id")
    found = [len(response["vector"]) for response in ran.results()]
    assert found + [failure["code"] for failure in ran.failures()] == [outcome]


def test_a_text_names_entities():
    services = FakeServices({"t": Script(kind="token_classifier", entities={"Lyon": "LOC", "Ada": "PER"})})
    text = "Ada is in Lyon"
    [response] = run(Tag("t"), {"request_id": "r1", "text": text}, services=services, key="request_id").results()
    assert response["entities"] == [
        {"label": "PER", "score": 1.0, "start": 0, "end": 3, "text": "Ada"},
        {"label": "LOC", "score": 1.0, "start": 10, "end": 14, "text": "Lyon"},
    ]
    assert response["model"] == "t"


def test_documents_are_ordered_by_a_query():
    services = FakeServices({"r": Script(kind="reranker")})
    request = {"request_id": "r1", "query": "red shoes", "documents": ["a red hat", "shoes", "no", "red shoes"]}
    [response] = run(Rerank("r"), request, services=services, key="request_id").results()
    assert response["scores"] == [0.5, 0.5, 0, 1]
    assert response["order"] == [3, 0, 1, 2]


@pytest.mark.parametrize("request_", [{"query": "q"}, {"query": "q", "documents": ["a", 1]}, {"documents": ["a"]}])
def test_what_is_no_ranking_is_a_failure(request_):
    services = FakeServices({"r": Script(kind="reranker")})
    ran = run(Rerank("r"), {"request_id": "r1", **request_}, services=services, key="request_id")
    assert [failure["code"] for failure in ran.failures()] == ["invalid"]


def test_a_text_gets_a_label():
    services = FakeServices({"c": Script(kind="classifier", labels=["good", "bad"])})
    [response] = run(Classify("c"), {"request_id": "r1", "text": "hi"}, services=services, key="request_id").results()
    assert response["label"] in ("good", "bad")
    assert sum(response["scores"].values()) == pytest.approx(1)


def test_any_object_gets_features():
    services = FakeServices(features=CUSTOMERS)
    known, unknown = ({"id": name, "who": name} for name in ("user-1", "user-2"))
    results = run(Enrich("customer", {"user_id": "who"}), known, unknown, services=services, key="id").results()
    there = {"user_id": "user-1", "first_name": "Ada", "open_orders": 2}
    assert results[0] == {**known, "features": there, "feature_age_s": 0.0}
    absent = {"user_id": "user-2", "first_name": None, "open_orders": None}
    assert results[1] == {**unknown, "features": absent, "feature_age_s": None}
