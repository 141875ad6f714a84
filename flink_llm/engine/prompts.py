"""Messages and features to a prompt's tokens, through the model folder's own chat template.

Contents and the texts among the features never reach the template: marks stand in for them while it is
rendered, and each is put in its place afterwards, where nothing becomes a special token. So `</s>` in a
user's text is four characters, whatever the template or the tokenizer make of it elsewhere. Numbers and times
are what they are; of bytes and of anything else it is their text. What can not be hidden so, roles and the
names of features, is restricted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from numbers import Number
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import ModelFolderError, RecordError

ROLES = ("system", "user", "assistant", "tool")
_MARK = re.compile("\ue000([0-9]+)(j*)\ue001")
"""The number of a hidden text, and how many times it is to be written as JSON."""


class Prompts:
    """Renders the prompts of one model; `template` None for a folder without one.

    A text that cannot fit into `context` tokens is refused before it is tokenised. Raises
    ModelFolderError for a template that does not parse.
    """

    def __init__(
        self,
        template: str | bytes | None,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str],
        context: int | None = None,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            text = template.decode() if isinstance(template, bytes) else template
            self._template = None if text is None else environment.from_string(text)
        except (TemplateError, UnicodeDecodeError, RecursionError) as error:
            raise ModelFolderError(f"chat_template.jinja does not parse: {error}") from error
        self._tokenizer = tokenizer
        self._special = dict(special_tokens)
        self._context = context

    def chat(self, messages: Sequence[Mapping[str, str]], features: Mapping[str, Any] | None) -> list[int]:
        """Tokens of a conversation, ready for the assistant's turn.

        Raises RecordError: `empty_text` for a last message without text, `context_overflow` for more than
        can fit, `invalid` for messages or features that are none and for what the template refuses.
        """
        if self._template is None:
            raise RecordError("invalid", "the model has no chat template: it takes generate(), not chat()")
        self._fits(0, len(messages))
        texts: list[str] = []
        hidden = [_message(number, message, texts) for number, message in enumerate(messages)]
        if not hidden or not texts[-1].strip():
            raise RecordError("empty_text", "the last message has no text")
        try:
            shown = self._hide(dict(features), texts) if features else None
            self._fits(sum(map(len, texts)))
            rendered = self._template.render(
                messages=hidden, tools=None, documents=None, features=shown, add_generation_prompt=True, **self._special
            )
        except RecordError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise RecordError("invalid", f"the chat template refuses these messages: {error}") from error
        self._fits(len(rendered))
        return self._tokenizer.encode_template(rendered, lambda part: _filled(part, texts))

    def text(self, prompt: str) -> list[int]:
        """Tokens of a bare prompt, begun as the model's texts begin. Raises RecordError, see `chat`."""
        self._fits(len(prompt))
        tokens = self._tokenizer.encode_marked(prompt)
        if not tokens:
            raise RecordError("empty_text", "the prompt has no text")
        return tokens

    def _fits(self, characters: int, turns: int = 0) -> None:
        """A token is at most `longest` characters, and a turn at least one token."""
        limit = self._context
        if limit is not None and (characters > limit * self._tokenizer.longest or turns > limit):
            raise RecordError(
                "context_overflow", f"{characters} characters do not fit into the model's context of {limit} tokens"
            )

    def _hide(self, value: Any, texts: list[str]) -> Any:
        if value is None or isinstance(value, (Number, date, time)):
            return value
        if isinstance(value, Mapping):
            return {self._name(name): self._hide(item, texts) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide(item, texts) for item in value]
        texts.append(_text(value))
        return f"\ue000{len(texts) - 1}\ue001"

    def _name(self, name: Any) -> str:
        """A feature's name, which a template must be able to read."""
        if not isinstance(name, str) or {"\ue000", "\ue001"} & {*name} or self._tokenizer.holds_special(name):
            raise RecordError("invalid", f"{name!r} cannot be the name of a feature")
        return name


def _message(number: int, message: Mapping[str, str], texts: list[str]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RecordError("invalid", f"messages[{number}] has the role {role!r}; there are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RecordError("invalid", f"messages[{number}] has no content")
    texts.append(content)
    return {"role": role, "content": f"\ue000{number}\ue001"}


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else str(value)


def _filled(part: str, texts: list[str]) -> str:
    def text(mark: re.Match[str]) -> str:
        value = texts[int(mark[1])]
        for _ in mark[2]:
            value = json.dumps(value, ensure_ascii=False)[1:-1]
        return value

    return _MARK.sub(text, part)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as transformers has it, for values with marks in them, which `ensure_ascii` would destroy."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys, default=str)
    return _MARK.sub(lambda mark: f"\ue000{mark[1]}{mark[2]}j\ue001", text)


class _Generation(Extension):
    """`{% generation %}`, by which transformers finds the assistant's tokens in training: here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _now(form: str) -> str:
    """This machine's time, as transformers has it."""
    return datetime.now().strftime(form)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
