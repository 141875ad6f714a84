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


@settings(deadline=None)
@given(text=TEXT, parts=st.lists(st.integers(1, 12), max_size=30))
def test_the_pieces_are_the_whole_however_many_tokens_come_together(tokenizer, text, parts):
    detokenizer = Detokenizer(tokenizer)
    tokens = tokenizer.encode_text(text)
    pieces = []
    for count in parts:
        pieces.append(detokenizer.add(*tokens[:count]) if tokens else "")
        del tokens[:count]
    pieces += [detokenizer.add(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", ["\ufffd\ufffd😀", "\ufffd" * 5 + "é", "a\ufffd\ufffd\ufffd😀\ufffdü"])
def test_characters_that_say_that_one_was_lost_lose_no_others(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer.encode_text(text)]
    assert "".join(pieces) + detokenizer.finish() == text


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


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer like BERT's: spaces are no tokens, and a word that is too long is one, unknown."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import models, pre_tokenizers

    vocabulary = ["<unk>", *"abc", *(f"##{letter}" for letter in "abc")]
    numbers = {token: i for i, token in enumerate(vocabulary)}
    made = HfTokenizer(models.WordPiece(numbers, unk_token="<unk>", max_input_chars_per_word=4))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return Tokenizer(made.to_str().encode())


@pytest.mark.parametrize("text", [" " * 999 + "ab c", ("a" * 50 + " ") * 15 + "c", "ab" + " " * 97 + "abc " * 20])
def test_a_text_is_cut_by_its_tokens_however_long_they_are(words, text):
    for limit in range(4, 12):
        assert words.encode_marked(text, limit) == words.encode_text(text)[:limit]
        assert words.encode_pair("a", text, limit + 1)[0] == [1, *words.encode_text(text)[:limit]]


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A tokenizer with marks like BERT's, ours and the library's own."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import processors

    path = tiny.tokenizer_json(tmp_path_factory.mktemp("marked"))
    theirs = HfTokenizer.from_file(str(path))
    theirs.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    theirs.save(str(path))
    theirs.encode_special_tokens = True
    return Tokenizer(path.read_bytes()), theirs


@settings(deadline=None)
@given(first=TEXT.filter(bool), second=TEXT.filter(bool), limit=st.integers(5, 40))
def test_a_pair_is_cut_as_its_models_were_taught(marked, first, second, limit):
    ours, theirs = marked
    theirs.enable_truncation(limit, strategy="longest_first")
    wanted = theirs.encode(first, second)
    assert ours.encode_pair(first, second, limit) == (wanted.ids, wanted.type_ids)


def test_a_pair_without_text_is_none(marked):
    assert marked[0].encode_pair("", "a", 10) == marked[0].encode_pair("a", "", 10) == ([], [])


@settings(deadline=None)
@given(text=TEXT.filter(bool))
def test_spans_are_the_characters_of_the_text(marked, text):
    spans = marked[0].encode_spans(text)
    assert spans.ids == marked[0].encode_marked(text)
    assert [spans.words[0], spans.words[-1]] == [None, None]
    inside = [at for at, word in zip(spans.offsets, spans.words, strict=True) if word is not None]
    assert len(inside) == len(spans.ids) - 2
    assert {i for start, end in inside for i in range(start, end)} == set(range(len(text)))
