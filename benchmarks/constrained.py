"""Does what is constrained fit, whatever the model would like to say? 500 schemas, the demo model.

Schemas are drawn from a seed: nested objects and arrays, texts, numbers, enumerations, optional fields.
Every second request draws its tokens at temperature 1.5. A text counts as valid when it is JSON that
jsonschema accepts. The cost is the time per token against the same requests unconstrained, one at a time.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

import jsonschema

from benchmarks.demo_model import MODEL
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.generation import Generation, Model
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import WorkTable

SEED, MAX_TOKENS = 11, 400
"""The longest of the schemas needs 240 tokens of this tokenizer, whatever is said in it."""
LEAVES: tuple[dict[str, Any], ...] = (
    {"type": "string"},
    {"type": "string", "maxLength": 12},
    {"type": "integer"},
    {"type": "integer", "minimum": 1, "maximum": 500},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["shipped", "lost", 7, None]},
    {"const": "fixed"},
)
NAMES = ("order", "status", "days left", "größe", "items", "note", "a", "customer_name")


def schema(pick: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema; the deeper, the plainer."""
    kind = pick.random() if depth else 0.0
    if depth > 2 or kind > 0.55:
        return dict(pick.choice(LEAVES))
    if kind > 0.4:
        return {"type": "array", "items": schema(pick, depth + 1), "maxItems": pick.randint(1, 4)}
    names = pick.sample(NAMES, pick.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: schema(pick, depth + 1) for name in names},
        "required": [name for name in names if pick.random() < 0.7],
        "additionalProperties": False,
    }


def is_valid(text: str, wanted: dict[str, Any]) -> bool:
    """Whether the text is JSON that fits."""
    try:
        jsonschema.validate(json.loads(text), wanted)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _asked(model: Model, number: int, wanted: dict[str, Any] | None) -> Generation:
    messages = [{"role": "user", "content": f"Where is order {1000 + number}?"}]
    temperature = 1.5 * (number % 2)
    return model.chat(messages, json_schema=wanted, max_tokens=MAX_TOKENS, temperature=temperature, seed=number)


async def _per_token_ms(model: Model, schemas: list[dict[str, Any] | None]) -> float:
    times = []
    for number, wanted in enumerate(schemas):
        began = time.perf_counter()
        reply = await _asked(model, number, wanted)
        times.append((time.perf_counter() - began) * 1000 / max(1, reply.usage.completion_tokens))
    return statistics.median(times)


async def measure(count: int) -> dict[str, Any]:
    """One run; see the module."""
    table = WorkTable(OnnxBackend(HostSettings(device="cpu")))
    model = Model(table, "support-chat", str(MODEL))
    await model.load()
    pick = random.Random(SEED)
    schemas = [schema(pick) for _ in range(count)]
    replies = await asyncio.gather(*(_asked(model, number, wanted) for number, wanted in enumerate(schemas)))
    valid = [is_valid(reply.text, wanted) for reply, wanted in zip(replies, schemas, strict=True)]
    for reply, wanted in [pair for pair, ok in zip(zip(replies, schemas, strict=True), valid, strict=True) if not ok][
        :5
    ]:
        print(f"not valid: {reply.text!r} ({reply.finish_reason}) for {json.dumps(wanted)}")
    few: list[dict[str, Any] | None] = list(schemas[:40])
    constrained, free = await _per_token_ms(model, few), await _per_token_ms(model, [None] * len(few))
    await table.close()
    return {
        "schemas": count,
        "valid": sum(valid) / count,
        "per_token_ms": round(constrained, 3),
        "unconstrained_per_token_ms": round(free, 3),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 schemas instead of 500")
    args = parser.parse_args()
    print(json.dumps(asyncio.run(measure(100 if args.quick else 500))))


if __name__ == "__main__":
    main()
