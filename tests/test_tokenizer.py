import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm.engine.tokenizer import Detokenizer, Tokenizer
from flink_llm.errors import ModelFolderError
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny.tokenizer_json(tmp_path_factory.mktemp("tokenizer")).read_bytes())


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(text=TEXT)
def test_the_pieces_of_a_detokenizer_are_the_whole(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer.encode_text(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_tokenizer_larger_than_its_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(ModelFolderError, match="they do not belong together"):
        Tokenizer(tiny.tokenizer_json(tmp_path).read_bytes(), vocab_size=100)


@pytest.mark.parametrize("definition", [b"", b"{}", b"[]", b'"x"', b"\xff"])
def test_what_is_no_tokenizer_is_refused(definition):
    with pytest.raises(ModelFolderError, match="is not a tokenizer"):
        Tokenizer(definition)


@settings(deadline=None)
@given(text=TEXT, limit=st.integers(1, 40))
def test_a_text_is_cut_to_its_first_tokens(tokenizer, text, limit):
    assert tokenizer.encode_marked(text, limit) == tokenizer.encode_text(text)[:limit]
