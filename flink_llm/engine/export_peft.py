"""LoRA adapters as PEFT saves them: read, checked, and merged into the original they are compared with.

A folder has `adapter_config.json` and `adapter_model.safetensors`, whose tensors are
`base_model.model.MODULE.lora_A.weight` [rank, inputs] and `.lora_B.weight` [outputs, rank]: the module's
weight W stands for W + scale * B A. What changes the model in another way is refused by name.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.model import ADAPTER_NAME
from flink_llm.errors import ExportError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Matrix = NDArray[np.float32]
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin a training (`init_lora_weights`) that leave the model's own weights as they are."""
_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config",
)  # fmt: skip
"""What a configuration may have and a product cannot: more than two matrices beside one of the model's."""


@dataclass(frozen=True)
class PeftAdapter:
    """`changes`: A [rank, inputs] and B [outputs, rank], its scale in it, by the module's name in the original."""

    name: str
    changes: Mapping[str, tuple[Matrix, Matrix]]


def read_peft(name: str, folder: Path) -> PeftAdapter:
    """Reads an adapter. Raises ExportError for what is no LoRA adapter, or one that changes more than products."""
    if re.match(ADAPTER_NAME, name) is None:
        raise ExportError(f"{name!r} is no adapter's name: at most 64 letters, digits, '_' and '-'")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = _load(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ExportError(f"adapter {name}: {folder} is no adapter of PEFT: {error}") from error
    _check(name, config)
    found: dict[str, dict[str, Matrix]] = {}
    for tensor, values in tensors.items():
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            raise ExportError(f"adapter {name} has {tensor}, which is neither A nor B of a LoRA")
        found.setdefault(match[1], {})[match[2]] = values
    if not found:
        raise ExportError(f"adapter {name} changes nothing")
    return PeftAdapter(name, {module: _change(name, module, pair, config) for module, pair in sorted(found.items())})


@contextlib.contextmanager
def merged(original: Any, adapter: PeftAdapter) -> Iterator[None]:
    """A model of torch with the adapter in its weights, as long as this lasts."""
    import torch

    before = {}
    try:
        with torch.no_grad():
            for module, (a, b) in adapter.changes.items():
                weight = original.get_submodule(module).weight
                before[module] = weight.clone()
                weight += (torch.from_numpy(b) @ torch.from_numpy(a)).to(weight.dtype)
        yield
    finally:
        with torch.no_grad():
            for module, weight in before.items():
                original.get_submodule(module).weight.copy_(weight)


def _load(path: Path) -> dict[str, Matrix]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise ValueError(f"{path.name} is missing")
    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _check(name: str, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ExportError(f"adapter {name} is of type {kind!r}: only LORA can be served")
    for key in _REFUSED:
        if config.get(key):
            raise ExportError(f"adapter {name} has {key}, which cannot be served")
    if config.get("bias", "none") != "none":
        raise ExportError(f"adapter {name} has bias {config['bias']!r}, which cannot be served")
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise ExportError(
            f"adapter {name} was begun by {start!r}, which changes the model's own weights: convert it with PEFT first"
        )


def _change(name: str, module: str, pair: dict[str, Matrix], config: dict[str, Any]) -> tuple[Matrix, Matrix]:
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
        raise ExportError(f"adapter {name} has no matching A and B at {module}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ExportError(f"adapter {name} is not finite at {module}")
    rank = len(a)
    says = _of(module, config.get("rank_pattern"), config.get("r"))
    if says != rank:
        raise ExportError(f"adapter {name} has rank {rank} at {module}, its configuration says {says}")
    try:
        alpha = float(_of(module, config.get("alpha_pattern"), config.get("lora_alpha")))
    except (TypeError, ValueError) as error:
        raise ExportError(f"adapter {name}: lora_alpha of {module} is no number") from error
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return a, np.asarray(b * np.float32(scale))


def _of(module: str, patterns: Any, default: Any) -> Any:
    """What a pattern says of a module: PEFT's are the end of its name, or a regular expression of that."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
