import pytest
from hypothesis import given
from hypothesis import strategies as st

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
