"""What a consumer of tokens does: the text of each request by the rule of docs/records.md."""

from collections.abc import Mapping
from typing import Any


class Reader:
    """Puts the texts of replies together from partials and results, in whatever order and however often they come.

    Of each request it keeps the tokens of the generation that its result names, orders them by sequence and
    drops repeats.
    """

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, str], dict[int, str]] = {}
        self._generation: dict[str, str] = {}

    def token(self, record: Mapping[str, Any]) -> None:
        """A `TokenRecord`, decoded. Raises ValueError when a repeat says something else."""
        pieces = self._tokens.setdefault((record["request_id"], record["generation_id"]), {})
        said = pieces.setdefault(record["sequence"], record["text"])
        if said != record["text"]:
            raise ValueError(
                f"token {record['sequence']} of {record['request_id']} was {said!r} before, now {record['text']!r}"
            )

    def result(self, record: Mapping[str, Any]) -> None:
        """A result that names its generation, as `ChatResponse` does."""
        self._generation[record["request_id"]] = record["generation_id"]

    def text(self, request_id: str) -> str:
        """What its tokens say, joined. Raises ValueError without a result, or for a token that is missing."""
        generation = self._generation.get(request_id)
        if generation is None:
            raise ValueError(f"there is no result of {request_id!r}, only of {', '.join(self._generation) or 'none'}")
        pieces = self._tokens.get((request_id, generation), {})
        missing = sorted(set(range(max(pieces, default=-1) + 1)) - set(pieces))
        if missing:
            raise ValueError(f"token {missing[0]} of {request_id} is missing in generation {generation}")
        return "".join(pieces[sequence] for sequence in sorted(pieces))

    def texts(self) -> dict[str, str]:
        """The text of each request that has a result. Raises ValueError as `text` does."""
        return {request_id: self.text(request_id) for request_id in self._generation}
