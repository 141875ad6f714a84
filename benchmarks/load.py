"""What the contenders are asked: requests of known lengths with times of arrival, the same for all."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.shapes import Shape, prompt


@dataclass(frozen=True)
class Request:
    """A prompt as tokens and as the text that is exactly them, the reply's length, arrival in seconds."""

    tokens: list[int]
    text: str
    reply: int
    at: float = 0.0


def make(shape: Shape, pairs: Sequence[tuple[int, int]], seed: object) -> list[Request]:
    """Requests of (prompt, reply) lengths, all arriving at once."""
    made = []
    for i, (length, reply) in enumerate(pairs):
        tokens, text = prompt(shape, f"{seed}/{i}", length)
        made.append(Request(tokens, text, reply))
    return made


def lengths(count: int, longest: int, seed: object) -> list[tuple[int, int]]:
    """Of prompts and replies: from an eighth of `longest` to all of it, evenly, paired at random."""
    steps = [round(longest * (1 + 7 * i / max(1, count - 1)) / 8) for i in range(count)]
    replies = random.Random(str(seed)).sample(steps, count)
    return random.Random(f"{seed}/pairs").sample(list(zip(steps, replies, strict=True)), count)


def mixed(shape: Shape, count: int, longest: int, seed: object = 1) -> list[Request]:
    """Requests of such `lengths`."""
    return make(shape, lengths(count, longest, seed), seed)


def arriving(requests: Sequence[Request], within: float) -> list[Request]:
    """The same requests, evenly spread over `within` seconds."""
    return [replace(request, at=within * i / len(requests)) for i, request in enumerate(requests)]


def rate(requests: Sequence[Request], began: float) -> float:
    """Reply tokens per second from `began` (perf_counter) to now."""
    return sum(request.reply for request in requests) / (time.perf_counter() - began)


def wait_until(moment: float) -> None:
    """Sleeps until a perf_counter time."""
    time.sleep(max(0.0, moment - time.perf_counter()))
