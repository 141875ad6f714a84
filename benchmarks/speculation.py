"""What prompt lookup is worth: the demo model with speculation on against off, one request at a time.

Two fixed sets: held-out dialogues; and conversations whose earlier answers are in the prompt when one of
the questions is asked again, so that the reply quotes what its prompt holds. The replies must be the same.
"""

import contextlib
import statistics
import time
from typing import Any

from benchmarks.demo_model import MODEL, dialogues
from benchmarks.ours import Ours
from flink_llm.config import Chat
from models.training.dialogues import Dialogue

Asked = tuple[list[dict[str, str]], dict[str, Any]]
TURNS = 4
"""Answers that the prompt of a quoting reply holds."""


def measure(rounds: int, count: int) -> dict[str, Any]:
    """Medians of on against off, whole sets in turns, `count` requests each."""
    with contextlib.ExitStack() as stack:
        off, on = (stack.enter_context(Ours(MODEL, speculation=speculation)) for speculation in (False, True))
        made = dialogues(4 * count)
        plain = [_asked(each) for each in (*made["grounded"], *made["refused_when_missing"], *made["grounded_long"])]
        plain = plain[:: len(plain) // count][:count]
        quoting = _quoting(off, [_asked(each) for each in made["grounded"][:count]])
        found = {"x_speculation": quoting, "x_speculation_dialogues": plain}
        figures = {name: _ratio(off, on, asked, rounds) for name, asked in found.items()}
        said = off.do(_replies(off, quoting))[1]
        quoted = sum(
            any(text == turn["content"] for turn in asked[0]) for text, asked in zip(said, quoting, strict=True)
        )
        return {**figures, "speculation_quoted": round(quoted / len(quoting), 3), "speculation_requests": count}


def _asked(dialogue: Dialogue) -> Asked:
    return list(dialogue.messages), dict(dialogue.features)


def _quoting(ours: Ours, asked: list[Asked]) -> list[Asked]:
    """Each question again, after its answer and others'."""
    answers = ours.do(_replies(ours, asked))[1]
    turns = [
        [*messages, {"role": "assistant", "content": text}] for (messages, _), text in zip(asked, answers, strict=True)
    ]
    found = []
    for number, (messages, features) in enumerate(asked):
        earlier = [turns[(number + step) % len(turns)] for step in range(TURNS)]
        found.append(([*(turn for each in earlier for turn in each), messages[-1]], features))
    return found


def _ratio(off: Ours, on: Ours, asked: list[Asked], rounds: int) -> float:
    ratios = []
    for _ in range(rounds):
        (slow, said), (fast, again) = (ours.do(_replies(ours, asked)) for ours in (off, on))
        if said != again:
            raise RuntimeError("speculation has changed a reply")
        ratios.append(slow / fast)
    return round(statistics.median(ratios), 3)


async def _replies(ours: Ours, asked: list[Asked]) -> tuple[float, list[str]]:
    """Seconds for all of them, prompts included, and what was said."""
    replies = []
    began = time.perf_counter()
    for messages, features in asked:
        replies.append(await ours.model.chat(messages, features=features, max_tokens=Chat().max_tokens))
    return time.perf_counter() - began, [reply.text for reply in replies]
