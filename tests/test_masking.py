import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.udfs import masking
from flink_llm.udfs.masking import Masker

CARD = "4111 1111 1111 1111"
PARTS = st.sampled_from(
    ["a.b@example.com", CARD, "5500-0000-0000-0004", "1042", "2026-11-24", "hello", " ", "\n", ".", "@", "7", "4111",
     "-", "jose\u0301", "\u60a8", "x" * 40, "5" * 20, "c.de", "!", "**", "4222222222222"]
)  # fmt: skip


def masked(*pieces, cut=False):
    masker = Masker(["email", "card"])
    return "".join(map(masker.add, pieces)) + masker.finish(cut=cut)


@given(st.lists(PARTS, max_size=12).map("".join) | st.lists(PARTS, max_size=8).map(" ".join), st.data())
def test_however_a_text_is_cut_the_masked_whole_is_the_same(text, data):
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, 5))
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    assert masked(*pieces) == masked(text)
    assert masked(*pieces, cut=True) == masked(text, cut=True)
    assert masked(text) == masked(text).strip()


@pytest.mark.parametrize(
    ("text", "shown", "found"),
    [
        ("write to a.b@example.com now", "write to [e-mail] now", ["email"]),
        ("card 4111 1111 1111 1111.", "card [card].", ["card"]),
        ("Order 104233 arrives 2026-11-24", "Order 104233 arrives 2026-11-24", []),
        ("4111 1111 1111 1112", "4111 1111 1111 1112", []),  # fails the Luhn check
        ('{"created_at": 1732790400003}', '{"created_at": 1732790400003}', []),  # passes it, and is no issuer's
        ("2026-11-05 4111 1111 1111 1111", "[card]", ["card"]),  # two runs pass it and overlap
        ("4111 1111 1111 1111 4111111111111111", "[card] [card]", ["card"]),
        ("12.50, 13.75, 24.00, 11.25, 33.10, 45.15", "12.50, 13.75, 24.00, 11.25, 33.10, 45.15", []),
        ("https://x.y/?q=a@b.cd&z a@b@c.de", "https://x.y/?q=[e-mail]&z a@[e-mail]", ["email"]),
        ("请写信到a@b.com谢谢", "请写信到[e-mail]谢谢", ["email"]),
    ],
)
def test_what_is_masked(text, shown, found):
    masker = Masker(["email", "card"])
    assert masker.add(text) + masker.finish() == shown
    assert masker.found == found


@pytest.mark.parametrize(
    "between",
    ["", " ", "-", "\u00a0", "\u202f", "\u2009", "\t", "\n", ".", "\u2011", "\u2013", "_", "/", ", ", "\u200b"],
)
def test_a_card_is_one_whatever_stands_between_its_groups(between):
    assert masked(f"it is {CARD.replace(' ', between)}, ok") == "it is [card], ok"
    assert masked(f"it is {'3782 822463 10005'.replace(' ', between)}, ok") == "it is [card], ok"


@pytest.mark.parametrize(
    "address",
    ["jose\u0301@example.com", "a@mu\u0308nchen.de", "संपर्क@डाटामेल.भारत", "ยินดี@โดเมน.ไทย", "иван2@почта.рф",
     "joe@my_host.example.com", "joe@日本tv.jp", "joe@ex\u0430mple.com", "Tシャツ@x.com", "anna!@example.com",
     "**anna**@example.com", "anna\u00ad@example.com", "a\uff20example.com", "o'brien@example.com", "a@b.4"],
)  # fmt: skip
def test_an_address_is_one_in_every_script(address):
    assert masked(f"at {address} now") == "at [e-mail] now"


@pytest.mark.parametrize(
    ("text", "whole", "cut"),
    [
        ("it is 4111 1111 1111 111", "it is 4111 1111 1111 111", "it is [card]"),  # the last digit is known to all
        ("it is 4111.1111.1111.", "it is 4111.1111.1111.", "it is [card]."),
        ("it is 4242 4242 4242 4242 123", "it is [card] 123", "it is [card] 123"),
        ("it is 3739.693716.48705 999", "it is [card] 999", "it is [card] 999"),
        ("due 2024-10-05.", "due 2024-10-05.", "due 2024-10-05."),
        ("ask anna@example", "ask anna@example", "ask [e-mail]"),
        ("ask anna", "ask anna", "ask anna"),
    ],
)
def test_what_a_cut_left_of_a_secret_is_none_to_show(text, whole, cut):
    assert (masked(text), masked(text, cut=True)) == (whole, cut)


def test_without_kinds_a_text_is_what_it_is_but_for_space_at_its_ends():
    masker = Masker([])
    assert [masker.add("  "), masker.add(f" {CARD}"), masker.add("  "), masker.add("a@b.cd \n"), masker.finish()] == [
        "", CARD, "", "  a@b.cd", ""
    ]  # fmt: skip


def plainly_masked(number):
    """The definition: from the left, the longest run of groups that is a card's, and those that overlap it."""
    groups = [group.span() for group in re.finditer(r"\d+", number)]
    shown, kept, until = "", 0, -1
    for first, (start, _) in enumerate(groups):
        for last in reversed(range(first, len(groups))):
            run = number[start : groups[last][1]]
            digits = [int(each) for each in re.sub(r"\D", "", run)]
            doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
            good = 13 <= len(digits) <= 19 and digits[0] not in (0, 1, 7)
            if good and (sum(digits[::-2]) + sum(doubled)) % 10 == 0:
                if first > until:
                    shown += number[kept:start] + "[card]"
                until = max(until, last)
                kept = groups[until][1]
                break
    return shown + number[kept:]


@given(st.lists(st.from_regex(r"[0-9]{1,20}[ -]{0,2}", fullmatch=True), max_size=12).map("".join))
def test_cards_are_the_longest_runs_of_groups_from_the_left(number):
    masker = Masker(["card"])
    assert masker.add(f"x{number}x") + masker.finish() == f"x{plainly_masked(number)}x"


@pytest.mark.parametrize("text", ["\u60a8", "7", "7 ", "a", "a@", "a@b."])
def test_a_reply_costs_no_more_than_its_length(monkeypatch, text):
    """What is held back, and looked at again with each piece, is bounded."""
    masker, longest, shown = Masker(["email", "card"]), 0, 0
    pieces = list(text * 2_000)
    for number, piece in enumerate(pieces, 1):
        shown += len(masker.add(piece))
        longest = max(longest, number - shown)
    looked_at = []
    is_card = masking._is_card
    monkeypatch.setattr(masking, "_is_card", lambda digits: looked_at.append(len(digits)) or is_card(digits))
    Masker(["card"]).add("".join(pieces))
    assert sum(looked_at) <= len(pieces) * sum(range(13, 20))
    assert text == "a@b." or longest < 800
