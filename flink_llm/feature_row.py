"""One row of features, as a handler reads it."""

from collections.abc import Iterator, Mapping
from typing import Any


class FeatureRow(Mapping[str, Any]):
    """Feature name → value, None where there is none. Read-only.

    `found` is False for a key the store does not know and for a row older than it may be, which is
    `stale`; `age_s` are the seconds since the row's event, None where there is no row.
    """

    __slots__ = ("_values", "age_s", "found", "stale")

    def __init__(self, values: Mapping[str, Any], *, age_s: float | None, found: bool, stale: bool = False) -> None:
        self._values = dict(values)
        self.age_s = age_s
        self.found = found
        self.stale = stale

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"FeatureRow({self._values!r}, age_s={self.age_s}, found={self.found})"
