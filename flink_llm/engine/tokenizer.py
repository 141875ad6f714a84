"""Text to tokens and back. A user's text never becomes a special token, and no character is cut."""

from tokenizers import Tokenizer as HfTokenizer

from flink_llm.errors import ModelFolderError

REPLACEMENT = "\ufffd"
WINDOW = 8
"""Tokens decoded together: a character of UTF-8 has at most four bytes, each at most one token."""


class Tokenizer:
    """A Hugging Face `tokenizer.json`. Safe to share between threads.

    Raises ModelFolderError for what is no tokenizer, or one that knows more tokens than the model.
    """

    def __init__(self, definition: bytes, vocab_size: int | None = None) -> None:
        try:
            self._text = HfTokenizer.from_buffer(definition)
            self._template = HfTokenizer.from_buffer(definition)
        except Exception as error:  # the library raises bare Exceptions
            raise ModelFolderError(f"tokenizer.json is not a tokenizer: {error}") from error
        self._text.encode_special_tokens = True
        for tokenizer in (self._text, self._template):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self.size: int = self._text.get_vocab_size(with_added_tokens=True)
        if vocab_size is not None and self.size > vocab_size:
            raise ModelFolderError(
                f"tokenizer.json knows {self.size} tokens, the model {vocab_size}: they do not belong together"
            )

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a user's text; what looks like a special token stays text."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def encode_template(self, text: str) -> list[int]:
        """Tokens of a template's own text, special tokens included."""
        return list(self._template.encode(text, add_special_tokens=False).ids)

    def encode_for_encoder(self, text: str, limit: int) -> list[int]:
        """Tokens of a user's text with the marks an encoder expects around it, at most `limit`."""
        marks = self._text.num_special_tokens_to_add(False)
        ids = self._text.encode(text, add_special_tokens=False)
        if len(ids) > limit - marks:
            ids.truncate(limit - marks)
        return list(self._text.post_process(ids, add_special_tokens=True).ids)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._text.decode(tokens, skip_special_tokens=True))

    def token(self, name: str) -> int | None:
        """The id of a token by its text, None for an unknown one."""
        found: int | None = self._template.token_to_id(name)
        return found


class Detokenizer:
    """Tokens in, text out, as early as it is certain: never half a character.

    The pieces and `finish()` joined are the tokens' text. Decodes a few tokens of context with each new
    one, since the text of a token can depend on those before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        self._end = 0

    def add(self, token: int) -> str:
        """The text that `token` makes certain, often empty."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._start : self._end])
        after = self._tokenizer.decode(self._tokens[self._start :])
        if after.endswith(REPLACEMENT) and len(self._tokens) - self._end < WINDOW:
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return after[len(before) :]

    def finish(self) -> str:
        """What is left: text whose last character never became whole."""
        before = self._tokenizer.decode(self._tokens[self._start : self._end])
        after = self._tokenizer.decode(self._tokens[self._start :])
        self._start = self._end = len(self._tokens)
        return after[len(before) :]
