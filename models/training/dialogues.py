"""Shop support dialogues, made from a seed: what the customer says, what is known, the right answer.

A dialogue's prompt carries features as the job reads them from the feature store; its answer may use
nothing else. Training and held-out dialogues share no phrasing, no name, no product and no order
number: a held-out number leaves 3 when divided by 7, a training number never does.
"""

import random
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from typing import Any

from models.training.phrases import (
    ADJECTIVES,
    CARRIERS,
    CITIES,
    HELD_OUT,
    KEPT,
    MORE,
    NAMES,
    NOUNS,
    OPENERS,
    STATUSES,
    SYLLABLES,
    TIERS,
    TRAIN,
)  # fmt: skip

CANNOT_SEE = "I cannot see"
ONLY_ORDERS = "I can only help with orders, deliveries, returns and recommendations in our shop."
ABOUT_ORDERS = ("status", "delivery", "returns")
NEEDED = {"recommend": "recommended_product", "tier": "loyalty_tier", "open_orders": "open_orders"}
UNSEEN = {
    "recommend": "a recommendation for you",
    "tier": "your loyalty tier",
    "open_orders": "your open orders",
}
FIRST_DAY, LAST_DAY = date(2024, 1, 1).toordinal(), date(2029, 12, 31).toordinal()
SMALL_TALK = {
    "greet": "Hello! Tell me your order number and I will look it up.",
    "who": "I am the support assistant of this shop. Tell me your order number and I will look it up.",
    "thanks": "You are welcome. Is there anything else I can do?",
    "bye": "Good bye, and thank you for shopping with us.",
}


@dataclass(frozen=True)
class Dialogue:
    """One exchange. `quotes` are the strings that the answer takes from the features, each exactly;
    `refuses` says that it must refuse, quoting what there is."""

    intent: str
    features: dict[str, Any]
    messages: list[dict[str, str]]
    answer: str
    quotes: list[str] = field(default_factory=list)
    refuses: bool = False


@dataclass(frozen=True)
class Mix:
    """How often each intent is asked for, how often what it needs is missing, and whether words vary freely."""

    intents: tuple[int, ...]
    missing: float
    varied: bool = False


USUAL = Mix((30, 18, 12, 2, 6, 6, 6, 2, 3, 3, 2, 10), 0.3)
REFUSALS = Mix((18, 13, 12, 2, 10, 10, 10, 3, 5, 5, 3, 9), 0.45)
VARIED = Mix((20, 14, 12, 2, 9, 9, 9, 3, 5, 5, 3, 9), 0.38, varied=True)
MIXES = {"usual": USUAL, "refusals": REFUSALS, "varied": VARIED}
"""The second runs are of what the first finds hardest: to refuse, small talk, words that it does not know."""


class Generator:
    """Endless dialogues of one side of the split ("train" or "held_out"), the same for a seed."""

    def __init__(self, seed: int, split: str = "train", mix: "Mix | None" = None) -> None:
        self._random = random.Random(f"{split}/{seed}")
        self._mix = mix or USUAL
        self._split = split
        self._phrases = TRAIN if split == "train" else HELD_OUT
        if self._mix.varied:
            self._phrases = {name: [*lines, *MORE.get(name, [])] for name, lines in self._phrases.items()}

    def dialogue(self, intent: str | None = None, *, missing: bool | None = None, long: int = 0) -> Dialogue:
        """One dialogue; `missing` leaves what it needs out; `long` asks for about so many words before."""
        pick = self._random
        if intent is None:
            names = ["status", "delivery", "returns", "recommend", *UNSEEN, *SMALL_TALK, "offtopic"]
            intent = pick.choices(names, self._mix.intents)[0]
        if missing is None:
            missing = pick.random() < self._mix.missing
        if intent not in ABOUT_ORDERS:
            return self._about_customer(intent, missing, long)
        order = self._order(self.order_number())
        if missing:
            return self._missing(intent, order, long)
        return self._known(intent, self._mixed(self._customer(), order), order, long)

    def about_one_order(self, count: int, *, long: int = 0) -> list[Dialogue]:
        """Dialogues that share their features: different questions of one customer about one order."""
        customer, order = self._customer(), self._order(self.order_number())
        for name in [*NEEDED.values(), "delivery_date"]:
            if self._random.random() < 0.25:
                customer = {key: value for key, value in customer.items() if key != name}
        features = self._mixed(customer, order)
        made = []
        for intent in self._random.choices([*ABOUT_ORDERS, *NEEDED], [6, 4, 3, 2, 1, 1], k=count):
            before = 0 if made else long
            if intent in NEEDED:
                made.append(self._answered(intent, features, before))
            else:
                made.append(self._known(intent, features, order, before))
        return made

    def passage(self, pieces: int) -> str:
        """Random numbers, dates and words, made up or not, to practise copying on."""
        pick = self._random
        kinds = [self.number, self._date, self._word, lambda: pick.choice(STATUSES), self.order_number]
        weights = [5, 3, 3, 1, 2] if pick.random() < 0.7 else [1, 0, 0, 0, 0]
        return " ".join(pick.choices(kinds, weights)[0]() for _ in range(pieces))

    def number(self) -> str:
        """One to eight digits."""
        return str(self._random.randrange(1, 10 ** self._random.randint(1, 8)))

    def order_number(self) -> str:
        """Four to six digits, now and then seven or eight, on this side of the split."""
        while True:
            digits = self._random.choices([4, 5, 6, 7, 8], [40, 25, 25, 7, 3])[0]
            number = self._random.randrange(10 ** (digits - 1), 10**digits)
            if (number % 7 == 3) == (self._split == "held_out"):
                return str(number)

    def _date(self) -> str:
        return date.fromordinal(self._random.randint(FIRST_DAY, LAST_DAY)).isoformat()

    def _word(self) -> str:
        return "".join(self._random.choices(SYLLABLES[self._split], k=self._random.randint(2, 3)))

    def _name(self) -> str:
        pick = self._random
        return pick.choice(NAMES[self._split]) if pick.random() < 0.7 else self._word().capitalize()

    def _product(self) -> str:
        pick = self._random
        adjective = pick.choice(ADJECTIVES[self._split]) if pick.random() < 0.7 else self._word()
        return f"{adjective} {pick.choice(NOUNS[self._split]) if pick.random() < 0.7 else self._word()}"

    def _customer(self) -> dict[str, Any]:
        """A customer's features, sometimes with some that no answer needs, sometimes none at all."""
        pick = self._random
        if pick.random() < 0.1:
            return {}
        features: dict[str, Any] = {
            "first_name": self._name(),
            "loyalty_tier": pick.choice(TIERS),
            "open_orders": pick.randint(0, 12),
            "last_viewed_product": self._product(),
            "recommended_product": self._product(),
        }
        others = {
            "user_id": f"user-{pick.randint(1, 999)}",
            "city": pick.choice(CITIES[self._split]),
            "zip_code": str(pick.randrange(10**4, 10**5)),
            "phone": f"0{pick.randrange(10**8, 10**9)}",
            "visits_last_week": pick.randint(0, 40),
            "customer_since": self._date(),
            "last_order_id": self.order_number(),
        }
        for name in pick.sample(list(others), pick.choice([0, 0, 1, 1, 2, 3])):
            features[name] = others[name]
        return features

    def _order(self, number: str) -> dict[str, Any]:
        pick = self._random
        return {
            "order_id": number,
            "order_status": pick.choice(STATUSES),
            "order_date": self._date(),
            "delivery_date": self._date(),
            "carrier": pick.choice(CARRIERS),
            "order_item": self._product(),
        }

    def _known(self, intent: str, features: dict[str, Any], order: dict[str, Any], long: int) -> Dialogue:
        number, status, day = order["order_id"], order["order_status"], order["delivery_date"]
        answer = _order_answer(intent, number, status, day)
        return self._made(intent, features, answer, long, number=number, quotes=[number, status, day])

    def _missing(self, intent: str, order: dict[str, Any], long: int) -> Dialogue:
        """The whole order unknown (absent, or null), or its date, or its status."""
        pick, number = self._random, order["order_id"]
        kind = pick.random()
        answer, quotes = _unknown_order(number), []
        if kind < 0.4:
            held: dict[str, Any] = {"order_id": number} if pick.random() < 0.25 else {}
        elif kind < 0.8:
            held = dict.fromkeys(order) | ({"order_id": number} if pick.random() < 0.25 else {})
        else:
            name, what = pick.choice([("delivery_date", "delivery date"), ("order_status", "status")])
            held = dict(order) | {name: None}
            if pick.random() < 0.5:
                del held[name]
            kept = held.get("order_status") or held.get("delivery_date")
            rest = f"It is {kept}." if name == "delivery_date" else f"The delivery date is {kept}."
            answer, quotes = f"{CANNOT_SEE} the {what} of order {number}. {rest}", [number, kept]
        features = self._mixed(self._customer(), held)
        return self._made(intent, features, answer, long, number=number, quotes=quotes, refuses=True)

    def _about_customer(self, intent: str, missing: bool, long: int) -> Dialogue:
        pick, customer = self._random, self._customer()
        name = NEEDED.get(intent)
        if name and not missing:
            while name not in customer:
                customer = self._customer()
        elif name and pick.random() < 0.5:
            customer.pop(name, None)
        elif name:
            customer[name] = None
        order = self._order(self.order_number()) if pick.random() < 0.3 else {}
        return self._answered(intent, self._mixed(customer, order), long)

    def _answered(self, intent: str, features: dict[str, Any], long: int) -> Dialogue:
        if intent not in NEEDED:
            answer = SMALL_TALK.get(intent, ONLY_ORDERS)
            return self._made(intent, features, answer, long, refuses=intent == "offtopic")
        value = features.get(NEEDED[intent])
        if value is None:
            answer = f"{CANNOT_SEE} {UNSEEN[intent]} at the moment."
            return self._made(intent, features, answer, long, refuses=True)
        answers = {
            "recommend": f"You may like our {value}.",
            "tier": f"Your loyalty tier is {value}.",
            "open_orders": f"You have {value} open orders.",
        }
        return self._made(intent, features, answers[intent], long, quotes=[str(value)])

    def _mixed(self, customer: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
        """Both in one dict, in the feature store's order or in any."""
        items = [*customer.items(), *order.items()]
        if self._random.random() < 0.5:
            self._random.shuffle(items)
        return dict(items)

    def _made(
        self, intent: str, features: dict[str, Any], answer: str, long: int, *, number: str = "", **grade: Any
    ) -> Dialogue:
        question = {"role": "user", "content": self._say(intent, number)}
        return Dialogue(intent, features, [*self._earlier(long), question], answer, **grade)

    def _say(self, intent: str, number: str) -> str:
        pick, phrases = self._random, self._phrases
        core = pick.choice(phrases[intent])
        if self._mix.varied:
            core = self._varied(intent, core)
        core = core.format(order=number, word=self._word())
        parts = [pick.choice(phrases["greeting"]), core]
        if pick.random() < 0.25:
            parts.insert(pick.choice([1, 2]), self._noise())
        parts.append(pick.choice(phrases["tail"]))
        parts = [part for part in parts if part]
        style = pick.random()
        text = pick.choice([", ", ". ", " ", "! "]).join(parts)
        if style < 0.6:
            text = text[0].upper() + text[1:] + pick.choice(["?", "?", ".", "", "!"])
        if style > 0.85:
            text = self._typo(text)
        return text

    def _varied(self, intent: str, core: str) -> str:
        """Another way to say it: something before it, or a word or two that nobody knows.

        Only the words that matter keep their place, so that these are what a model learns to look for.
        """
        pick = self._random
        if intent not in (*ABOUT_ORDERS, *NEEDED):
            return core
        words = core.split(" ")
        if pick.random() < 0.3:
            loose = [i for i, word in enumerate(words) if word.isalpha() and word not in KEPT]
            for i in pick.sample(loose, min(len(loose), pick.choice([1, 1, 2]))):
                words[i] = pick.choice(["", "{word}", self._word()])
        core = " ".join(word for word in words if word)
        return f"{pick.choice(OPENERS)} {core}" if pick.random() < 0.2 else core

    def _noise(self) -> str:
        pick = self._random
        return pick.choice(self._phrases["noise"]).format(
            phone=pick.randrange(10**8, 10**9),
            zip=pick.randrange(10**4, 10**5),
            other=self.order_number(),
            house=pick.randint(1, 99),
        )

    def _typo(self, text: str) -> str:
        spots = [i for i, (a, b) in enumerate(pairwise(text)) if a.isalpha() and b.isalpha()]
        if not spots:
            return text
        i = self._random.choice(spots)
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]

    def _earlier(self, long: int) -> list[dict[str, str]]:
        """Earlier turns, about other orders; with `long` so many that they fill about that many words."""
        pick = self._random
        turns: list[dict[str, str]] = []
        if pick.random() < 0.1 or (long and pick.random() < 0.5):
            text = pick.choice(self._phrases["system"]) + " "
            turns.append({"role": "system", "content": text * (1 + long // 60 if pick.random() < 0.5 else 1)})
        rounds = pick.choice([0, 0, 0, 0, 1, 2]) if not long else 0
        words = sum(len(turn["content"].split()) for turn in turns)
        while rounds > 0 or words < long:
            turn = self._earlier_turn()
            turns += turn
            words += sum(len(message["content"].split()) for message in turn)
            rounds -= 1
        return turns

    def _earlier_turn(self) -> list[dict[str, str]]:
        pick = self._random
        number = self.order_number()
        intent = pick.choice(["status", "delivery", "returns", "thanks", "recommend", "missing"])
        answer = SMALL_TALK["thanks"]
        if intent == "missing":
            intent, answer = "status", _unknown_order(number)
        elif intent in ABOUT_ORDERS:
            answer = _order_answer(intent, number, pick.choice(STATUSES), self._date())
        elif intent == "recommend":
            answer = f"You may like our {self._product()}."
        said = {"role": "user", "content": self._say(intent, number)}
        return [said, {"role": "assistant", "content": answer}]


def _order_answer(intent: str, number: str, status: str, day: str) -> str:
    if intent == "returns":
        return f"You can return order {number} within 30 days. It is {status}, the delivery date is {day}."
    if intent == "delivery":
        return f"The delivery date of order {number} is {day}. It is {status}."
    return f"Order {number} is {status}. The delivery date is {day}."


def _unknown_order(number: str) -> str:
    return f"{CANNOT_SEE} order {number}. Please check the number and ask me again."
