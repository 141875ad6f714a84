"""Shop support dialogues, made from a seed: what the customer says, what is known, the right answer.

A dialogue's prompt carries features as the job reads them from the feature store; its answer may use
nothing else. Training and held-out dialogues share no phrasing, no name, no product and no order
number: a held-out number leaves 3 when divided by 7, a training number never does.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from models.training.phrases import ADJECTIVES, CARRIERS, HELD_OUT, NAMES, NOUNS, STATUSES, TIERS, TRAIN

CANNOT_SEE = "I cannot see"
ONLY_ORDERS = "I can only help with orders, deliveries, returns and recommendations in our shop."


@dataclass(frozen=True)
class Dialogue:
    """One exchange. `quotes` are the strings a grounded answer must hold; `refuses` says it must refuse."""

    intent: str
    features: dict[str, Any]
    messages: list[dict[str, str]]
    answer: str
    quotes: list[str] = field(default_factory=list)
    refuses: bool = False


class Generator:
    """Endless dialogues of one side of the split ("train" or "held_out"), the same for a seed."""

    def __init__(self, seed: int, split: str = "train") -> None:
        self._random = random.Random(f"{split}/{seed}")
        self._split = split
        self._phrases = TRAIN if split == "train" else HELD_OUT

    def dialogue(self, intent: str | None = None, *, missing: bool | None = None, long: int = 0) -> Dialogue:
        """One dialogue; `missing` leaves the needed feature out; `long` asks for about so many words before."""
        pick = self._random
        if intent is None:
            intent = pick.choices(
                ["status", "delivery", "returns", "recommend", "tier", "open_orders", "smalltalk", "offtopic"],
                [40, 20, 8, 8, 4, 5, 5, 8],
            )[0]
        if missing is None:
            missing = pick.random() < 0.2
        if intent in ("status", "delivery", "returns"):
            return self._about_order(intent, missing, long)
        return self._about_customer(intent, missing, long)

    def about_one_order(self, count: int) -> list[Dialogue]:
        """Dialogues with different questions about one order, whose features the first one holds."""
        number = self.order_number()
        order = self._order(number)
        features = self._shuffled({**self._customer(), **order})
        intents = self._random.choices(["status", "delivery", "returns"], k=count)
        return [self._known(intent, features, order, 0) for intent in intents]

    def number(self) -> str:
        """A date, or up to eight digits."""
        return self._date() if self._random.random() < 0.4 else str(self._random.randrange(1, 10**8))

    def order_number(self) -> str:
        """Four to six digits, on this side of the split."""
        while True:
            digits = self._random.choice([4, 4, 5, 6])
            number = self._random.randrange(10 ** (digits - 1), 10**digits)
            if (number % 7 == 3) == (self._split == "held_out"):
                return str(number)

    def _date(self) -> str:
        pick = self._random
        return f"{pick.randint(2024, 2028)}-{pick.randint(1, 12):02d}-{pick.randint(1, 28):02d}"

    def _product(self) -> str:
        pick = self._random
        return f"{pick.choice(ADJECTIVES[self._split])} {pick.choice(NOUNS[self._split])}"

    def _customer(self) -> dict[str, Any]:
        pick = self._random
        return {
            "first_name": pick.choice(NAMES[self._split]),
            "loyalty_tier": pick.choice(TIERS),
            "open_orders": pick.randint(0, 12),
            "last_viewed_product": self._product(),
            "recommended_product": self._product(),
        }

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

    def _about_order(self, intent: str, missing: bool, long: int) -> Dialogue:
        pick = self._random
        number = self.order_number()
        order = self._order(number)
        customer = self._customer() if pick.random() < 0.8 else {}
        if missing:
            held = {} if pick.random() < 0.5 else {name: None for name in order}
            if pick.random() < 0.3:
                held["order_id"] = number
            features = self._shuffled({**customer, **held})
            answer = f"{CANNOT_SEE} order {number}. Please check the number and ask me again."
            return self._made(intent, features, number, answer, long, refuses=True)
        return self._known(intent, self._shuffled({**customer, **order}), order, long)

    def _known(self, intent: str, features: dict[str, Any], order: dict[str, Any], long: int) -> Dialogue:
        number, status, date = order["order_id"], order["order_status"], order["delivery_date"]
        quotes = [number, status, date]
        if intent == "returns":
            answer = f"You can return order {number} within 30 days. Its status is {status}, delivery date {date}."
        elif intent == "delivery":
            answer = f"Order {number} has the delivery date {date}. Its status is {status}."
        else:
            answer = f"Order {number} is {status}. The delivery date is {date}."
        return self._made(intent, features, number, answer, long, quotes=quotes)

    def _about_customer(self, intent: str, missing: bool, long: int) -> Dialogue:
        pick = self._random
        customer = self._customer()
        needed = {"recommend": "recommended_product", "tier": "loyalty_tier", "open_orders": "open_orders"}
        name = needed.get(intent)
        value = customer.get(name or "")
        answers = {
            "recommend": f"You may like our {value}.",
            "tier": f"Your loyalty tier is {value}.",
            "open_orders": f"You have {value} open orders.",
            "smalltalk": "I am the support assistant of this shop. Tell me your order number and I will look it up.",
            "offtopic": ONLY_ORDERS,
        }
        refuses = intent == "offtopic"
        quotes = [str(value)] if name else []
        answer = answers[intent]
        if missing and name:
            if pick.random() < 0.5:
                customer.pop(name)
            else:
                customer[name] = None
            what = {"recommend": "a recommendation for you", "tier": "your loyalty tier"}
            answer = f"{CANNOT_SEE} {what.get(intent, 'your open orders')} at the moment."
            refuses, quotes = True, []
        if pick.random() < 0.3 and not name:
            customer = {}
        if pick.random() < 0.2:
            customer |= self._order(self.order_number())
        return self._made(intent, self._shuffled(customer), None, answer, long, quotes=quotes, refuses=refuses)

    def _shuffled(self, features: dict[str, Any]) -> dict[str, Any]:
        items = list(features.items())
        if self._random.random() < 0.5:
            self._random.shuffle(items)
        return dict(items)

    def _made(
        self, intent: str, features: dict[str, Any], number: str | None, answer: str, long: int, **grade: Any
    ) -> Dialogue:
        question = self._say(intent, number)
        messages = [*self._earlier(long), {"role": "user", "content": question}]
        return Dialogue(intent, features, messages, answer, **grade)

    def _say(self, intent: str, number: str | None) -> str:
        pick, phrases = self._random, self._phrases
        core = pick.choice(phrases[intent]).format(order=number)
        parts = [pick.choice(phrases["greeting"]), core]
        if pick.random() < 0.25:
            parts.insert(pick.choice([1, 2]), self._noise())
        parts.append(pick.choice(phrases["tail"]))
        parts = [part for part in parts if part]
        style = pick.random()
        text = pick.choice([", ", ". ", " "]).join(parts)
        if style < 0.5:
            text = text[0].upper() + text[1:] + pick.choice(["?", ".", "", "!"])
        if style > 0.9:
            text = self._typo(text)
        return text

    def _noise(self) -> str:
        pick = self._random
        return pick.choice(self._phrases["noise"]).format(
            phone=pick.randrange(10**8, 10**9),
            zip=pick.randrange(10**4, 10**5),
            other=self.order_number(),
            house=pick.randint(1, 99),
        )

    def _typo(self, text: str) -> str:
        spots = [i for i, (a, b) in enumerate(zip(text, text[1:], strict=False)) if a.isalpha() and b.isalpha()]
        if not spots:
            return text
        i = self._random.choice(spots)
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]

    def _earlier(self, long: int) -> list[dict[str, str]]:
        """Earlier turns, about other orders; with `long` so many that they fill about that many words."""
        pick = self._random
        turns: list[dict[str, str]] = []
        if pick.random() < 0.15 or (long and pick.random() < 0.5):
            text = "You are the support assistant of a shop. Answer from what you know. "
            turns.append({"role": "system", "content": text * (1 + long // 60 if pick.random() < 0.5 else 1)})
        rounds = pick.choice([0, 0, 0, 1, 2])
        while rounds > 0 or sum(len(turn["content"].split()) for turn in turns) < long:
            other = self.order_number()
            intent = pick.choice(["status", "delivery", "smalltalk"])
            answer = f"Order {other} is {pick.choice(STATUSES)}. The delivery date is {self._date()}."
            if intent == "smalltalk":
                answer = "I am the support assistant of this shop."
            turns += [
                {"role": "user", "content": self._say(intent, other)},
                {"role": "assistant", "content": answer},
            ]
            rounds -= 1
        return turns


def is_grounded(dialogue: Dialogue, reply: str) -> bool:
    """Whether the reply quotes exactly what the dialogue's answer rests on."""
    return bool(dialogue.quotes) and all(quote in reply for quote in dialogue.quotes)


def is_refusal(reply: str) -> bool:
    """Whether the reply refuses instead of making something up."""
    return reply.startswith((CANNOT_SEE, ONLY_ORDERS[:20])) and not any(status in reply for status in STATUSES)
