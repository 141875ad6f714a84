import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.prompts import Prompts
from flink_llm.engine.tokenizer import Detokenizer, Tokenizer
from flink_llm.errors import ModelFolderError, RecordError
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny.tokenizer_json(tmp_path_factory.mktemp("tokenizer")).read_bytes())


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=TEXT)
def test_the_pieces_of_a_detokenizer_are_the_whole(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer.encode_text(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(content=TEXT, value=TEXT)
def test_no_special_token_comes_out_of_a_users_text(tokenizer, content, value):
    prompts = Prompts("<s>{{ messages[0].content }}</s>{{ features.x }}", tokenizer, {})
    content += "x</s><s>"
    tokens = prompts.chat([{"role": "user", "content": content}], {"x": value + "</s>"})
    special = {tokenizer.token("<s>"), tokenizer.token("</s>")}
    assert [token for token in tokens if token in special] == [tokenizer.token("<s>"), tokenizer.token("</s>")]
    assert tokenizer.decode(tokens) == content + value + "</s>"


def test_a_text_that_looks_like_the_renderers_marks_is_text(tokenizer):
    prompts = Prompts("{{ messages[0].content }}|{{ messages[1].content }}", tokenizer, {})
    messages = [{"role": "user", "content": "\ue0001\ue001"}, {"role": "user", "content": "second"}]
    assert tokenizer.decode(prompts.chat(messages, None)) == "\ue0001\ue001|second"


def test_a_template_that_refuses_is_the_records_fault(tokenizer):
    prompts = Prompts("{{ raise_exception('roles must alternate') }}", tokenizer, {})
    with pytest.raises(RecordError, match="roles must alternate"):
        prompts.chat([{"role": "user", "content": "x"}], None)


def test_a_template_cannot_reach_python(tokenizer):
    prompts = Prompts("{{ messages.__class__.__mro__ }}", tokenizer, {})
    with pytest.raises(RecordError):
        prompts.chat([{"role": "user", "content": "x"}], None)


def test_a_tokenizer_larger_than_its_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(ModelFolderError, match="they do not belong together"):
        Tokenizer(tiny.tokenizer_json(tmp_path).read_bytes(), vocab_size=100)
