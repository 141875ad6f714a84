"""How to reach the model host of a device. No ONNX Runtime here: workers stay light."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from flink_llm.engine.model import MIXED_MB
from flink_llm.errors import ConfigError


class HostSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`engine` "host" shares one process per device, "embedded" runs in the worker itself.

    `device` is "cpu", "cuda", "cuda:N", or "auto": the task manager's first `CUDA_VISIBLE_DEVICES`, else
    the CPU. `threads` 0 leaves the number to ONNX Runtime. `slots` generations run at once, `queue`
    more may wait ahead of one. What encoders have said is kept in about `cache_mb` megabytes, 0 keeps nothing.
    `memory_mb` is what all models of the host may take together, their KV caches among it; None sets no bound.
    A decoder's weights of at most `mixed_mb` MB are held twice on a CPU, so that prompts are read in the runs of
    others' tokens; 0 holds none twice. With `speculation`, what a text said before is guessed to come next, where
    that is faster; it changes no reply. All times are in seconds: the host stays `linger_s` after its last client;
    work whose client was lost goes on for `linger_work_s`; a host must listen within `start_timeout_s`, and is
    taken for dead after `silence_s` without a word. `launcher` is the module that is run as the host, with
    `launcher_args`. A host's metrics are at `metrics_host`:`metrics_port`, 0 being any free port, None nowhere; of
    jobs that share a host, the one that starts it says where. `logs` is how the host writes its log.
    """

    engine: Literal["host", "embedded"] = "host"
    device: str = "auto"
    threads: Annotated[int, Meta(ge=0)] = 0
    slots: Annotated[int, Meta(ge=1, le=1024)] = 16
    queue: Annotated[int, Meta(ge=1)] = 4096
    speculation: bool = True
    cache_mb: Annotated[float, Meta(ge=0)] = 64.0
    memory_mb: Annotated[int, Meta(ge=1)] | None = None
    mixed_mb: Annotated[int, Meta(ge=0)] = MIXED_MB
    linger_s: Annotated[float, Meta(ge=0)] = 30.0
    linger_work_s: Annotated[float, Meta(ge=0)] = 30.0
    start_timeout_s: Annotated[float, Meta(gt=0)] = 60.0
    silence_s: Annotated[float, Meta(gt=0)] = 3.0
    socket_dir: str | None = None
    metrics_port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    metrics_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    logs: Literal["text", "json"] = "text"
    launcher: str = "flink_llm.engine.host"
    launcher_args: list[str] = []


def resolve_device(device: str, environ: Mapping[str, str] = os.environ) -> str:
    """Makes "auto" to "cuda:0" where the environment shows a GPU, else to "cpu". Raises ConfigError."""
    if device == "auto":
        visible = environ.get("CUDA_VISIBLE_DEVICES", "")
        return "cuda:0" if visible not in ("", "-1") else "cpu"
    if re.fullmatch(r"cpu|cuda(:[0-9]+)?", device) is None:
        raise ConfigError(f"host.device is {device!r}: use auto, cpu, cuda or cuda:N")
    return "cuda:0" if device == "cuda" else device
