"""Prompt lookup: guesses are what stood there before, and guessing stops where it does not pay."""

from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.lookup import GUESS, LONGEST, PAUSE, SHORTEST, TRIAL, Lookup, Payoff

TOKENS = st.lists(st.integers(0, 3), max_size=60)


@given(TOKENS, TOKENS)
def test_a_guess_is_what_stood_behind_the_same_tokens_before(prompt, said):
    lookup = Lookup(prompt)
    for token in said:
        lookup.add(token)
    text = prompt + said
    guess = lookup.guess()
    places = [
        at
        for size in range(LONGEST, SHORTEST - 1, -1)
        for at in range(size, len(text))
        if text[at - size : at] == text[len(text) - size :]
    ]
    if not places:
        assert guess == []
    else:
        assert 0 < len(guess) <= GUESS
        assert any(text[at : at + len(guess)] == guess for at in places)


def test_the_longest_agreement_and_the_latest_place_win():
    lookup = Lookup([1, 2, 3, 4, 9, 3, 4, 8, 1, 2, 3, 4])
    assert lookup.guess(2) == [9, 3]
    assert Lookup([3, 4, 7, 3, 4, 8, 3, 4]).guess(1) == [8]


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
