"""Flink's side of a job's configuration. No Flink here, so that a configuration is read without it."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from flink_llm.secrets import masked


class FlinkSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`expected_rate` is completions a second and subtask, where it is known: it sizes the bundles.

    `properties` are Flink options, set as they are. `checkpoint_dir` is a folder or a URL that Flink can
    write to (`s3://bucket/path`); without it a cluster keeps checkpoints where its own configuration says,
    by default in the job manager: they survive a failure of the job, not of the cluster, and an operator's
    may have 5 MB, which a few large records in flight exceed.
    """

    parallelism: Annotated[int, Meta(ge=1)] = 1
    max_parallelism: Annotated[int, Meta(ge=1, le=32768)] = 128
    shards: Annotated[int, Meta(ge=1)] = 16
    expected_rate: Annotated[float, Meta(gt=0)] | None = None
    delivery: Literal["at_least_once", "exactly_once"] = "at_least_once"
    checkpoint_interval_ms: Annotated[int, Meta(ge=10)] = 1000
    checkpoint_dir: str | None = None
    properties: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"FlinkSettings({masked(msgspec.to_builtins(self))})"
