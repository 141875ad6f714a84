"""Customers and orders of a made-up shop, the same for a seed, to fill a local feature store with."""

import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

FIRST_NAMES = ("Anna", "Ben", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karin")
ADJECTIVES = ("red", "blue", "green", "black", "white", "small", "large", "light", "warm", "soft", "modern")
NOUNS = ("lamp", "jacket", "kettle", "backpack", "keyboard", "chair", "tent", "bottle", "watch", "scarf")
TIERS = ("bronze", "silver", "gold", "platinum")
CARRIERS = ("DHL", "UPS", "Hermes", "FedEx", "DPD", "GLS")
STATUSES = ("processing", "packed", "shipped", "out for delivery", "delivered", "delayed", "cancelled")
KNOWN_ORDER = "1042"

DEFAULT_SEED = 7
CUSTOMERS, ORDERS = 200, 500


def customers(seed: int = DEFAULT_SEED, count: int = CUSTOMERS) -> list[dict[str, Any]]:
    """Rows of `customer_profile`; the ids are `user-1`, `user-2` and so on."""
    pick = random.Random(f"customers/{seed}")
    return [
        {
            "user_id": f"user-{number}",
            "first_name": pick.choice(FIRST_NAMES),
            "loyalty_tier": pick.choice(TIERS),
            "open_orders": pick.randint(0, 6),
            "last_viewed_product": _product(pick),
            "recommended_product": _product(pick),
        }
        for number in range(1, count + 1)
    ]


def orders(seed: int = DEFAULT_SEED, count: int = ORDERS, *, today: date | None = None) -> list[dict[str, Any]]:
    """Rows of `order_status`: ids of four to six digits, `1042` first; dates lie around `today`."""
    pick = random.Random(f"orders/{seed}")
    day = today or datetime.now(UTC).date()
    ids = dict.fromkeys([KNOWN_ORDER])
    while len(ids) < count:
        digits = pick.choice((4, 4, 5, 6))
        ids[str(pick.randrange(10 ** (digits - 1), 10**digits))] = None
    return [_order(pick, number, day) for number in list(ids)[:count]]


def frames(seed: int = DEFAULT_SEED, *, now: datetime | None = None) -> dict[str, Any]:
    """View → pandas frame of its rows, valid since `now` (default: this moment, in UTC)."""
    import pandas as pd  # slow to import

    moment = now or datetime.now(UTC)
    rows = {"customer_profile": customers(seed), "order_status": orders(seed, today=moment.date())}
    return {view: pd.DataFrame(each).assign(event_timestamp=moment) for view, each in rows.items()}


def _product(pick: random.Random) -> str:
    return f"{pick.choice(ADJECTIVES)} {pick.choice(NOUNS)}"


def _order(pick: random.Random, number: str, today: date) -> dict[str, Any]:
    status = pick.choice(STATUSES)
    ordered = today - timedelta(days=pick.randint(3, 20))
    ahead = pick.randint(1, 7) if status != "delivered" else -pick.randint(0, 2)
    return {
        "order_id": number,
        "order_status": status,
        "order_date": ordered.isoformat(),
        "delivery_date": (today + timedelta(days=ahead)).isoformat(),
        "carrier": pick.choice(CARRIERS),
        "order_item": _product(pick),
    }
