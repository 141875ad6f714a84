"""Generation options as a handler gives them: names, ranges, defaults, the seed."""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta, Struct

from flink_llm.engine.protocol import Options
from flink_llm.errors import RecordError

SEED_BITS = 53
"""Bits of a seed: what a JSON number holds exactly."""


class Choices(TypedDict, total=False):
    """Options of a call; one that is absent or None has its default.

    `max_tokens` of the reply, 256; `temperature` 0 (the default) is greedy, at most 2; `top_k` 0 and
    `top_p` 1 leave every token in; `seed` decides every draw and defaults to a hash of the request id;
    the reply ends before any of the strings `stop`.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: Sequence[str] | None


class _Ranges(Struct, forbid_unknown_fields=True):
    max_tokens: Annotated[int, Meta(ge=1)]
    temperature: Annotated[float, Meta(ge=0, le=2)]
    top_k: Annotated[int, Meta(ge=0)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    seed: Annotated[int, Meta(ge=0, lt=2**SEED_BITS)]
    stop: list[Annotated[str, Meta(min_length=1)]]


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
    return Options(**msgspec.structs.asdict(_in_range({**_DEFAULTS, "seed": default_seed(request_id), **given})))


def check(options: Options) -> None:
    """Options that came over a socket, where a client may say anything. Raises RecordError `bad_option`."""
    _in_range(msgspec.structs.asdict(options))


def _in_range(values: dict[str, Any]) -> _Ranges:
    try:
        return msgspec.convert(values, _Ranges)
    except msgspec.ValidationError as error:
        raise RecordError("bad_option", str(error)) from error
