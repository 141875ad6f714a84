"""Whether a reply is right: exact quotes, honest refusals, nothing made up."""

import re

from models.training.dialogues import CANNOT_SEE, ONLY_ORDERS, Dialogue
from models.training.phrases import STATUSES

DATE = re.compile(r"\d{4}-\d\d-\d\d")
NUMBER = re.compile(r"\d+")
RETURN_DAYS = "30"


def is_grounded(dialogue: Dialogue, reply: str) -> bool:
    """Whether the reply quotes exactly what the dialogue's answer rests on, and invents nothing."""
    whole = all(re.search(rf"(?<![\w-]){re.escape(quote)}(?![\w-])", reply) for quote in dialogue.quotes)
    return bool(dialogue.quotes) and whole and not invents(dialogue, reply)


def is_refusal(dialogue: Dialogue, reply: str) -> bool:
    """Whether the reply says what it cannot do or see, instead of making something up."""
    return reply.startswith((CANNOT_SEE, ONLY_ORDERS[:20])) and not invents(dialogue, reply)


def invents(dialogue: Dialogue, reply: str) -> bool:
    """Whether the reply names a status, a date or a number that it has from nowhere.

    Statuses and dates must be the quoted ones; other numbers may stand in the last question too.
    """
    statuses = {status for status in STATUSES if status in reply}
    dates = set(DATE.findall(reply))
    numbers = set(NUMBER.findall(DATE.sub("", reply)))
    known = {*NUMBER.findall(dialogue.messages[-1]["content"]), *dialogue.quotes, RETURN_DAYS}
    return not (statuses | dates <= set(dialogue.quotes) and numbers <= known)
