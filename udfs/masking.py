"""What a reply must not show: e-mail addresses and card numbers, masked while the reply streams."""

import re
from collections.abc import Sequence

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_NUMBER = re.compile(r"\d(?:[ -]*\d){12,}")
_GROUP = re.compile(r"\d+")
_GROWING = re.compile(r"(?:\d[\d -]*)?\S*\s*$")
"""The end of a text that its next piece may still change: a number in groups, a word, white space."""
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
        growing = _GROWING.search(self._held)
        certain = growing.start() if growing else len(self._held)
        certain = len(self._held[:certain].rstrip())
        ready, self._held = self._held[:certain], self._held[certain:]
        return self._masked(ready)

    def finish(self) -> str:
        """What was held back."""
        ready, self._held = self._held.rstrip(), ""
        return self._masked(ready)

    def _masked(self, text: str) -> str:
        if "email" in self._kinds:
            text = _EMAIL.sub(lambda _: self._note("email", "[e-mail]"), text)
        if "card" in self._kinds:
            text = _NUMBER.sub(lambda number: self._without_cards(number[0]), text)
        return text

    def _without_cards(self, number: str) -> str:
        """A number in groups, the first run of groups that is a card's masked, and so on behind it."""
        groups = [group.span() for group in _GROUP.finditer(number)]
        for first, (start, _) in enumerate(groups):
            for _, end in reversed(groups[first:]):
                if _is_card(number[start:end]):
                    return number[:start] + self._note("card", "[card]") + self._without_cards(number[end:])
        return number

    def _note(self, kind: str, mask: str) -> str:
        if kind not in self.found:
            self.found.append(kind)
        return mask


def _is_card(text: str) -> bool:
    """Whether 13 to 19 digits pass the Luhn check (ISO/IEC 7812-1), as cards do and most others do not."""
    digits = [int(character) for character in text if character.isdigit()]
    if len(digits) not in _CARD_DIGITS:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return sum(digits[-1::-2], sum(doubled)) % 10 == 0
