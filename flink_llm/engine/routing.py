"""Which version of a deployment answers a request, and which has lost its part: decisions without a model."""

from collections.abc import Sequence

from flink_llm.engine.canary import Canary, Sample
from flink_llm.engine.deployment import Version, chosen, place_of


class Routes:
    """The versions of one reading of a deployment file, by their numbers in it.

    A canary that does not stay within its bounds is rolled back for as long as this reading stands: its
    requests go to the versions that are no canaries, by their weights, and nobody else's change over.
    """

    def __init__(self, deployment: str, versions: Sequence[Version]) -> None:
        self._salt = deployment
        self._weights = [version.weight for version in versions]
        self._steady = [0 if version.canary else version.weight for version in versions]
        self._canaries = {
            number: Canary(version.canary) for number, version in enumerate(versions) if version.canary is not None
        }
        self.rolled_back: set[int] = set()

    def choose(self, request_id: str) -> int:
        """The version for a request: always the same for the same id, until it is rolled back."""
        number = chosen(place_of(request_id, self._salt), self._weights)
        if number in self.rolled_back:
            number = chosen(place_of(request_id, f"{self._salt}/again"), self._steady)
        return number

    def ended(self, number: int, sample: Sample) -> list[tuple[int, str]]:
        """A request of a version has ended. Canaries that are rolled back by it, each with the reason."""
        if number in self._canaries:
            self._canaries[number].note(sample, canary=True)
        else:
            for canary in self._canaries.values():
                canary.note(sample, canary=False)
        return self._roll_back()

    def abandoned(self, number: int, waited_ms: float) -> list[tuple[int, str]]:
        """A request of a version was given up before it said anything; otherwise as `ended`."""
        if number in self._canaries:
            self._canaries[number].abandoned(waited_ms)
        return self._roll_back()

    def _roll_back(self) -> list[tuple[int, str]]:
        failed = [
            (number, canary.verdict)
            for number, canary in self._canaries.items()
            if canary.verdict is not None and number not in self.rolled_back
        ]
        self.rolled_back.update(number for number, _ in failed)
        return failed
