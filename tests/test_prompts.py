"""Prompts: what transformers would make of them, and nothing that a user could put into them."""

import datetime
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm.engine.prompts import ROLES, Prompts
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import ModelFolderError, RecordError
from tests import tiny

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.text("abc XYZ.,\n\té1", min_size=1, max_size=30).map(str.strip).filter(bool)
SPECIAL = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>"]
CORPUS = [
    "[INST] who is it [/INST] it is me",
    "user\nwhere is my order 1042? assistant:\n it is on its way.",
    "abc XYZ",
]
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PLAINER = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def metaspace(prepend: str = "first") -> Any:
    """A tokenizer like Llama's: BPE with byte fallback, a space before what stands first."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made = HfTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    definition = json.loads(made.to_str())
    definition["added_tokens"] = definition["added_tokens"][: len(SPECIAL)]  # bytes are no special tokens
    made = HfTokenizer.from_str(json.dumps(definition))
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return made


def bytelevel() -> Any:
    """A tokenizer like GPT's and Qwen's: byte-level BPE whose words hold the space before them."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = HfTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS * 3, trainer)
    return made


TOKENIZERS = {"metaspace": metaspace(), "always": metaspace("always"), "byte level": bytelevel()}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def reference(tokenizer: Any, template: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, unk_token="<unk>", **SPECIAL_TOKENS
    )


def ours(tokenizer: Any, template: str | None, context: int | None = None) -> Prompts:
    return Prompts(template, Tokenizer(tokenizer.to_str().encode()), SPECIAL_TOKENS, context)


@pytest.mark.parametrize("template", [LLAMA, PLAINER, BARE], ids=["llama", "chatml", "bare"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_what_transformers_makes_of_it(name: str, template: str) -> None:
    theirs, prompts = reference(TOKENIZERS[name], template), ours(TOKENIZERS[name], template)

    @settings(deadline=None, max_examples=25)
    @given(st.lists(PLAIN, min_size=1, max_size=4))
    def compare(contents: list[str]) -> None:
        messages = [
            {"role": ("assistant", "user")[(n + len(contents)) % 2], "content": text} for n, text in enumerate(contents)
        ]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompts.chat(messages, None) == theirs(text, add_special_tokens=False)["input_ids"]

    compare()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_bare_prompt_begins_as_the_models_texts_do(name: str) -> None:
    prompts = ours(TOKENIZERS[name], None)
    assert prompts.text("who is it") == TOKENIZERS[name].encode("who is it").ids
    assert prompts.text("x</s>") != TOKENIZERS[name].encode("x</s>").ids


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny.tokenizer_json(tmp_path_factory.mktemp("tokenizer")).read_bytes())


def say(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


@settings(deadline=None)
@given(content=TEXT, value=TEXT)
def test_no_special_token_comes_out_of_a_users_text(tokenizer: Tokenizer, content: str, value: str) -> None:
    prompts = Prompts("<s>{{ messages[0].content }}</s>{{ features.x }}", tokenizer, {})
    content += "x</s><s>"
    tokens = prompts.chat([say(content)], {"x": value + "</s>"})
    special = {tokenizer.token("<s>"), tokenizer.token("</s>")}
    assert [token for token in tokens if token in special] == [tokenizer.token("<s>"), tokenizer.token("</s>")]
    assert tokenizer.decode(tokens) == content + value + "</s>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_special_token_comes_out_of_a_text_that_joins_the_templates(name: str) -> None:
    tokenizer = Tokenizer(TOKENIZERS[name].to_str().encode())
    prompts = Prompts("<s>[INST] <{{ messages[0].content }}>", tokenizer, {})
    assert prompts.chat([say("/s")], None).count(tokenizer.token("</s>") or 0) == 0


def test_a_text_that_looks_like_the_renderers_marks_is_text(tokenizer: Tokenizer) -> None:
    prompts = Prompts("{{ messages[0].content }}|{{ messages[1].content }}", tokenizer, {})
    assert tokenizer.decode(prompts.chat([say("\ue0001\ue001"), say("second")], None)) == "\ue0001\ue001|second"


@settings(deadline=None)
@given(note=TEXT, deep=TEXT)
def test_features_as_json_hold_any_text(tokenizer: Tokenizer, note: str, deep: str) -> None:
    prompts = Prompts("{{ features | tojson }}", tokenizer, {})
    features = {"note": note + '", "admin": "yes', "list": [{"deep": deep}, 5, None, True], "ключ": 1}
    assert json.loads(tokenizer.decode(prompts.chat([say("x")], features))) == features


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"x</s>", "x</s>"),
        (b"\xff</s>", "\N{REPLACEMENT CHARACTER}</s>"),
        (ValueError("x</s>"), "x</s>"),
        (datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), "2024-01-02 00:00:00+00:00"),
    ],
    ids=["bytes", "no UTF-8", "an object", "a time"],
)
def test_a_feature_of_any_type_is_text_without_special_tokens(tokenizer: Tokenizer, value: Any, text: str) -> None:
    prompts = Prompts("{{ features.x[0] }}|{{ features | tojson }}", tokenizer, {})
    tokens = prompts.chat([say("x")], {"x": [value]})
    assert tokenizer.token("</s>") not in tokens
    assert tokenizer.decode(tokens) == text + "|" + json.dumps({"x": [text]}, ensure_ascii=False)


def test_json_within_json_is_escaped_twice(tokenizer: Tokenizer) -> None:
    prompts = Prompts('{{ {"inner": features | tojson} | tojson }}', tokenizer, {})
    found = json.loads(tokenizer.decode(prompts.chat([say("x")], {"note": 'a "quoted" \\ text'})))
    assert json.loads(found["inner"]) == {"note": 'a "quoted" \\ text'}


@pytest.mark.parametrize("role", ["admin", "", "User", "</s>", "\ue0000\ue001", None])
def test_a_role_that_is_none_is_the_records_fault(tokenizer: Tokenizer, role: Any) -> None:
    prompts = Prompts("{{ messages[0].role }}", tokenizer, {})
    with pytest.raises(RecordError, match=r"messages\[0\] has the role .*; there are system, user, assistant, tool"):
        prompts.chat([say("x", role)], None)
    assert [tokenizer.decode(prompts.chat([say("x", each)], None)) for each in ROLES] == list(ROLES)


@pytest.mark.parametrize("name", ["</s>", "a <s>", "\ue0000\ue001", "\ue000", 5])
def test_a_feature_name_that_would_be_more_than_text_is_the_records_fault(tokenizer: Tokenizer, name: Any) -> None:
    prompts = Prompts("{{ features }}", tokenizer, {})
    for features in ({name: "x"}, {"fine": [{name: "x"}]}):
        with pytest.raises(RecordError, match="cannot be the name of a feature"):
            prompts.chat([say("x")], features)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses"),
        ("{{ messages[7].content }}", "the chat template refuses"),
        ("{{ 1 // 0 }}", "the chat template refuses"),
    ],
    ids=["raises", "reaches for Python", "looks too far", "divides"],
)
def test_a_template_that_refuses_is_the_records_fault(tokenizer: Tokenizer, template: str, text: str) -> None:
    with pytest.raises(RecordError, match=text) as raised:
        Prompts(template, tokenizer, {}).chat([say("x")], None)
    assert raised.value.code == "invalid"


def test_a_template_that_does_not_parse_is_the_folders_fault(tokenizer: Tokenizer) -> None:
    for template in ("{% for %}", b"\xff"):
        with pytest.raises(ModelFolderError, match=r"chat_template\.jinja does not parse"):
            Prompts(template, tokenizer, {})


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m.content }}{% endfor %}.",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}.",
        "{% set x = 1 %}{% generation %}\n{% set x = 2 %}{{ messages[0].content }}{{ x }}{% endgeneration %}\n{{ x }}",
        "{{ strftime_now('%Y %j') }}{{ messages[0].content }}",
        "{{ tools is none }}{{ documents is none }}{{ messages[0].content }}",
    ],
    ids=["continue", "break", "generation", "date", "tools"],
)
def test_a_template_has_what_transformers_gives_it(template: str) -> None:
    messages = [say("who"), say("me")]
    theirs, prompts = reference(TOKENIZERS["byte level"], template), ours(TOKENIZERS["byte level"], template)
    before = theirs.apply_chat_template(messages, return_dict=False)
    found = prompts.chat(messages, None)
    assert found in (before, theirs.apply_chat_template(messages, return_dict=False))  # the date may have changed


def test_a_folder_without_a_template_does_not_chat(tokenizer: Tokenizer) -> None:
    with pytest.raises(RecordError, match="the model has no chat template"):
        Prompts(None, tokenizer, {}).chat([say("x")], None)


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_last_message_without_text_is_empty(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RecordError) as raised:
        Prompts(BARE, tokenizer, {}).chat([say("x"), say(text)], None)
    assert raised.value.code == "empty_text"


def test_what_cannot_fit_is_refused_by_its_length(tokenizer: Tokenizer) -> None:
    prompts = Prompts(BARE, tokenizer, {}, context=10)
    long = "x" * (10 * tokenizer.longest + 1)
    for messages, features in (
        ([say(long)], None),
        ([say("x")] * 11, None),
        ([say("x")], {"note": long}),
        ([say("x")], {"numbers": [1] * len(long)}),
    ):
        shown = Prompts(BARE + "{{ features }}", tokenizer, {}, context=10) if features else prompts
        with pytest.raises(RecordError) as raised:
            shown.chat(messages, features)
        assert raised.value.code == "context_overflow"
    with pytest.raises(RecordError, match="do not fit into the model's context of 10 tokens"):
        prompts.text(long)


def test_the_metaspace_of_a_whole_prompt_is_put_once() -> None:
    made = TOKENIZERS["metaspace"]
    prompts = ours(made, "{{ messages[0].content }} and {{ messages[1].content }}")
    tokens = prompts.chat([say("who"), say("me")], None)
    assert made.decode(tokens) == "who and me"
    assert tokens == made.encode("who and me", add_special_tokens=False).ids
