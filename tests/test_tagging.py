"""Labels of tokens to entities of a text."""

import numpy as np
import pytest

from flink_llm.engine.tagging import entities
from flink_llm.engine.tokenizer import Spans

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXT = "Ada Lovelace met Bo in Paris"
WORDS = [(0, 3), (4, 12), (13, 16), (17, 19), (20, 22), (23, 28)]


def tagged(*says: str, text: str = TEXT, offsets=WORDS, words=None, labels=LABELS) -> list[tuple[str, str]]:
    shares = np.full((len(offsets), len(labels)), 0.02, dtype=np.float32)
    for token, label in enumerate(says):
        shares[token, labels.index(label)] = 0.9
    spans = Spans([0] * len(offsets), list(offsets), list(words or range(len(offsets))))
    return [(each.label, text[each.start : each.end]) for each in entities(text, spans, shares, labels)]


@pytest.mark.parametrize(
    ("says", "found"),
    [
        (("O", "O", "O", "O", "O", "O"), []),
        (("B-PER", "I-PER", "O", "B-PER", "O", "B-LOC"), [("PER", "Ada Lovelace"), ("PER", "Bo"), ("LOC", "Paris")]),
        (("B-PER", "B-PER", "O", "O", "O", "O"), [("PER", "Ada"), ("PER", "Lovelace")]),
        (("I-PER", "I-PER", "O", "I-PER", "O", "I-LOC"), [("PER", "Ada Lovelace"), ("PER", "Bo"), ("LOC", "Paris")]),
        (("B-PER", "I-LOC", "O", "O", "O", "O"), [("PER", "Ada"), ("LOC", "Lovelace")]),
        (("O", "O", "O", "O", "O", "B-LOC"), [("LOC", "Paris")]),
    ],
)
def test_words_become_entities(says, found):
    assert tagged(*says) == found


def test_a_word_has_the_label_of_its_first_token():
    pieces = [(0, 0), (0, 2), (2, 3), (4, 8), (8, 12), (0, 0)]
    said = ("O", "B-PER", "B-LOC", "I-PER", "O", "O")
    assert tagged(*said, offsets=pieces, words=[None, 0, 0, 1, 1, None]) == [("PER", "Ada Lovelace")]


def test_the_space_before_a_word_is_not_of_it():
    assert tagged("B-PER", "I-PER", text="Ada Lovelace", offsets=[(0, 3), (3, 12)]) == [("PER", "Ada Lovelace")]
    assert tagged("O", "I-PER", text="Ada Lovelace", offsets=[(0, 3), (3, 12)]) == [("PER", "Lovelace")]


def test_labels_without_b_and_i_are_read_as_they_are():
    labels = ["O", "E-MAIL", "PHONE"]
    found = tagged("PHONE", "PHONE", "O", "E-MAIL", "O", "O", labels=labels)
    assert found == [("PHONE", "Ada Lovelace"), ("E-MAIL", "Bo")]


def test_the_score_is_the_mean_of_the_words():
    shares = np.array([[0.1, 0.9, 0.0], [0.3, 0.1, 0.6]], dtype=np.float32)
    spans = Spans([1, 2], [(0, 1), (2, 3)], [0, 1])
    [found] = entities("a b", spans, shares, ["O", "B-X", "I-X"])
    assert found.score == pytest.approx(0.75)
