"""What its next release keeps: one field renamed, one gone, one new."""

from typing import Any

from msgspec import Struct

from flink_llm import codec


class Turn(Struct):
    said: str
    number: int
    language: str = "en"


def upgrade(fields: dict[str, Any], version: int) -> dict[str, Any]:
    return {"said": fields["text"], "number": fields["number"]}


codec.register("stored.turn", Turn, version=2, upgrade=upgrade)
