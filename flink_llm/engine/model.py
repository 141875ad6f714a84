"""The model folder: what it must hold, and the check that stands before ONNX Runtime.

    model.onnx [model.onnx.data]   the graph
    tokenizer.json                 Hugging Face tokenizers
    chat_template.jinja            decoders only
    manifest.json                  what it is, and size and SHA-256 of every other file

Nothing of a folder is used before all of it was read and compared, and what was compared is what is
used: the bytes themselves for everything but a graph's external data, which ONNX Runtime reads from a
private copy made of the bytes that were compared.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from flink_llm.errors import ModelFolderError

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
DATA = "model.onnx.data"


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 in hex."""

    sha256: str
    bytes: int


class Manifest(Struct, frozen=True, kw_only=True):
    """What a model is. `parity` holds what its export measured against the original."""

    format: int
    name: str
    kind: Literal["decoder", "embedding", "classifier"]
    architecture: str
    precision: str
    context_length: int
    vocab_size: int
    files: dict[str, FileEntry]
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    eos_token_ids: list[int] = []
    special_tokens: dict[str, str] = {}
    labels: list[str] = []
    pooling: Literal["mean", "cls", "last"] = "mean"
    normalize: bool = True
    source: str = ""
    license: str = ""
    parity: dict[str, Any] = {}


class ModelFolder(Struct, frozen=True):
    """A folder that was checked. `sha256` is that of its manifest, and so of all of it."""

    manifest: Manifest
    sha256: str
    files: dict[str, bytes]

    def graph_file(self, stack: Any) -> str | bytes:
        """What an inference session is made of: the graph's bytes, or a path in a private copy.

        `stack` is a contextlib.ExitStack that keeps the copy until the session is made.
        """
        if DATA not in self.files:
            return self.files[GRAPH]
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flink-llm-model-")))
        for name in (GRAPH, DATA):
            (copy / name).write_bytes(self.files[name])
        return str(copy / GRAPH)


def open_model_folder(folder: str | Path, expected: str | None = None) -> ModelFolder:
    """Reads and checks a model folder; `expected` is the SHA-256 its manifest must have.

    Raises ModelFolderError, one line naming the file: missing, not named by the manifest, a link, of
    another size or content, or a manifest that is none.
    """
    folder = Path(folder)
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise ModelFolderError(f"{folder} is not a model folder: {error.strerror or error}") from error
    if MANIFEST not in names:
        raise ModelFolderError(f"{folder} has no {MANIFEST}: it is not a model folder")
    raw = _read(folder / MANIFEST)
    manifest = _parse(raw, folder)
    digest = hashlib.sha256(raw).hexdigest()
    if expected is not None and digest != expected:
        raise ModelFolderError(f"{folder} is another model than expected: {digest[:12]} instead of {expected[:12]}")
    for name in names:
        if name != MANIFEST and name not in manifest.files:
            raise ModelFolderError(f"{folder / name} is not named by the manifest")
    files = {name: _checked(folder, name, entry) for name, entry in manifest.files.items()}
    for needed in (GRAPH, "tokenizer.json"):
        if needed not in files:
            raise ModelFolderError(f"{folder} has no {needed}")
    return ModelFolder(manifest, digest, files)


def write_manifest(folder: Path, **fields: Any) -> Manifest:
    """Writes the manifest of a finished folder, every file in it named. Returns it."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            data = path.read_bytes()
            files[path.name] = FileEntry(hashlib.sha256(data).hexdigest(), len(data))
    manifest = Manifest(format=1, files=files, **fields)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    return manifest


def _parse(raw: bytes, folder: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise ModelFolderError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if manifest.format != 1:
        raise ModelFolderError(f"{folder / MANIFEST} is of format {manifest.format}, this release reads 1")
    return manifest


def _checked(folder: Path, name: str, entry: FileEntry) -> bytes:
    if name in ("", ".", "..", MANIFEST) or "/" in name or "\\" in name or "\0" in name:
        raise ModelFolderError(f"the manifest of {folder} names {name!r}, which is not a plain file name")
    data = _read(folder / name)
    if len(data) != entry.bytes:
        raise ModelFolderError(f"{folder / name} has {len(data)} bytes, the manifest says {entry.bytes}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ModelFolderError(f"{folder / name} is not what the manifest says: its SHA-256 differs")
    return data


def _read(path: Path) -> bytes:
    """The bytes of a regular file with one link, opened without following links."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ModelFolderError(f"{path} is missing") from error
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be opened as a plain file: {error.strerror}") from error
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ModelFolderError(f"{path} is not a regular file")
        if found.st_nlink != 1:
            raise ModelFolderError(f"{path} has {found.st_nlink} hard links: a model's files have one")
        return file.read()
