"""What each SQL function says of one row: its arguments in, a JSON value out.

Each takes what is served and the row's arguments, the first of which names a model or features, and gives
an object with `value` and what else there is to tell. It raises what a handler's `call` may.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from flink_llm import codec
from flink_llm.engine.options import Choices
from flink_llm.errors import RecordError
from flink_llm.names import unknown
from flink_llm.udfs.batches import Served

_OF_THE_CALL = ("deadline", "priority")
_OF_A_PROMPT = ("system", "adapter", "features", "raw")
GENERATION = (*_OF_THE_CALL, *_OF_A_PROMPT, *Choices.__annotations__)
TEXTS = ("system", "adapter", "regex")
"""Options that are text, whatever JSON it might be."""
EMBEDDING = (*_OF_THE_CALL, "dimensions")
CLASSIFICATION = _OF_THE_CALL
EXTRACT = "Read the text and answer with the data it holds, as JSON."
"""What a model is told that is to extract, unless the options say `system`."""


@lru_cache(maxsize=1024)
def read_options(text: str | None, known: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object of options. Raises RecordError `bad_option`, naming the nearest known one."""
    if text is None:
        return {}
    try:
        options = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise RecordError("bad_option", f"options is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise RecordError("bad_option", "options is no JSON object, like '{\"temperature\": 0.7}'")
    for name in options:
        if name not in known:
            raise RecordError("bad_option", unknown("options", name, known))
    _check(options, "deadline", (int, float), "seconds")
    _check(options, "priority", int, "a whole number from 0 to 9")
    _check(options, "system", str, "a text")
    _check(options, "adapter", str, "a name")
    _check(options, "features", Mapping, "an object")
    return options


def _check(options: dict[str, Any], name: str, types: Any, wanted: str) -> None:
    value = options.get(name)
    if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
        raise RecordError("bad_option", f"{name} is {value!r}, it must be {wanted}")


async def generate(served: Served, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """(model, prompt, options) to the reply's text."""
    name, prompt, options = arguments
    return await _generate(served[name], prompt, read_options(options, GENERATION))


async def extract(served: Served, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """(model, text, JSON Schema, options) to JSON that fits the schema, as text."""
    name, text, schema, options = arguments
    chosen = {"system": EXTRACT, **read_options(options, GENERATION), "json_schema": schema}
    said = await _generate(served[name], text, chosen)
    try:
        msgspec.json.decode(said["value"])  # as its readers do: Python's own takes NaN and numbers without end
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise RecordError("model_error", f"the reply is not JSON: {error}") from error
    return said


async def _generate(model: Any, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    choices = {name: value for name, value in options.items() if name in Choices.__annotations__}
    adapter, features, system = options.get("adapter") or "", options.get("features"), options.get("system")
    if options.get("raw"):
        reply = model.generate(prompt, adapter=adapter, **choices)
    else:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        reply = model.chat(turns, features=features, adapter=adapter, **choices)
    await reply
    return {"value": reply.text, "finish_reason": reply.finish_reason, "model_hash": reply.response.model_hash}


async def embed(served: Served, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """(model, text, options) to the text's vector."""
    name, text, options = arguments
    found = await served[name](text, dimensions=read_options(options, EMBEDDING).get("dimensions"))
    return {"value": found.vector.tolist(), "model_hash": found.model_hash}


async def classify(served: Served, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """(model, text, options) to the likeliest label."""
    name, text, options = arguments
    read_options(options, CLASSIFICATION)
    found = await served[name](text)
    return {"value": found.label, "score": found.scores[found.label], "model_hash": found.model_hash}


async def look_up(served: Served, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """(view or service, key, ...) to its features as JSON text, null where no view has a row of the key."""
    name, *keys = arguments
    named = served.join_keys(name, keys)
    row = await served[name].get(**named)
    features = {key: value for key, value in row.items() if key not in named}
    known = row.found or any(value is not None for value in features.values())
    text = codec.encode(features).decode() if known else None
    return {"value": text, "age_s": row.age_s}
