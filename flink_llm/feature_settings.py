"""How a job reaches its features. No Feast here: importing it takes seconds."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from flink_llm.secrets import masked as masked  # for those who name what a store said


class FeatureSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the feature repository is and how its online store is read.

    `repo`: folder of `feature_store.yaml` and the definitions; it is only read. `state`: folder for
    the files that Feast writes (a registry file, a sqlite store), None for where the YAML puts them.
    `online_store`: replaces the YAML's, for example `{"type": "sqlite"}` or
    `{"type": "redis", "connection_string": "redis.example:6379,password=..."}`. Feast's sqlite store
    keeps times in the writer's time zone: its writers and readers need the same `TZ`.

    `freshness`: view → greatest age of a row in seconds, before the view's own ttl. `batch_window_ms`:
    how long the first of a batch waits for company. `batch_limit`: most keys of one read.
    `timeout_s`: after which a read counts as an outage.
    """

    repo: str = "feature_repo"
    state: str | None = None
    online_store: dict[str, Any] | None = None
    freshness: dict[str, Annotated[float, Meta(gt=0)]] = {}
    batch_window_ms: Annotated[float, Meta(ge=0, le=1_000)] = 2.0
    batch_limit: Annotated[int, Meta(ge=1, le=10_000)] = 256
    timeout_s: Annotated[float, Meta(gt=0, le=600)] = 2.0

    def __repr__(self) -> str:
        return f"FeatureSettings({masked(msgspec.to_builtins(self))})"
