"""The model folder: what it must hold, and the check that stands before ONNX Runtime.

    model.onnx [model.onnx.data]   the graph
    mixed.onnx                     decoders only, perhaps: its form for mixed runs, see `export_mixed`
    tokenizer.json                 Hugging Face tokenizers
    chat_template.jinja            decoders only
    adapter.NAME.safetensors       decoders only, one for each of the manifest's `adapters`
    manifest.json                  what it is, and size and SHA-256 of every other file

Nothing of a folder is used before all of it was read and compared, and what was compared is what is
used: the bytes themselves, and for the graph a private copy made of them. ONNX Runtime is given that
copy's path: of a graph without one it would look for external data in the working directory.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from flink_llm.errors import ModelFolderError

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
DATA = "model.onnx.data"
MIXED = "mixed.onnx"
MIXED_MB = 512
"""MB of weights up to which they are held twice, where nothing else is said."""
MB = 1024 * 1024
MANIFEST_BYTES = 1_000_000
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z"

Size = Annotated[int, Meta(ge=1, le=2**24)]
"""Of a context or a vocabulary. Whether the machine has the memory for it is seen at the load."""
Count = Annotated[int, Meta(ge=0, le=2**16)]
AdapterName = Annotated[str, Meta(pattern=ADAPTER_NAME)]


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 in hex."""

    sha256: str
    bytes: Annotated[int, Meta(ge=0)]


class Manifest(Struct, frozen=True, kw_only=True):
    """What a model is. `parity` holds what its export measured against the original.

    `adapters` are the names that a request may choose one of, see `engine/adapters.py`. A classifier's `scores` are
    shares of one, or each label's by itself.
    """

    format: int
    name: str
    kind: Literal["decoder", "embedding", "classifier", "token_classifier", "reranker"]
    architecture: str
    precision: str
    context_length: Size
    vocab_size: Size
    files: dict[str, FileEntry]
    num_layers: Count = 0
    num_kv_heads: Count = 0
    head_dim: Count = 0
    eos_token_ids: list[Annotated[int, Meta(ge=0)]] = []
    special_tokens: dict[str, str] = {}
    labels: list[str] = []
    scores: Literal["softmax", "sigmoid"] = "softmax"
    pooling: Literal["mean", "cls", "last"] = "mean"
    normalize: bool = True
    source: str = ""
    license: str = ""
    parity: dict[str, Any] = {}
    adapters: list[AdapterName] = []


class ModelFolder(Struct, frozen=True):
    """A folder that was checked. `sha256` is that of its manifest, and so of all of it."""

    manifest: Manifest
    sha256: str
    files: dict[str, bytes]

    def graph_file(self, stack: Any, form: str = GRAPH) -> str:
        """The path of the graph, in this form, in a private copy.

        `stack` is a contextlib.ExitStack that keeps the copy until the session is made.
        """
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flink-llm-model-")))
        for name in (form, DATA):
            if name in self.files:
                (copy / name).write_bytes(self.files[name])
        return str(copy / form)


def held_twice(manifest: Manifest, most_mb: int) -> int:
    """Bytes of weights that are held a second time for mixed runs on a CPU: those of at most `most_mb` MB."""
    weights = manifest.files.get(DATA)
    if MIXED not in manifest.files or weights is None or manifest.adapters or weights.bytes > most_mb * MB:
        return 0
    return weights.bytes


def adapter_file(adapter: str) -> str:
    """The file in a folder that holds an adapter."""
    return f"adapter.{adapter}.safetensors"


def read_manifest(folder: str | Path, expected: str | None = None) -> tuple[Manifest, str]:
    """A folder's manifest and its SHA-256, which must be `expected` if that is given; nothing else is read.

    Raises ModelFolderError.
    """
    folder = Path(folder)
    _names(folder)
    raw = _read(folder / MANIFEST, MANIFEST_BYTES, f"a manifest has at most {MANIFEST_BYTES}")
    digest = hashlib.sha256(raw).hexdigest()
    if expected is not None and digest != expected:
        raise ModelFolderError(f"{folder} is another model than expected: {digest[:12]} instead of {expected[:12]}")
    return _parse(raw, folder), digest


def open_model_folder(folder: str | Path, expected: str | None = None) -> ModelFolder:
    """Reads and checks a model folder; `expected` is the SHA-256 its manifest must have.

    Raises ModelFolderError, one line naming the file: missing, not named by the manifest, a link, of
    another size or content, or a manifest that is none.
    """
    folder = Path(folder)
    manifest, digest = read_manifest(folder, expected)
    for name in _names(folder):
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


def _names(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except (OSError, ValueError) as error:  # ValueError for a NUL in the path
        why = getattr(error, "strerror", error)
        raise ModelFolderError(
            f"{folder} is not a model folder: {why}; correct the path, or make one by "
            f"`flink-llm export SOURCE --to FOLDER`"
        ) from error
    if MANIFEST not in names:
        raise ModelFolderError(
            f"{folder} has no {MANIFEST}: it is not a model folder; one of Hugging Face's becomes one by "
            f"`flink-llm export {folder} --to FOLDER`"
        )
    return names


def _parse(raw: bytes, folder: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFolderError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if manifest.format != 1:
        raise ModelFolderError(f"{folder / MANIFEST} is of format {manifest.format}, this release reads 1")
    return manifest


def _checked(folder: Path, name: str, entry: FileEntry) -> bytes:
    if name in ("", ".", "..", MANIFEST) or "/" in name or "\\" in name or "\0" in name:
        raise ModelFolderError(f"the manifest of {folder} names {name!r}, which is not a plain file name")
    says = f"the manifest says {entry.bytes}"
    data = _read(folder / name, entry.bytes, says)
    if len(data) != entry.bytes:
        raise ModelFolderError(f"{folder / name} has {len(data)} bytes, {says}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ModelFolderError(f"{folder / name} is not what the manifest says: its SHA-256 differs")
    return data


def _read(path: Path, most: int, says: str) -> bytes:
    """The bytes of a regular file with one link, opened without following links; one of more than `most`
    bytes is refused unread, as `says` says."""
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
        if found.st_size > most:
            raise ModelFolderError(f"{path} has {found.st_size} bytes, {says}")
        return file.read(most)
