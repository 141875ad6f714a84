import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.udfs import masking
from flink_llm.udfs.masking import Masker

PARTS = st.sampled_from(
    ["a.b@example.com", "4111 1111 1111 1111", "5500-0000-0000-0004", "1042", "2026-11-24", "hello", "  ", "\n", "."]
)


@given(st.lists(PARTS, max_size=8).map(" ".join), st.data())
def test_however_a_text_is_cut_the_masked_whole_is_the_same(text, data):
    whole = Masker(["email", "card"])
    expected = whole.add(text) + whole.finish()
    cut = Masker(["email", "card"])
    said, rest = "", text
    while rest:
        size = data.draw(st.integers(1, 5))
        said += cut.add(rest[:size])
        rest = rest[size:]
    said += cut.finish()
    assert said == expected
    assert said == said.strip()
    assert "@" not in said and "4111" not in said


@pytest.mark.parametrize(
    ("text", "shown", "found"),
    [
        ("write to a.b@example.com now", "write to [e-mail] now", ["email"]),
        ("card 4111 1111 1111 1111.", "card [card].", ["card"]),
        ("Order 104233 arrives 2026-11-24", "Order 104233 arrives 2026-11-24", []),
        ("4111 1111 1111 1112", "4111 1111 1111 1112", []),  # fails the Luhn check
    ],
)
def test_what_is_masked(text, shown, found):
    masker = Masker(["email", "card"])
    assert masker.add(text) + masker.finish() == shown
    assert masker.found == found


def plainly_masked(number):
    """The definition: every run of groups from the left, the longest first, masked if it is a card's."""
    groups = [group.span() for group in re.finditer(r"\d+", number)]
    for first, (start, _) in enumerate(groups):
        for _, end in reversed(groups[first:]):
            digits = [int(each) for each in re.sub(r"\D", "", number[start:end])]
            doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
            if 13 <= len(digits) <= 19 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0:
                return number[:start] + "[card]" + plainly_masked(number[end:])
    return number


@given(st.lists(st.from_regex(r"[0-9]{1,20}[ -]{0,2}", fullmatch=True), max_size=12).map("".join))
def test_cards_are_the_longest_runs_of_groups_from_the_left(number):
    assert Masker(["card"])._without_cards(number) == plainly_masked(number)


@given(st.text("ab.@ -+", max_size=30))
def test_addresses_are_masked_wherever_they_begin(text):
    assert Masker(["email"])._masked(text) == re.sub(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "[e-mail]", text)


@given(st.text("12 -a.\n\t@", max_size=30))
def test_what_may_still_change_is_a_number_a_word_and_space_at_the_end(text):
    assert masking._growing_from(text) == re.search(r"(?:\d[\d -]*)?\S*\s*$", text).start()


def test_a_long_number_costs_no_more_than_its_length(monkeypatch):
    looked_at = []
    is_card = masking._is_card
    monkeypatch.setattr(masking, "_is_card", lambda number: looked_at.append(len(number)) or is_card(number))
    groups = 2_000
    Masker(["card"])._masked(" ".join("7" * groups))
    assert groups < sum(looked_at) <= groups * sum(range(13, 20))
