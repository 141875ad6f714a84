"""Text to tokens and back. A user's text never becomes a special token, and no character is cut."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from tokenizers import Tokenizer as HfTokenizer

from flink_llm.errors import ModelFolderError

REPLACEMENT = "\ufffd"
WINDOW = 8
"""Tokens decoded together: a character of UTF-8 has at most four bytes, each at most one token."""
MOST_CUT = 65_536
"""Characters that are read for a text's first tokens, where words are longer than they should be."""


TURNS, REMEMBERED = 256, 1000
"""Turns of conversations whose tokens are remembered, of at most so many characters."""


class Spans(NamedTuple):
    """A text's tokens: `ids`, and for each its characters [start, end) in the text and the number of its word.

    The special tokens around a text have no word.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    words: list[int | None]


class Tokenizer:
    """A Hugging Face `tokenizer.json`. Safe to share between threads.

    Ids are below `size`. `longest`: characters of its longest token. `marks`: special tokens that it puts
    around a text, `pair_marks` those around a pair of them.
    Raises ModelFolderError for what is no tokenizer, or one that knows tokens the model does not.
    """

    def __init__(self, definition: bytes, vocab_size: int | None = None) -> None:
        try:
            self._text = HfTokenizer.from_buffer(definition)
            self._template = HfTokenizer.from_buffer(definition)
            self._later = HfTokenizer.from_str(json.dumps(_unprefixed(json.loads(definition))))
            vocabulary: dict[str, int] = self._text.get_vocab(with_added_tokens=True)
            added = self._text.get_added_tokens_decoder()
        except Exception as error:  # the library raises bare Exceptions
            raise ModelFolderError(f"tokenizer.json is not a tokenizer: {error}") from error
        self._text.encode_special_tokens = self._later.encode_special_tokens = True
        for tokenizer in (self._text, self._later, self._template):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._turns = [lru_cache(TURNS)(partial(_encoded, tokenizer)) for tokenizer in (self._text, self._later)]
        self._special = {token: str(kind.content) for token, kind in added.items() if kind.special}
        self.longest = max(map(len, vocabulary), default=1)
        self.marks: int = self._text.num_special_tokens_to_add(False)
        self.pair_marks: int = self._text.num_special_tokens_to_add(True)
        self.size = max(vocabulary.values(), default=-1) + 1
        if vocab_size is not None and self.size > vocab_size:
            raise ModelFolderError(
                f"tokenizer.json has a token {self.size - 1}, the model knows {vocab_size}: they do not belong together"
            )

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a user's text; what looks like a special token stays text."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def encode_template(self, text: str, fill: Callable[[str], str]) -> list[int]:
        """Tokens of a template's text, its special tokens included.

        What is between two of those goes through `fill`, which puts users' texts in: nothing in it becomes
        a special token, and its own text is tokenised together with them, as the model was taught.
        """
        tokens: list[int] = []
        start = 0
        found = self._template.encode(text, add_special_tokens=False)
        for token, (begin, end) in zip(found.ids, found.offsets, strict=True):
            if token in self._special:
                tokens += self._between(fill(text[start:begin]), start)
                tokens.append(token)
                start = end
        return [*tokens, *self._between(fill(text[start:]), start)]

    def encode_marked(self, text: str, limit: int | None = None) -> list[int]:
        """Tokens of a user's text with the special ones that belong around it, at most `limit`.

        Empty for a text that has no tokens of its own.
        """
        ids = self._beginning(text, limit) if limit else self._text.encode(text, add_special_tokens=False)
        if not ids.ids:
            return []
        if limit and len(ids) > limit - self.marks:
            ids.truncate(limit - self.marks)
        return list(self._text.post_process(ids, add_special_tokens=True).ids)

    def encode_pair(self, first: str, second: str, limit: int) -> tuple[list[int], list[int]]:
        """Tokens of two texts with the special ones that belong around a pair, at most `limit`; and which of the
        two each token belongs to, as the model's `token_type_ids`.

        The longer one is cut first. Empty when one of them has no tokens of its own.
        """
        one, other = (self._beginning(text, limit) for text in (first, second))
        if not (one.ids and other.ids):
            return [], []
        for ids, length in zip((one, other), _cut(len(one), len(other), limit - self.pair_marks), strict=True):
            if length < len(ids):
                ids.truncate(length)
        both = self._text.post_process(one, other, add_special_tokens=True)
        return list(both.ids), list(both.type_ids)

    def encode_spans(self, text: str) -> Spans:
        """All of a user's text with the special tokens that belong around it, and where each token stands.

        Empty for a text that has no tokens of its own.
        """
        ids = self._text.encode(text, add_special_tokens=False)
        if not ids.ids:
            return Spans([], [], [])
        found = self._text.post_process(ids, add_special_tokens=True)
        return Spans(list(found.ids), list(found.offsets), list(found.word_ids))

    def holds_special(self, text: str) -> bool:
        """Whether the text of a special token is in it."""
        return any(special in text for special in self._special.values())

    def _beginning(self, text: str, count: int) -> Any:
        """The encoding of a text, or of enough of its beginning for its first `count` tokens.

        Spaces may make no token, and an unknown word one, however long it is: what was cut too short is cut again,
        as long as that takes no engine's time. Twice as many tokens are enough, since the last word may have been
        cut through.
        """
        size = count * self.longest
        most = min(len(text), max(size, MOST_CUT))
        while True:
            found = self._text.encode(text[:size], add_special_tokens=False)
            if size >= most or len(found.ids) >= 2 * count:
                return found
            size *= 4

    def _between(self, text: str, start: int) -> Sequence[int]:
        """A conversation's turns come again with each of its requests."""
        if len(text) > REMEMBERED:
            return _encoded(self._later if start else self._text, text)
        return self._turns[bool(start)](text)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._text.decode(tokens, skip_special_tokens=True))

    def token(self, name: str) -> int | None:
        """The id of a token by its text, None for an unknown one."""
        found: int | None = self._template.token_to_id(name)
        return found


def _encoded(tokenizer: HfTokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids) if text else ()


def _cut(first: int, second: int, room: int) -> tuple[int, int]:
    """What of two lengths fits into `room`: `longest_first`, as the tokenizers of models are made to cut."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


def _unprefixed(definition: Any) -> Any:
    """The definition of a tokenizer that takes no text for the beginning of one.

    Llama's put a space before what stands first, and so before every piece that is encoded by itself.
    """
    if isinstance(definition, list):
        return [_unprefixed(item) for item in definition]
    if not isinstance(definition, dict):
        return definition
    changed = {name: item if name == "model" else _unprefixed(item) for name, item in definition.items()}
    return changed | {"prepend_scheme": "never"} if changed.get("prepend_scheme") == "first" else changed


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

    def add(self, *tokens: int) -> str:
        """The text that `tokens` make certain, often empty.

        Of `WINDOW` and more that make no whole character some may be lost, other ones one by one than together.
        """
        self._tokens += tokens
        before = self._tokenizer.decode(self._tokens[self._start : self._end])
        after = self._tokenizer.decode(self._tokens[self._start :])
        if after.endswith(REPLACEMENT):
            if len(tokens) > 1:  # which of them is half a character is seen one by one
                del self._tokens[-len(tokens) :]
                return "".join([self.add(token) for token in tokens])
            if len(self._tokens) - self._end < WINDOW:
                return ""
            count = len(self._tokens)
            for cut in range(count - 3, count):  # a character may have begun with the last three
                whole = self._tokenizer.decode(self._tokens[self._start : cut])
                if whole + self._tokenizer.decode(self._tokens[cut:]) == after:
                    self._start, self._end = self._end, cut
                    return whole[len(before) :]
        self._start, self._end = self._end, len(self._tokens)
        return after[len(before) :]

    def finish(self) -> str:
        """What is left: text whose last character never became whole."""
        before = self._tokenizer.decode(self._tokens[self._start : self._end])
        after = self._tokenizer.decode(self._tokens[self._start :])
        self._start = self._end = len(self._tokens)
        return after[len(before) :]
