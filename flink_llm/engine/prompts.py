"""Messages and features to a prompt's tokens, through the model folder's own chat template.

Contents and the texts among the features never reach the template: marks stand in for them while it
is rendered, and each is tokenised as plain text in its place. So `</s>` in a user's text is four
characters, whatever the template or the tokenizer make of it elsewhere.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import ModelFolderError, RecordError

_MARK = re.compile("\ue000([0-9]+)\ue001")


class Prompts:
    """Renders the prompts of one model. Raises ModelFolderError for a template that does not parse."""

    def __init__(self, template: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise ModelFolderError(f"chat_template.jinja does not parse: {error}") from error
        self._tokenizer = tokenizer
        self._special = dict(special_tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], features: Mapping[str, Any] | None) -> list[int]:
        """Tokens of a conversation, ready for the assistant's turn.

        Raises RecordError: `empty_text` for a last message without text, `invalid` for what the
        template refuses.
        """
        if not messages or not messages[-1]["content"].strip():
            raise RecordError("empty_text", "the last message has no text")
        texts: list[str] = []
        hidden = [{"role": m["role"], "content": _hide(m["content"], texts)} for m in messages]
        shown = _hide(dict(features), texts) if features else None
        try:
            rendered = self._template.render(
                messages=hidden, features=shown, add_generation_prompt=True, **self._special
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RecordError("invalid", f"the chat template refuses these messages: {error}") from error
        return self._encode(rendered, texts)

    def text(self, prompt: str) -> list[int]:
        """Tokens of a bare prompt. Raises RecordError `empty_text`."""
        if not prompt:
            raise RecordError("empty_text", "the prompt has no text")
        return self._tokenizer.encode_text(prompt)

    def _encode(self, rendered: str, texts: list[str]) -> list[int]:
        tokens: list[int] = []
        for i, piece in enumerate(_MARK.split(rendered)):  # every second piece is the number of a text
            if i % 2:
                tokens += self._tokenizer.encode_text(texts[int(piece)])
            elif piece:
                tokens += self._tokenizer.encode_template(piece)
        return tokens


def _hide(value: Any, texts: list[str]) -> Any:
    if isinstance(value, str):
        texts.append(value)
        return f"\ue000{len(texts) - 1}\ue001"
    if isinstance(value, Mapping):
        return {name: _hide(item, texts) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide(item, texts) for item in value]
    return value


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
