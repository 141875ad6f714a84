"""Constrained decoding: which tokens may come next, so that the text fits a schema, a regex or a list.

The parsing is llguidance's. Ours is the end: a model that would like to go on for ever is brought to one
in time, along the shortest way out that is known, so that the text is whole within `max_tokens`.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import llguidance
import llguidance.numpy
import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.endings import LONGEST_END, Endings, Habit
from flink_llm.errors import RecordError

KEPT = 64
"""Definitions whose compiled form is kept."""


def definition(json_schema: Any = None, regex: str | None = None, choices: Sequence[str] | None = None) -> str | None:
    """The grammar of at most one of the three, None for none of them. Raises RecordError `bad_option`."""
    given = [name for name, one in (("json_schema", json_schema), ("regex", regex), ("choices", choices)) if one]
    if len(given) > 1:
        raise RecordError("bad_option", f"{' and '.join(given)} cannot be asked for together")
    if json_schema:
        try:
            text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
            # Without free white space, of which a small model may never have enough.
            compact = {"whitespace_flexible": False}
            return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=compact))  # type: ignore[arg-type]
        except (ValueError, TypeError, RecursionError) as error:
            raise RecordError("bad_option", f"json_schema is not a JSON Schema: {error}"[:500]) from error
    if regex:
        return str(llguidance.LLMatcher.grammar_from_regex(regex))
    if choices:
        options = " | ".join(json.dumps(choice) for choice in choices)
        return str(llguidance.LLMatcher.grammar_from_lark(f"start: {options}"))
    return None


class Grammars:
    """What makes grammars for one model: its tokenizer, as llguidance knows it.

    Takes up to a second to make, for a large vocabulary, and no other thread runs meanwhile: llguidance holds
    the interpreter there. It lets go of it where a grammar is compiled.
    """

    def __init__(self, tokenizer: bytes, vocabulary: int, ends: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = llguidance.LLTokenizer(tokenizer.decode(), n_vocab=vocabulary, eos_token=list(ends))
        self.endings = Endings(self._tokenizer, vocabulary, ends)
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()  # the latest used last
        self._mask = Masks(vocabulary)

    def grammar(self, definition: str, max_tokens: int) -> "Grammar":
        """A grammar at its beginning. Raises RecordError `bad_option`: it cannot be satisfied, or not so shortly."""
        compiled = self._compiled.pop(definition, None) or self._compile(definition)
        self._compiled[definition] = compiled
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return Grammar(self, definition, compiled, Masks(self._vocabulary), max_tokens)

    def _compile(self, definition: str) -> "_Compiled":
        matcher = _compile(self._tokenizer, definition)
        ways = self.endings.ways(matcher, self._mask)
        if len(ways) < len(self.endings.habits):  # a search in vain takes much of what copies may do together
            matcher = _compile(self._tokenizer, definition)
        return _Compiled(matcher, ways)

    def forget(self, definition: str) -> None:
        """Compiles it anew the next time: copies share what llguidance allows for, and one has used it up."""
        self._compiled.pop(definition, None)


class Masks:
    """Asks a matcher [vocabulary]: whether each token may come next. One for each thread."""

    def __init__(self, vocabulary: int) -> None:
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocabulary)
        self._vocabulary = vocabulary

    def __call__(self, matcher: Any) -> NDArray[np.bool_]:
        llguidance.numpy.fill_next_token_bitmask(matcher, self._bits)
        found: NDArray[np.bool_] = np.unpackbits(
            self._bits.view(np.uint8)[0], bitorder="little", count=self._vocabulary
        ).astype(np.bool_, copy=False)
        return found


class _Compiled(NamedTuple):
    """A definition's matcher at its beginning, and the ways from there to the end."""

    matcher: Any
    ways: list[tuple[list[int], Habit]]


def _compile(tokenizer: Any, definition: str) -> Any:
    wrong = llguidance.LLMatcher.validate_grammar(definition, tokenizer)
    matcher = llguidance.LLMatcher(tokenizer, definition, log_level=0)
    if matcher.is_error() or (wrong and not wrong.startswith("WARNING")):
        reason = " ".join((matcher.get_error() or wrong).split())[:400]
        raise RecordError("bad_option", f"the schema, regex or list cannot be satisfied: {reason}")
    return matcher


class Grammar:
    """Where one text is in its grammar.

    `allowed` says what may come next, `take` is told what was chosen. While a way out is known the text is whole
    within `max_tokens`, and for nearly all there is it is known.
    """

    def __init__(self, of: Grammars, definition: str, compiled: _Compiled, mask: Masks, max_tokens: int) -> None:
        self._of = of
        self._definition = definition
        self._matcher = compiled.matcher.deep_copy()
        self._mask = mask
        self._left = max_tokens
        self._end: list[int] | None = None
        fits = [each for each in compiled.ways if len(each[0]) <= max_tokens]
        if fits:
            self._end, self._habit = fits[0]
        elif compiled.ways:
            least = min(len(way) for way, _ in compiled.ways)
            raise RecordError(
                "bad_option",
                f"max_tokens is {max_tokens}, the shortest that was found for what is asked for takes {least} tokens",
            )

    @property
    def over(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """[vocabulary]: whether each token may come next."""
        return self._mask(self._matcher)

    def take(self, token: int) -> int:
        """Goes on with `token`, one of those allowed, or with the way out where it would leave no room for one.

        Returns the token that it was. Raises RecordError `bad_option`: the text needs more of llguidance than it
        allows for, and no token can be said to fit.
        """
        self._check()  # what `allowed` said may have come of that
        self._left -= 1
        if not self._end or token == self._end[0]:
            self._end = (self._end or [])[1:] or None
            self._matcher.try_consume_tokens([token])
            self._check()
            return token
        further = self._matcher.deep_copy()
        further.try_consume_tokens([token])
        end = self._of.endings.way(further, self._mask, self._habit, min(self._left, LONGEST_END))
        if end is None or len(end) > self._left:
            self._left += 1
            return self.take(self._end[0])
        self._matcher, self._end = further, end
        return token

    def _check(self) -> None:
        if self._matcher.is_error():
            self._of.forget(self._definition)
            reason = " ".join(self._matcher.get_error().partition("<state>")[0].split())[:400]
            raise RecordError("bad_option", f"the schema, regex or list is too much work to follow: {reason}")
