"""A deployment file: which versions of a model are served, with which share of the requests each.

```yaml
versions:
  - folder: support-chat-v1     # relative to the file
    weight: 90
  - folder: support-chat-v2
    weight: 10
    canary: {max_failure_rate: 0.05, max_latency_ratio: 2.0, window: 100}
```
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from flink_llm import config_file
from flink_llm.errors import ConfigError
from flink_llm.fitting import fitted

SUFFIXES = (".yaml", ".yml")


class CanaryBounds(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a canary may do and stay.

    Of its last `window` requests at most the share `max_failure_rate` may fail by the host's fault, and its
    median times, to the first token and for each further one, may be at most `max_latency_ratio` times those
    of the versions that are no canaries.
    """

    max_failure_rate: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    max_latency_ratio: Annotated[float, Meta(gt=1)] = 2.0
    window: Annotated[int, Meta(ge=10, le=1000)] = 100


class Version(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model folder and its part of the requests, `weight` out of the sum. One of weight 0 is ready and gets none."""

    folder: Annotated[str, Meta(min_length=1)]
    weight: Annotated[int, Meta(ge=0, le=1_000_000)] = 100
    canary: CanaryBounds | None = None


class Deployment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file says. After `read_deployment` the folders are absolute."""

    versions: Annotated[list[Version], Meta(min_length=1, max_length=64)]


class Traits(NamedTuple):
    """What of a model a deployment looks at: its manifest's hash, and what its clients rely on."""

    sha256: str
    kind: str
    labels: list[str]


def is_deployment(path: str) -> bool:
    """Whether a path names a deployment file rather than a model folder: its name decides."""
    return path.endswith(SUFFIXES)


def deployment_id(path: str) -> str:
    """The id that clients know a deployment's model by, in place of a manifest's hash; 64 hex digits.

    Made of the absolute path alone, so that work is found again whatever version the file names by then.
    Frozen, as `work_id` is made of it.
    """
    return hashlib.sha256(f"deployment:{os.path.abspath(path)}".encode()).hexdigest()


def read_deployment(path: str | Path) -> Deployment:
    """The checked content of a file; the folders are not looked at. Raises ConfigError, one line naming the file."""
    path = Path(path)
    raw = config_file.mapping(path, "a deployment is a mapping with `versions`")
    try:
        deployment = fitted(raw, Deployment, "deployment")
        placed = [
            msgspec.structs.replace(version, folder=os.path.abspath(path.absolute().parent / version.folder))
            for version in deployment.versions
        ]
        _check(placed)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return Deployment(versions=placed)


def _check(versions: Sequence[Version]) -> None:
    seen: dict[str, int] = {}
    for number, version in enumerate(versions):
        first = seen.setdefault(version.folder, number)
        if first != number:
            raise ConfigError(f"versions[{number}].folder: {version.folder} is versions[{first}] already")
    if not any(version.weight for version in versions if version.canary is None):
        raise ConfigError("versions: one that is no canary must have a weight: it takes over when a canary fails")


def check_alike(path: str | Path, models: Sequence[Traits], like: Traits | None = None) -> None:
    """Raises ConfigError unless the versions of a file can stand for each other, and for `like`, and are different."""
    like = like or models[0]
    for number, model in enumerate(models):
        if (model.kind, model.labels) != (like.kind, like.labels):
            raise ConfigError(
                f"{path}: versions[{number}].folder is of kind {model.kind!r} with labels {model.labels}, "
                f"the deployment serves {like.kind!r} with labels {like.labels}"
            )
        same = next(first for first, other in enumerate(models) if other.sha256 == model.sha256)
        if same != number:
            raise ConfigError(f"{path}: versions[{number}].folder is the same model as versions[{same}]")


def place_of(request_id: str, salt: str) -> float:
    """Where a request stands between 0 and 1, for good; evenly spread over request ids, anew for each `salt`."""
    digest = hashlib.sha256(f"{salt}/{request_id}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56  # 56 bits: a float holds them all, and never says 1


def chosen(place: float, weights: Sequence[int]) -> int:
    """Which version, by its number, a request at `place` goes to: the weights lie side by side on 0 to 1.

    When the weight of one of two versions grows, none of its requests changes over. Raises ValueError when no
    version has a weight.
    """
    total = sum(weights)
    if total <= 0:
        raise ValueError("no version has a weight")
    left = place * total
    for number, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return number
    return max(number for number, weight in enumerate(weights) if weight)  # rounding, at the very end
