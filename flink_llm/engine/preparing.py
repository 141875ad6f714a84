"""From a request to what a decoder runs: its prompt's tokens, and the grammar that its reply must follow."""

from dataclasses import dataclass

import msgspec

from flink_llm.engine.grammar import Grammar, Grammars, definition
from flink_llm.engine.model import ModelFolder
from flink_llm.engine.options import check
from flink_llm.engine.penalties import check_tokens
from flink_llm.engine.prompts import Prompts
from flink_llm.engine.protocol import Options, Submit
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import RecordError
from flink_llm.names import unknown

LONG = 8_000
"""Characters of a prompt, or bytes of its features, that take a millisecond or more to render and to tokenise."""


@dataclass(frozen=True)
class Prepared:
    """`prompt` is tokens; `grammar` None for a reply that may say anything."""

    prompt: list[int]
    grammar: Grammar | None


class Preparing:
    """For the requests of one decoder. `prepare` may be called from one thread while another calls `check`."""

    def __init__(self, folder: ModelFolder) -> None:
        manifest = folder.manifest
        self._name = manifest.name
        self._context = manifest.context_length
        self._vocabulary = manifest.vocab_size
        self._adapters = manifest.adapters
        self._tokenizer_file = folder.files["tokenizer.json"]
        self._grammars: Grammars | None = None
        self.ends = frozenset(manifest.eos_token_ids)
        self.tokenizer = Tokenizer(self._tokenizer_file, manifest.vocab_size)
        template = folder.files.get("chat_template.jinja")
        self.prompts = Prompts(template, self.tokenizer, manifest.special_tokens, manifest.context_length)

    def check(self, work: Submit) -> None:
        """Raises RecordError for what can be seen without preparing it."""
        if work.kind != "generate":
            raise RecordError("bad_option", f"{self._name} generates, it cannot {work.kind}")
        check(work.options)
        check_tokens(work.options.logit_bias, self._vocabulary)
        if work.adapter not in ("", *self._adapters):
            raise RecordError("unknown_adapter", unknown(f"adapter of {self._name}", work.adapter, self._adapters))

    @staticmethod
    def takes_long(work: Submit) -> bool:
        """Whether others' tokens should not wait for it: a grammar may take seconds, a long prompt milliseconds."""
        texts = [message.get("content") for message in work.messages] if work.messages is not None else [work.prompt]
        size = sum(len(text) for text in texts if isinstance(text, str))
        size += len(msgspec.msgpack.encode(work.features)) if work.features else 0
        return size > LONG or _constrained(work.options)

    def prepare(self, work: Submit) -> Prepared:
        """Raises RecordError, and what a tokenizer or a template raise."""
        prompt = (
            self.prompts.chat(work.messages, work.features)
            if work.messages is not None
            else self.prompts.text(work.prompt or "")
        )
        if not prompt:
            raise RecordError("empty_text", "the prompt has no tokens")
        if len(prompt) >= self._context:
            raise RecordError(
                "context_overflow", f"the prompt has {len(prompt)} tokens, the model's context {self._context}"
            )
        return Prepared(prompt, self._grammar(work.options, len(prompt)) if _constrained(work.options) else None)

    def _grammar(self, options: Options, prompt: int) -> Grammar | None:
        wanted = definition(options.json_schema, options.regex, options.choices)
        if wanted is None:
            return None
        if not self.ends:
            raise RecordError("bad_option", f"{self._name} has no end mark: what it says cannot be constrained")
        if self._grammars is None:
            self._grammars = Grammars(self._tokenizer_file, self._vocabulary, sorted(self.ends))
        return self._grammars.grammar(wanted, min(options.max_tokens, self._context - prompt))


def _constrained(options: Options) -> bool:
    return bool(options.json_schema or options.regex or options.choices)
