"""What the stored savepoint's handler kept, as it was."""

from msgspec import Struct

from flink_llm import codec


class Turn(Struct):
    text: str
    number: int
    mood: str = "calm"


codec.register("stored.turn", Turn)
