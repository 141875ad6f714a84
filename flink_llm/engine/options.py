"""Generation options as a handler gives them: names, ranges, defaults, the seed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta, Struct

from flink_llm.engine.protocol import Options
from flink_llm.errors import RecordError

LONGEST = 65_536
"""Characters of a schema or a regular expression, and how many choices there may be."""
STOPS, STOP_LONGEST = 64, 1024
"""How many strings may end a reply, and characters of one: they are looked for at each token."""
BIASED = 1024
"""How many tokens a bias may name."""
SEED_BITS = 53
"""Bits of a seed: what a JSON number holds exactly."""


class Choices(TypedDict, total=False):
    """Options of a call; one that is absent or None has its default.

    `max_tokens` of the reply, 256; `temperature` 0 (the default) is greedy, at most 2; `top_k` 0 and
    `top_p` 1 leave every token in; `seed` decides every draw and defaults to a hash of the request id;
    the reply ends before any of the strings `stop`. One of `json_schema`, `regex` and `choices` constrains
    it: it is then JSON that fits, text that matches as a whole, or one of the choices, and ends within
    `max_tokens`, whatever the model would like to say.

    `min_p` leaves in what is at least so likely as that share of the likeliest token. `repetition_penalty`
    1, `presence_penalty` and `frequency_penalty` 0 (-2 to 2) change nothing; the first looks at prompt and
    reply, the others at the reply. `logit_bias` is added to the logits of token ids, -100 to 100.
    `logprobs` reports the log-probability of each token, and of so many of the likeliest in its place, 20
    at most.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: Sequence[str] | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choices: Sequence[str] | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    logprobs: int | None


class _Ranges(Struct, forbid_unknown_fields=True):
    max_tokens: Annotated[int, Meta(ge=1)]
    temperature: Annotated[float, Meta(ge=0, le=2)]
    top_k: Annotated[int, Meta(ge=0)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    seed: Annotated[int, Meta(ge=0, lt=2**SEED_BITS)]
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=STOP_LONGEST)]], Meta(max_length=STOPS)]
    json_schema: Annotated[str, Meta(max_length=LONGEST)]
    regex: Annotated[str, Meta(max_length=LONGEST)]
    choices: Annotated[list[Annotated[str, Meta(min_length=1, max_length=LONGEST)]], Meta(max_length=LONGEST)]
    min_p: Annotated[float, Meta(ge=0, le=1)]
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)]
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)]
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)]
    logit_bias: Annotated[
        list[tuple[Annotated[int, Meta(ge=0)], Annotated[float, Meta(ge=-100, le=100)]]], Meta(max_length=BIASED)
    ]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None


_DEFAULTS = msgspec.structs.asdict(Options())


def default_seed(request_id: str) -> int:
    """The seed of a request that names none, so that a repeat says the same.

    The first 53 bits of the SHA-256 of the request id. Frozen.
    """
    digest = hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 64 - SEED_BITS


def chosen(choices: Choices, request_id: str) -> Options:
    """Checked options with every default filled in. Raises RecordError `bad_option`."""
    given: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    schema = given.get("json_schema")
    if isinstance(schema, Mapping):
        try:
            given["json_schema"] = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise RecordError("bad_option", f"json_schema is not JSON: {error}") from error
    bias = given.get("logit_bias")
    if isinstance(bias, Mapping):
        try:
            given["logit_bias"] = sorted((int(token), value) for token, value in bias.items())
        except (TypeError, ValueError) as error:
            raise RecordError("bad_option", f"logit_bias does not map token ids to numbers: {error}") from error
    return Options(**msgspec.structs.asdict(_in_range({**_DEFAULTS, "seed": default_seed(request_id), **given})))


def check(options: Options) -> None:
    """Options that came over a socket, where a client may say anything. Raises RecordError `bad_option`."""
    _in_range(msgspec.structs.asdict(options))


def _in_range(values: dict[str, Any]) -> _Ranges:
    try:
        return msgspec.convert(values, _Ranges)
    except msgspec.ValidationError as error:
        raise RecordError("bad_option", str(error)) from error
