"""Prompt lookup: guesses are what stood there before, and guessing stops where it does not pay."""

from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.lookup import AGREE, CERTAIN, PAUSE, TRIAL, Lookup, Payoff

TOKENS = st.lists(st.integers(0, 3), max_size=60)


@given(TOKENS, TOKENS)
def test_a_guess_is_what_stood_behind_the_same_tokens_before(prompt, said):
    lookup = Lookup(prompt)
    for token in said:
        lookup.add(token)
    text = prompt + said
    guess = lookup.guess()
    places = [
        (size, at)
        for size in AGREE
        for at in range(size, len(text))
        if text[at - size : at] == text[len(text) - size :]
    ]
    if not places:
        assert guess == []
    else:
        most = places[0][0]
        assert 0 < len(guess) <= AGREE[most]
        assert any(text[at : at + len(guess)] == guess for size, at in places if size == most)


def test_the_longest_agreement_and_the_latest_place_win():
    lookup = Lookup([1, 2, 3, 4, 9, 3, 4, 8, 1, 2, 3, 4])
    assert lookup.guess(2) == [9, 3]
    assert Lookup([3, 4, 7, 3, 4, 8, 3, 4]).guess(1) == [8]


def test_the_more_agree_the_longer_is_the_guess():
    said = list(range(100, 200))
    lengths = [len(Lookup([*said, 0, *said[:size]]).guess()) for size in (1, 2, 4, 7, 8, 16, 31, 32)]
    assert lengths == [0, 8, 12, 12, 12, 32, 32, 64]
    assert [len(Lookup([*said, 0, *said[:size]]).guess(least=CERTAIN)) for size in (7, 8)] == [0, 12]


def test_nothing_is_guessed_beyond_an_end():
    assert Lookup([1, 2, 3, 4, 9, 5, 1, 2], ends={9}).guess() == [3, 4]
    assert Lookup([1, 2, 9, 5, 1, 2], ends={9}).guess() == []


def test_guessing_pauses_where_it_does_not_pay_and_tries_again():
    payoff = Payoff()
    for _ in range(TRIAL):
        assert payoff.worth_it()
        payoff.record(accepted=0, cost=1.5)
    assert [payoff.worth_it() for _ in range(PAUSE)] == [False] * PAUSE
    assert payoff.worth_it()
    payoff.record(accepted=0, cost=1.5)  # one is enough by now
    assert not payoff.worth_it()


def test_a_guess_that_pays_keeps_it_on():
    payoff = Payoff()
    for _ in range(100):
        assert payoff.worth_it()
        payoff.record(accepted=4, cost=2.0)
