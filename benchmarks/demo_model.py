"""Does the demo model say what its prompt says? 300 held-out dialogues through the job's own handler.

Names, numbers, products and phrasings of these dialogues are none of training's; see
models/training/dialogues.py. Each is a request to `Generate` with the `chat` settings of
jobs/llm_inference.yaml, features and all, and the shipped quantised folder answers, greedily. An order is
looked up by the number that the job finds in the question, and a wrong number finds none, as in the store.

`order_found` is how often the job's pattern finds the right number in the question: where it does not, no
answer can be grounded. `refused_seeds` are the shares of refusals among dialogues that other seeds make.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from flink_llm.call import OperatorSettings
from flink_llm.config import Chat
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.settings import HostSettings
from flink_llm.feature_row import FeatureRow
from flink_llm.records import ChatRequest, Message
from flink_llm.testing import FakeServices, Harness
from flink_llm.udfs.catalogue import Generate
from models.training.dialogues import ABOUT_ORDERS, NEEDED, Dialogue, Generator
from models.training.grading import is_grounded, is_refusal

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "support-chat"
JOB = ROOT / "jobs" / "llm_inference.yaml"
SEED = 2026
OTHER_SEEDS = (2027, 2028, 2029)
LONG_WORDS = 520
PATIENCE_S = 1800.0
OF_ORDERS = ("order_id", "order_status", "order_date", "delivery_date", "carrier", "order_item")
"""What the store holds by order, and not by customer."""


def dialogues(count: int, seed: int = SEED) -> dict[str, list[Dialogue]]:
    """By what they are graded for; a tenth of them are long, two in five lack what they ask for."""
    made = Generator(seed, "held_out")
    orders, asked = list(ABOUT_ORDERS), [*ABOUT_ORDERS, *NEEDED]
    return {
        "grounded": [made.dialogue(orders[i % 3], missing=False) for i in range(count // 2)],
        "refused_when_missing": [made.dialogue(asked[i % 6], missing=True) for i in range(count * 2 // 5)],
        "grounded_long": [made.dialogue(orders[i % 3], missing=False, long=LONG_WORDS) for i in range(count // 10)],
    }


class Features:
    """The store: each dialogue is a customer, whose features are there, and one order, by its number."""

    join_keys = ("user_id", "order_id")

    def __init__(self, asked: Sequence[Dialogue]) -> None:
        self._asked = asked

    async def get(self, *, user_id: str, order_id: str | None) -> FeatureRow:
        """As `FeatureTable.get`: None for what is not found."""
        there = self._asked[int(user_id)].features
        found = order_id is not None and order_id == there.get("order_id")
        values = {name: None if name in OF_ORDERS and not found else value for name, value in there.items()}
        return FeatureRow(values, age_s=0.0, found=True)


class Services(FakeServices):
    """The model in process and the dialogues' features."""

    def __init__(self, asked: Sequence[Dialogue]) -> None:
        super().__init__(backend=OnnxBackend(HostSettings(device="cpu")))
        self._asked = asked

    def features(self, name: str) -> Features:
        """See `Context.features`."""
        return Features(self._asked)


def job_settings() -> Chat:
    """How the job makes a reply of a request."""
    return msgspec.convert(yaml.safe_load(JOB.read_text())["chat"], Chat)


def finds_order(dialogue: Dialogue) -> bool:
    """Whether the job looks up the order that the dialogue is about."""
    found = re.search(job_settings().entities["order_id"], dialogue.messages[-1]["content"])
    return found is not None and found[1] == dialogue.features["order_id"]


def answers(folder: Path, asked: Sequence[Dialogue]) -> list[dict[str, Any]]:
    """The job's outcome for each dialogue, as it would stand in Kafka. A failure is one without `text`."""
    chat = msgspec.structs.replace(
        job_settings(), model=str(folder)
    )  # these services take a model's name for its folder
    settings = OperatorSettings(capacity=len(asked), deadline=None)
    with Harness(Generate(chat), Services(asked), settings=settings, real_time=True) as run:
        for number, dialogue in enumerate(asked):
            messages = [Message(**message) for message in dialogue.messages]
            name = str(number)
            run.send(ChatRequest(request_id=name, session_id=name, user_id=name, messages=messages))
        run.finish(PATIENCE_S)
    outcomes = {outcome["request_id"]: outcome for outcome in [*run.results(), *run.failures()]}
    return [outcomes[str(number)] for number in range(len(asked))]


def measure(folder: Path, count: int, show: int) -> dict[str, Any]:
    """Shares of right answers; `show` prints so many wrong ones."""
    taken = dialogues(count)
    about = [*taken["grounded"], *taken["grounded_long"]]
    share = sum(map(finds_order, about)) / len(about)
    result: dict[str, Any] = {"dialogues": sum(map(len, taken.values())), "order_found": round(share, 4)}
    for name, asked in taken.items():
        found = answers(folder, asked)
        good = _graded(name, asked, found)
        result[name] = round(sum(good) / len(good), 4)
        lengths = [outcome["usage"]["prompt_tokens"] for outcome in found if "usage" in outcome]
        result[f"{name}_prompt_tokens_min"] = min(lengths)
        wrong = [pair for *pair, ok in zip(asked, found, good, strict=True) if not ok]
        for dialogue, outcome in wrong[:show]:
            said = outcome.get("text", outcome.get("code"))
            print(f"{name}: {dialogue.messages[-1]['content']!r} {dialogue.features}\n  -> {said!r}")
    name, shares = "refused_when_missing", []
    for seed in OTHER_SEEDS:
        asked = dialogues(count, seed)[name]
        good = _graded(name, asked, answers(folder, asked))
        shares.append(round(sum(good) / len(good), 4))
    return {**result, "refused_seeds": shares}


def _graded(name: str, asked: Sequence[Dialogue], found: Sequence[dict[str, Any]]) -> list[bool]:
    right = is_refusal if name == "refused_when_missing" else is_grounded
    return [right(dialogue, outcome.get("text", "")) for dialogue, outcome in zip(asked, found, strict=True)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder (default: the shipped one)")
    parser.add_argument("--quick", action="store_true", help="60 dialogues instead of 300")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers of each kind")
    args = parser.parse_args()
    print(json.dumps(measure(args.model, 60 if args.quick else 300, args.show)))


if __name__ == "__main__":
    main()
