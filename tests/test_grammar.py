"""Constrained decoding: whatever a model would like to say, what comes out fits, and is whole in time."""

import asyncio
import gc
import json
import math
import re
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.generation import Model
from flink_llm.engine.grammar import Grammars, definition
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import WorkTable
from flink_llm.errors import RecordError
from flink_llm.local import demo_job

END = 0


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<end>", *alphabet, "true", "null", '{"', '":', '","', "abc", "000"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZER = byte_level()
GRAMMARS = Grammars(TOKENIZER.to_str().encode(), TOKENIZER.get_vocab_size(), [END])


def say(made, max_tokens, seed):
    """What a model that likes every token as well says."""
    grammar = GRAMMARS.grammar(made, max_tokens)
    random = np.random.default_rng(seed)
    said = []
    while len(said) < max_tokens and not grammar.over:
        allowed = np.flatnonzero(grammar.allowed())
        token = grammar.take(int(random.choice(allowed)))
        if token == END:
            break
        said.append(token)
    return TOKENIZER.decode(said)


LEAVES = st.sampled_from(
    [
        {"type": "string"},
        {"type": "integer"},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", "green", 3]},
        {"type": "string", "maxLength": 5},
        {"type": "string", "minLength": 30},
        {"type": "string", "pattern": "^[0-9]+ units$"},
        {"type": "string", "format": "email"},
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "integer", "minimum": 1, "multipleOf": 7},
    ]
)


def objects(inner):
    fields = st.dictionaries(st.sampled_from(["a", "long name", "ü", "x"]), inner, min_size=1, max_size=3)
    return fields.map(
        lambda found: {
            "type": "object",
            "properties": found,
            "required": list(found),
            "additionalProperties": False,
        }
    )


SCHEMAS = st.recursive(
    LEAVES, lambda inner: objects(inner) | inner.map(lambda item: {"type": "array", "items": item}), max_leaves=6
)


def fits(value, schema):
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        fields = schema["properties"]
        return set(value) == set(fields) and all(fits(value[name], fields[name]) for name in fields)
    if kind == "array":
        return isinstance(value, list) and all(fits(item, schema["items"]) for item in value)
    if kind == "string":
        formed = {"pattern": r"[0-9]+ units", "format": r"(?s)[^@]+@[^@]+"}
        return (
            isinstance(value, str)
            and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            and all(re.fullmatch(pattern, value) for name, pattern in formed.items() if name in schema)
        )
    if kind == "integer":
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and value >= schema.get("minimum", value) and value % schema.get("multipleOf", 1) == 0
    if kind == "number":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and value > schema.get("exclusiveMinimum", -math.inf)
    return isinstance(value, {"boolean": bool, "null": type(None)}[kind])


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32 - 1), st.integers(0, 80))
def test_whatever_is_said_fits_the_schema_and_is_whole(schema, seed, room):
    made = definition(json_schema=schema)
    least = 1
    try:
        GRAMMARS.grammar(made, least)
    except RecordError as error:
        least = int(re.search(r"takes (\d+) tokens", error.message)[1])
    assert fits(json.loads(say(made, least + room, seed)), schema)


@pytest.mark.parametrize(
    ("asked", "fit"),
    [
        ({"regex": r"[0-9]+ units"}, r"[0-9]+ units"),
        ({"regex": r"(ab)*c"}, r"(ab)*c"),
        ({"regex": r"[^;]{20,};"}, r"[^;]{20,};"),
        ({"json_schema": {"type": "string", "minLength": 600}}, r'"(?s:.){600,}"'),
    ],
)
def test_a_way_to_the_end_is_found_where_closing_what_is_open_finds_none(asked, fit):
    for seed in range(5):
        assert re.fullmatch(fit, say(definition(**asked), 650, seed))
    if "json_schema" not in asked:
        GRAMMARS.grammar(definition(**asked), 24)  # as short as it may be
    else:
        with pytest.raises(RecordError, match=r"max_tokens is 64, the shortest"):
            GRAMMARS.grammar(definition(**asked), 64)


def test_a_choice_is_one_of_the_list():
    choices = ["yes", "no", 'a "quoted" one']
    said = {say(definition(choices=choices), 40, seed) for seed in range(20)}
    assert said <= set(choices)
    assert len(said) > 1


def test_a_regex_is_matched_whole():
    for seed in range(10):
        assert re.fullmatch(r"[a-c]{2,9}-\d+", say(definition(regex=r"[a-c]{2,9}-[0-9]+"), 60, seed))


@pytest.mark.parametrize(
    "wanted",
    [
        {"json_schema": "{"},
        {"json_schema": {"type": "no such type"}},
        {"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}},
        {"regex": "("},
    ],
    ids=str,
)
def test_what_cannot_be_satisfied_is_the_records_fault(wanted):
    with pytest.raises(RecordError) as refused:
        GRAMMARS.grammar(definition(**wanted), 50)
    assert refused.value.code == "bad_option"


def test_what_is_too_much_work_to_follow_fails_its_record_and_no_later_one():
    folder = demo_job.demo_model()
    raw, manifest = (folder / "tokenizer.json").read_bytes(), json.loads((folder / "manifest.json").read_text())
    tokenizer, ends = Tokenizer.from_str(raw.decode()), manifest["eos_token_ids"]
    grammars = Grammars(raw, manifest["vocab_size"], ends)
    letters = ("[a-c]", "[d-f]", "[g-i]", "[j-l]", "[m-o]", "[p-s]", "[t-z]")
    made = definition(regex=f"[^q]*({'|'.join(f'{each}[^q]{{{300 + 10 * i}}}' for i, each in enumerate(letters))})q")
    last = {*ends, *(i for i in range(manifest["vocab_size"]) if "q" in tokenizer.decode([i]))}

    def go_on(grammar, seed):
        random = np.random.default_rng(seed)
        for number in range(300):
            allowed = [token for token in np.flatnonzero(grammar.allowed()) if token not in last]
            try:
                grammar.take(int(random.choice(allowed or ends)))
            except RecordError as error:
                assert error.code == "bad_option" and "too much work to follow" in error.message
                return number
        return None

    first, beside = grammars.grammar(made, 500), grammars.grammar(made, 500)
    reached = go_on(first, 0)
    assert reached > 1
    assert go_on(beside, 0) == 0, "it shares what the first has used up, and says so too"
    assert go_on(grammars.grammar(made, 500), 0) == reached


def test_one_way_to_ask_at_a_time():
    with pytest.raises(RecordError, match="json_schema and regex cannot be asked for together"):
        definition(json_schema={"type": "string"}, regex="a")


def test_less_room_than_any_answer_takes_is_said():
    with pytest.raises(RecordError, match=r"max_tokens is 3, the shortest that was found .* takes \d+ tokens"):
        GRAMMARS.grammar(definition(json_schema={"enum": ["a long word indeed"]}), 3)


def test_the_engine_constrains_one_request_and_leaves_its_neighbours_alone():
    schema = {"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"]}
    question = [{"role": "user", "content": "Where is order 1042?"}]

    async def ask():
        table = WorkTable(OnnxBackend(HostSettings(device="cpu")))
        model = Model(table, "support-chat", str(demo_job.demo_model()))
        await model.load()
        alone = await model.chat(question, max_tokens=40)
        replies = await asyncio.gather(
            *(
                model.chat(question, max_tokens=40, **options)
                for options in ({}, {"json_schema": schema}, {"choices": ["yes", "no"]}, {"regex": "[0-9]{3}"}, {})
            )
        )
        await table.close()
        return alone.text, [(reply.text, reply.finish_reason) for reply in replies]

    alone, replies = asyncio.run(ask())
    assert replies[0] == replies[4] == (alone, "stop")
    assert isinstance(json.loads(replies[1][0])["order"], int)
    assert replies[2][0] in ("yes", "no")
    assert re.fullmatch("[0-9]{3}", replies[3][0])


def test_what_makes_grammars_is_free_once_nobody_has_it():
    gc.collect()
    gc.disable()  # as a host does not collect for a long while
    try:
        made = Grammars(TOKENIZER.to_str().encode(), TOKENIZER.get_vocab_size(), [END])
        made.grammar(definition(choices=["yes", "no"]), 8)
        gone = weakref.ref(made)
        del made
        assert gone() is None
    finally:
        gc.enable()
