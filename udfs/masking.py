"""What a reply must not show: e-mail addresses and card numbers, masked while the reply streams.

A filter for each kind takes text by pieces and gives back what is certain: what it holds back is what the next
piece may still change, some hundred characters at most.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

_PUNCTUATION = (
    r"\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u2010-\u206f\u2190-\u2bff\u3000-\u303f"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff65"
)
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3040-\u312f\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
"""Scripts whose words have no space between: an address may follow one."""
_NOT_IN_LABEL = rf"\s\x00-\x2c./:-@\[-\^`{{-\x7f{_PUNCTUATION}"
_NOT_IN_WORD = rf"\s\x00-\x20\"&(),/:;<=>?@\[\\\]\x7f{_PUNCTUATION}"
_LABEL = rf"(?:[^{_NOT_IN_LABEL}{_UNSPACED}]{{1,63}}+|[^{_NOT_IN_LABEL}]{{1,63}}+)"
_WORD = rf"[^{_NOT_IN_WORD}]"
"""RFC 5322's dot-atom without slash, equals, question mark and ampersand, of any script."""
_AT = re.compile("[@\uff20\ufe6b]")
_LOCAL = re.compile(rf"[^{_NOT_IN_WORD}{_UNSPACED}]{{1,64}}|{_WORD}{{1,64}}")
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL}){{1,8}}")
_GROWING = re.compile(rf"{_WORD}{{0,575}}{_AT.pattern}{_WORD}{{1,64}}|{_WORD}{{0,64}}")
"""The end of a text, read backwards, that may be an address or become one."""
_CUT = re.compile(rf"{_WORD}{{1,64}}{_AT.pattern}{_WORD}*$")

_DIGIT = re.compile(r"\d")
_ITEM = re.compile(r"([\W_]*)(\d*)")
_BETWEEN = 5
"""Characters between two groups of a number."""
_LOOSE = frozenset(" -")
_SHAPES = [(4, 4, 4, 4), (4, 4, 4, 4, 3), (4, 6, 5), (4, 6, 4), (4, 4, 5)]
"""Groups that cards are written in: behind others than spaces and hyphens, no other run of groups is one."""
_FEWEST, _MOST = 13, 19
_TELLS = 12
"""Digits of a card that was cut short from which on it is not shown: what is missing could be tried."""
_NO_ISSUER = frozenset("017")


class _Filter(Protocol):
    def add(self, text: str) -> str:
        """The next piece; gives what it makes certain."""

    def finish(self, cut: bool) -> str:
        """What was held back; `cut`: the text might have gone on."""


class Masker:
    """Takes text by pieces and gives back what is certain, masked and without space at either end.

    The pieces and `finish()` joined are the masked whole. `found` names what was masked.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.found: list[str] = []
        made: dict[str, Callable[[], _Filter]] = {
            "email": lambda: _Addresses(lambda: self._note("email", "[e-mail]")),
            "card": lambda: _Cards(lambda: self._note("card", "[card]")),
        }
        self._filters = [make() for kind, make in made.items() if kind in kinds]
        self._space = ""
        self._begun = False

    def add(self, text: str) -> str:
        """The next piece; gives what it makes certain."""
        for each in self._filters:
            text = each.add(text)
        return self._trimmed(text)

    def finish(self, *, cut: bool = False) -> str:
        """What was held back. `cut`: the text was not at its end, and what may have become a secret is none to show."""
        text = ""
        for each in self._filters:
            text = each.add(text) + each.finish(cut)
        return self._trimmed(text)

    def _trimmed(self, text: str) -> str:
        text = self._space + (text if self._begun else text.lstrip())
        self._begun = self._begun or bool(text)
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return shown

    def _note(self, kind: str, mask: str) -> str:
        if kind not in self.found:
            self.found.append(kind)
        return mask


class _Addresses:
    """E-mail addresses of any script."""

    def __init__(self, mask: Callable[[], str]) -> None:
        self._mask = mask
        self._held = ""

    def add(self, text: str) -> str:
        """See `_Filter`."""
        held = self._held + text
        growing = _GROWING.match(held[::-1])
        certain, done = len(held) - (growing.end() if growing else 0), 0
        shown: list[str] = []
        for begin, end in _addresses(held):
            if begin >= certain:
                break
            shown += held[done:begin], self._mask()
            done = end
        certain = max(certain, done)
        self._held = held[certain:]
        return "".join(shown) + held[done:certain]

    def finish(self, cut: bool) -> str:
        """See `_Filter`."""
        held, self._held = self._held, ""
        done, shown = 0, ""
        for begin, end in _addresses(held):
            shown, done = shown + held[done:begin] + self._mask(), end
        rest = held[done:]
        return shown + (_CUT.sub(lambda _: self._mask(), rest) if cut else rest)


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    """Where addresses begin and end, from each at sign: forwards, each letter would be a start to try."""
    done = 0
    for at in _AT.finditer(text):
        local = _LOCAL.match(text[max(done, at.start() - 64) : at.start()][::-1])
        domain = _DOMAIN.match(text, at.end())
        if local and domain:
            done = domain.end()
            yield at.start() - local.end(), done


class _Cards:
    """Card numbers: 13 to 19 digits in groups that pass ISO/IEC 7812-1's check, runs that overlap as one.

    A number is groups of digits with little between them. What a group is part of is known when 19 digits follow
    its beginning, or the number ends: `_groups` are those that are not known yet, with what stands before each,
    `_swallowed` how many of them are part of a card that has been masked.
    """

    def __init__(self, mask: Callable[[], str]) -> None:
        self._mask = mask
        self._held = ""
        self._long = False
        self._groups: list[tuple[str, str]] = []
        self._swallowed = 0

    def add(self, text: str) -> str:
        """See `_Filter`."""
        held, at, shown = self._held + text, 0, ""
        while at < len(held):
            if not self._groups:  # outside of a number
                begins = _DIGIT.search(held, at)
                stop = begins.start() if begins else len(held)
                self._long = self._long and stop == at
                shown, at = shown + held[at:stop], stop
            item = _ITEM.match(held, at)
            assert item is not None
            between, digits = item.groups()
            near = len(between) <= _BETWEEN
            if item.end() == len(held) and near and len(digits) <= _MOST and not self._long:
                break
            if near and 0 < len(digits) <= _MOST and not self._long:
                self._groups.append((between, digits))
                shown, at = shown + self._known(), item.end()
                continue
            shown += self._end() + between  # of the number, or a group that is too long for one
            at += len(between)
            if len(digits) > _MOST or self._long:
                shown, at, self._long = shown + digits, item.end(), item.end() == len(held)
        self._held = held[at:]
        return shown

    def finish(self, cut: bool) -> str:
        """See `_Filter`."""
        between, digits = _ITEM.match(self._held).groups()  # type: ignore[union-attr]
        if digits:
            self._groups.append((between, digits))
            between = ""
        self._held = ""
        return self._end(cut=cut) + between

    def _known(self) -> str:
        shown = ""
        while sum(len(digits) for _, digits in self._groups) >= _MOST:
            shown += self._first()
        return shown

    def _end(self, *, cut: bool = False) -> str:
        shown = ""
        while self._groups:
            shown += self._first(cut=cut)
        self._swallowed = 0
        return shown

    def _first(self, *, cut: bool = False) -> str:
        """The first group, of which all is known: itself, a card that begins with it, or nothing."""
        follow = self._card()
        if follow is None and cut and not self._swallowed and self._begins_card():
            follow = len(self._groups) - 1
        between, digits = self._groups.pop(0)
        if self._swallowed:
            self._swallowed = max(self._swallowed - 1, follow or 0)
            return ""
        self._swallowed = follow or 0
        return between + (digits if follow is None else self._mask())

    def _card(self) -> int | None:
        """How many groups follow the first one in the longest card that begins with it, None where none does."""
        for last in reversed(range(len(self._groups))):
            run = self._groups[: last + 1]
            digits = "".join(group for _, group in run)
            if _FEWEST <= len(digits) <= _MOST and _is_card(digits) and _is_written_so(run):
                return last
        return None

    def _begins_card(self) -> bool:
        """Whether all groups, to the number's end, may be a card's beginning."""
        digits = "".join(group for _, group in self._groups)
        begun = _TELLS <= len(digits) < _MOST and digits[0] not in _NO_ISSUER
        return begun and _is_written_so(self._groups, begun=True)


def _is_written_so(run: Sequence[tuple[str, str]], *, begun: bool = False) -> bool:
    if all(_LOOSE.issuperset(between) for between, _ in run[1:]):
        return True
    sizes = tuple(len(digits) for _, digits in run)
    if not begun:
        return sizes in _SHAPES
    return any(shape[: len(sizes) - 1] == sizes[:-1] and sizes[-1] <= shape[len(sizes) - 1]
               for shape in _SHAPES if len(shape) >= len(sizes))  # fmt: skip


def _is_card(number: str) -> bool:
    """Whether it begins as an issuer's does and passes the Luhn check, as cards do and most others do not."""
    if number[0] in _NO_ISSUER:
        return False
    digits = [int(character) for character in number]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return sum(digits[-1::-2], sum(doubled)) % 10 == 0
