"""What is exported: a local Hugging Face folder, or a hub id that is downloaded first."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flink_llm.errors import ExportError

NEEDS = "export needs more packages: pip install 'flink-llm[cpu,export]'"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEXTS = ["*.json", "*.jinja", "*.txt", "*.model", "README.md", "1_Pooling/*"]
_WEIGHTS = ("*.safetensors", "*.bin")
"""The second only where a repository has none of the first."""


class PrecisionError(ExportError):
    """One precision cannot be made, or cannot be run; others may."""


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder with its configuration; `name` is what it was asked for by."""

    folder: Path
    name: str
    config: dict[str, Any]

    @property
    def architecture(self) -> str:
        """The class in transformers that reads it, such as LlamaForCausalLM."""
        return str((self.config.get("architectures") or ["unknown"])[0])

    def number(self, name: str) -> int:
        """A size in its configuration. Raises ExportError for one that is missing, or is none."""
        found = self.config.get(name)
        if not isinstance(found, int) or found < 1:
            has = "no" if found is None else f"{found!r} as"
            raise ExportError(f"{self.name} has {has} {name} in its config.json, without which it cannot be exported")
        return found

    def need_tokenizer(self) -> None:
        """Raises ExportError for a folder without a tokenizer.json."""
        if not (self.folder / "tokenizer.json").exists():
            raise ExportError(
                f"{self.name} has no tokenizer.json: load its tokenizer with transformers' AutoTokenizer, "
                "save_pretrained() it into the folder, and export again"
            )

    def optional(self, name: str) -> dict[str, Any]:
        """What a JSON file of the folder says, nothing where there is none."""
        try:
            read: dict[str, Any] = json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return {}
        return read


def open_source(source: str | Path) -> Source:
    """The folder `source`, or a snapshot of the hub id `source` in the hub's own cache.

    Raises ExportError: no such folder, no configuration, or the hub cannot be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{source} is not a Hugging Face folder: config.json: {error}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{source} is not a Hugging Face folder: config.json holds no object")
    return Source(folder, folder.name if folder == Path(source) else str(source), config)


@contextlib.contextmanager
def read_by_transformers(name: str) -> Iterator[None]:
    """Whatever it raises of the source `name` is an ExportError here: its OSErrors are of no disk."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{name} cannot be read by transformers: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, without the advice and traces below it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _download(name: str) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise ExportError(f"{name} is neither a folder nor the id of a model on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ExportError(NEEDS) from error
    try:
        for weights in _WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=[*_TEXTS, weights]))
            if any(folder.glob(weights)):
                break
    except Exception as error:  # the hub's errors, httpx's, and the disk's
        raise ExportError(
            f"{name} is no folder here, and could not be had from the hub: {first_line(error)}"
        ) from error
    return folder
