"""Does the demo model say what its prompt says? 300 held-out dialogues through the job's own prompt path.

Names, numbers, products and phrasings of these dialogues are none of training's; see
models/training/dialogues.py. The shipped quantised folder answers, greedily, through the engine.
"""

import argparse
import asyncio
import json
from pathlib import Path

from flink_llm.config import Chat
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.generation import Model
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import WorkTable
from models.training.dialogues import ABOUT_ORDERS, NEEDED, Dialogue, Generator
from models.training.grading import is_grounded, is_refusal

MODEL = Path(__file__).parents[1] / "models" / "support-chat"
SEED = 2026
LONG_WORDS = 520


def dialogues(count: int) -> dict[str, list[Dialogue]]:
    """By what they are graded for; a tenth of them are long, two in five lack what they ask for."""
    made = Generator(SEED, "held_out")
    orders, asked = list(ABOUT_ORDERS), [*ABOUT_ORDERS, *NEEDED]
    return {
        "grounded": [made.dialogue(orders[i % 3], missing=False) for i in range(count // 2)],
        "refused_when_missing": [made.dialogue(asked[i % 6], missing=True) for i in range(count * 2 // 5)],
        "grounded_long": [made.dialogue(orders[i % 3], missing=False, long=LONG_WORDS) for i in range(count // 10)],
    }


async def answer(model: Model, dialogue: Dialogue) -> tuple[str, int]:
    """The model's reply, and how long its prompt was in tokens."""
    reply = await model.chat(dialogue.messages, features=dialogue.features, max_tokens=Chat().max_tokens)
    return reply.text, reply.usage.prompt_tokens


async def measure(folder: Path, count: int, show: int) -> dict[str, object]:
    """Shares of right answers; `show` prints so many wrong ones."""
    table = WorkTable(OnnxBackend(HostSettings(device="cpu")))
    model = Model(table, "support-chat", str(folder))
    await model.load()
    result: dict[str, object] = {"dialogues": count}
    for name, asked in dialogues(count).items():
        answers = await asyncio.gather(*(answer(model, dialogue) for dialogue in asked))
        right = is_refusal if name == "refused_when_missing" else is_grounded
        good = [right(dialogue, text) for dialogue, (text, _) in zip(asked, answers, strict=True)]
        result[name] = round(sum(good) / len(good), 4)
        result[f"{name}_prompt_tokens_min"] = min(tokens for _, tokens in answers)
        wrong = [(dialogue, text) for dialogue, (text, _), ok in zip(asked, answers, good, strict=True) if not ok]
        for dialogue, text in wrong[:show]:
            print(f"{name}: {dialogue.messages[-1]['content']!r} {dialogue.features}\n  -> {text!r}")
    await table.close()
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder (default: the shipped one)")
    parser.add_argument("--quick", action="store_true", help="60 dialogues instead of 300")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers of each kind")
    args = parser.parse_args()
    print(json.dumps(asyncio.run(measure(args.model, 60 if args.quick else 300, args.show))))


if __name__ == "__main__":
    main()
