"""The demo model's data: the same for a seed, its two sides apart, its grades right."""

import pytest

from models.training import phrases
from models.training.dialogues import ABOUT_ORDERS, NEEDED, Dialogue, Generator
from models.training.grading import is_grounded, is_refusal

MADE = 400


def made(split: str, seed: int = 1) -> list[Dialogue]:
    generator = Generator(seed, split)
    return [generator.dialogue() for _ in range(MADE)]


def test_a_seed_decides_the_dialogues() -> None:
    assert made("train") == made("train")
    assert made("train") != made("train", seed=2)
    assert made("train") != made("held_out")


def test_held_out_phrases_are_in_no_training_list() -> None:
    assert phrases.TRAIN.keys() == phrases.HELD_OUT.keys() >= phrases.MORE.keys()
    for name, held_out in phrases.HELD_OUT.items():
        assert not ({*phrases.TRAIN[name], *phrases.MORE.get(name, [])} & {*held_out} - {""}), name


@pytest.mark.parametrize("words", [phrases.NAMES, phrases.ADJECTIVES, phrases.NOUNS, phrases.CITIES, phrases.SYLLABLES])
def test_held_out_words_are_in_no_training_list(words: dict[str, list[str]]) -> None:
    assert not {*words["train"]} & {*words["held_out"]}


def test_the_sides_share_no_order_number() -> None:
    numbers = {
        split: {d.features["order_id"] for d in made(split) if d.features.get("order_id")}
        for split in ("train", "held_out")
    }

    assert {int(number) % 7 for number in numbers["held_out"]} == {3}
    assert 3 not in {int(number) % 7 for number in numbers["train"]}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_right_answer_passes_its_own_grade(split: str) -> None:
    for dialogue in made(split):
        assert not (dialogue.quotes and not dialogue.refuses) or is_grounded(dialogue, dialogue.answer)
        assert not dialogue.refuses or is_refusal(dialogue, dialogue.answer)


@pytest.mark.parametrize("intent", [*ABOUT_ORDERS, *NEEDED])
def test_what_is_missing_is_not_in_the_prompt(intent: str) -> None:
    generator = Generator(3, "held_out")
    for _ in range(50):
        dialogue = generator.dialogue(intent, missing=True)
        assert dialogue.refuses
        assert any(
            dialogue.features.get(name) is None for name in ("order_status", "delivery_date", NEEDED.get(intent))
        )


def test_what_is_quoted_stands_in_the_prompt() -> None:
    for dialogue in made("held_out"):
        values = {str(value) for value in dialogue.features.values()}
        values.add(dialogue.messages[-1]["content"])
        assert all(any(quote in value for value in values) for quote in dialogue.quotes)


def test_long_dialogues_are_long() -> None:
    dialogue = Generator(1).dialogue("status", long=500)

    assert sum(len(message["content"].split()) for message in dialogue.messages) >= 500


ASKED = Dialogue(
    "status", {}, [{"role": "user", "content": "Where is 1042? My phone is 0123."}], "",
    quotes=["1042", "shipped", "2026-11-26"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Order 1042 is shipped. The delivery date is 2026-11-26.", True),
        ("Order 10421 is shipped. The delivery date is 2026-11-26.", False),
        ("Order 1042 is shipped. The delivery date is 2026-11-27.", False),
        ("Order 1042 is shipped. The delivery date is 2026-11-26 or 2026-11-28.", False),
        ("Order 1042 is shipped and delivered. The delivery date is 2026-11-26.", False),
        ("Order 1042 is shipped, 55 to go. The delivery date is 2026-11-26.", False),
        ("Order 1042 is shipped.", False),
    ],
)
def test_grounded_means_every_quote_and_nothing_else(reply: str, right: bool) -> None:
    assert is_grounded(ASKED, reply) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("I cannot see order 1042. Please check the number and ask me again.", True),
        ("I cannot see order 1042, it is delivered.", False),
        ("I cannot see order 1042. It came on 2026-01-01.", False),
        ("I cannot see order 2042.", False),
        ("Order 1042 is on its way.", False),
    ],
)
def test_a_refusal_makes_nothing_up(reply: str, right: bool) -> None:
    unknown = Dialogue("status", {}, ASKED.messages, "", refuses=True)

    assert is_refusal(unknown, reply) is right
