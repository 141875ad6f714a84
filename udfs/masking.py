"""What a reply must not show: e-mail addresses and card numbers, masked while the reply streams."""

import itertools
import re
from collections.abc import Sequence

_EMAIL = re.compile(r"[\w.+-]++(@[\w-]+(?:\.[\w-]+)+)?")
"""A word, and what makes it an address: the words that are none are not looked at from each of their letters."""
_NUMBER = re.compile(r"\d(?:[ -]*\d){12,}")
_GROUP = re.compile(r"\d+")
_GROWING = re.compile(r"\s*\S*(?:[\d -]*\d)?")
"""The end of a text that its next piece may still change: a number in groups, a word, white space.

It is read backwards: forwards, each digit of a long number would be a start to try.
"""
_CARD_DIGITS = range(13, 20)


class Masker:
    """Takes text by pieces and gives back what is certain, masked and without space at either end.

    The pieces and `finish()` joined are the masked whole. `found` names what was masked.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = kinds
        self._held = ""
        self._begun = False
        self.found: list[str] = []

    def add(self, text: str) -> str:
        """The next piece; gives what it makes certain."""
        self._held += text
        if not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        certain = len(self._held[: _growing_from(self._held)].rstrip())
        ready, self._held = self._held[:certain], self._held[certain:]
        return self._masked(ready)

    def finish(self) -> str:
        """What was held back."""
        ready, self._held = self._held.rstrip(), ""
        return self._masked(ready)

    def _masked(self, text: str) -> str:
        if "email" in self._kinds:
            text = _EMAIL.sub(lambda word: self._note("email", "[e-mail]") if word[1] else word[0], text)
        if "card" in self._kinds:
            text = _NUMBER.sub(lambda number: self._without_cards(number[0]), text)
        return text

    def _without_cards(self, number: str) -> str:
        """A number in groups; from its left on, the longest run of groups that is a card's is masked.

        The model decides how many groups there are, and the event loop waits: a group begins at most as many
        runs as a card may have lengths.
        """
        groups = list(_GROUP.finditer(number))
        shown, kept, first = "", 0, 0
        while first < len(groups):
            last = _last_of_card([group[0] for group in groups[first : first + _CARD_DIGITS.stop - 1]])
            if last is None:
                first += 1
                continue
            shown += number[kept : groups[first].start()] + self._note("card", "[card]")
            kept, first = groups[first + last].end(), first + last + 1
        return shown + number[kept:]

    def _note(self, kind: str, mask: str) -> str:
        if kind not in self.found:
            self.found.append(kind)
        return mask


def _growing_from(text: str) -> int:
    found = _GROWING.match(text[::-1])
    return len(text) - (found.end() if found else 0)


def _last_of_card(groups: Sequence[str]) -> int | None:
    """Where the longest card number that begins with the first group ends."""
    ends = list(itertools.accumulate(len(group) for group in groups))
    digits = "".join(groups)
    for last in reversed(range(len(ends))):
        if ends[last] in _CARD_DIGITS and _is_card(digits[: ends[last]]):
            return last
    return None


def _is_card(number: str) -> bool:
    """Whether 13 to 19 digits pass the Luhn check (ISO/IEC 7812-1), as cards do and most others do not."""
    digits = [int(character) for character in number]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return sum(digits[-1::-2], sum(doubled)) % 10 == 0
