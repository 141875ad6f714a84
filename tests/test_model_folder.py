"""Model folders: what is refused before any of it reaches ONNX Runtime, and what a warm-up shows."""

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flink_llm.engine import decoder as decoder_module
from flink_llm.engine import engine as engine_module
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.model import MANIFEST_BYTES, open_model_folder
from flink_llm.engine.protocol import Loaded
from flink_llm.engine.settings import HostSettings
from flink_llm.errors import ConfigError, ModelFolderError, Outage
from tests import tiny

SETTINGS = HostSettings(device="cpu", slots=2, threads=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.encoder(tmp_path / "embedding", "embedding")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def decoder(exported: Path, tmp_path: Path) -> Path:
    """A decoder's folder that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "decoder"))


def load(folder: str | Path, times: int = 1) -> Loaded:
    async def inside() -> Loaded:
        backend = OnnxBackend(SETTINGS)
        try:
            for _ in range(times):
                loaded = await backend.load(str(folder), None)
            return loaded
        finally:
            await backend.close()

    return asyncio.run(inside())


def tamper(folder: Path) -> None:
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])


def link(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def manifest(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "manifest.json"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def nested(folder: Path) -> None:
    manifest(folder, b'"parity": {}', b'"parity": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000)


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        (tamper, "SHA-256 differs"),
        (truncate, "bytes, the manifest says"),
        (link, "cannot be opened as a plain file"),
        (lambda f: os.link(f / "model.onnx", f.parent / "second"), "2 hard links"),
        (lambda f: (f / "extra.py").write_text("x"), "extra.py is not named by the manifest"),
        (lambda f: (f / "sub").mkdir(), "sub is not named by the manifest"),
        (lambda f: open(os.fsencode(f) + b"/\xff", "wb").close(), "is not named by the manifest"),
        (lambda f: (f / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda f: (f / "manifest.json").unlink(), "it is not a model folder"),
        (lambda f: (f / "manifest.json").write_text("{}"), "cannot be read"),
        (lambda f: manifest(f, b'"Tiny"', b'"T\xffny"'), "cannot be read: 'utf-8' codec"),
        (lambda f: manifest(f, b'"context_length": 64', b'"context_length": -1'), "Expected `int` >= 1"),
        (lambda f: manifest(f, b'"context_length": 64', b'"context_length": 1' + b"0" * 15), "Expected `int` <="),
        (lambda f: manifest(f, b'"vocab_size": 320', b'"vocab_size": 0'), "Expected `int` >= 1"),
        (nested, "recursion"),
        (lambda f: os.truncate(f / "manifest.json", MANIFEST_BYTES + 1), f"a manifest has at most {MANIFEST_BYTES}"),
    ],
)
def test_a_folder_that_is_not_what_its_manifest_says_is_refused(
    folder: Path, attack: Callable[[Path], Any], text: str
) -> None:
    open_model_folder(folder)
    attack(folder)
    with pytest.raises(ModelFolderError, match=text):
        load(folder)


def test_a_path_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ModelFolderError, match="is not a model folder: embedded null byte"):
        load("/tmp/a\0b")


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json"])
def test_a_file_that_is_too_large_is_refused_unread(folder: Path, name: str) -> None:
    os.truncate(folder / name, 3 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFolderError, match=f"{name} has 3221225472 bytes, "):
        open_model_folder(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000


def test_a_model_that_is_loaded_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    read = engine_module.open_model_folder
    monkeypatch.setattr(engine_module, "open_model_folder", lambda *args: opened.append(args) or read(*args))
    assert load(folder, times=3).name == "embedding"
    assert len(opened) == 1


def test_a_chat_template_that_is_no_text_is_refused(decoder: Path) -> None:
    (decoder / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ModelFolderError, match=r"chat_template\.jinja does not parse"):
        load(tiny.changed(decoder))


def test_a_tokenizer_with_an_id_beyond_the_vocabulary_is_refused(decoder: Path) -> None:
    path = decoder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["zq"] = 5000
    tokenizer["model"]["merges"].append(["z", "q"])
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelFolderError, match="has a token 5000, the model knows 320"):
        load(tiny.changed(decoder))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"head_dim": 8}, "cannot be served: .*( got 8 expected 16|do not fit together)"),
        ({"num_kv_heads": 4}, r"the graph's past_key_values.0.key is .*, the manifest says \['any', 4, 512, 16\]"),
        ({"vocab_size": 400}, "the graph's logits is .*, the manifest says"),
        ({"context_length": 4096}, "cannot be served: .*(cos_cache|rotation of an attention)"),
        ({"num_layers": 1}, "the graph has a surplus input 'past_key_values.1.key'"),
        ({"num_layers": 0}, "the graph has a surplus input"),
    ],
)
def test_a_graph_that_is_another_than_the_manifest_says_is_refused(
    decoder: Path, fields: dict[str, Any], text: str
) -> None:
    with pytest.raises(ModelFolderError, match=text):
        load(tiny.changed(decoder, **fields))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"labels": ["good", "bad"]}, r"the graph's logits is \['batch', 3\], the manifest says \['any', 2\]"),
        ({"vocab_size": 1000}, "cannot be served: .*indices element out of data bounds"),
    ],
)
def test_an_encoder_that_is_another_than_the_manifest_says_is_refused(
    tmp_path: Path, fields: dict[str, Any], text: str
) -> None:
    folder = tiny.encoder(tmp_path / "classifier", "classifier")
    with pytest.raises(ModelFolderError, match=text):
        load(tiny.changed(folder, **fields))


def test_a_cache_that_no_memory_holds_is_a_wrong_setting(decoder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the cache of 100000 generations of 16777216 tokens needs .*: lower host\.slots"
    ):
        decoder_module.Decoder(
            open_model_folder(tiny.changed(decoder, context_length=2**24)),
            device="cpu",
            threads=1,
            slots=100_000,
        )


def test_a_lack_of_memory_is_an_outage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(engine_module, "open_model_folder", lacks)
    with pytest.raises(Outage, match="does not fit into the memory: MemoryError: no room"):
        load(folder)


LOAD = """
import sys
from flink_llm.engine.encoder import Encoder
from flink_llm.engine.model import open_model_folder
print(Encoder(open_model_folder(sys.argv[1]), device="cpu", threads=1).run([[5]]))
"""


@pytest.mark.parametrize("location", ["secret.bin", "../secret.bin", "{}/secret.bin"])
def test_external_data_outside_of_the_folder_is_never_read(folder: Path, tmp_path: Path, location: str) -> None:
    import numpy as np
    import onnx

    (tmp_path / "secret.bin").write_bytes(np.zeros(320 * 16, dtype="f4").tobytes())
    model = onnx.load(str(folder / "model.onnx"))
    table = next(weights for weights in model.graph.initializer if weights.name == "table")
    table.ClearField("raw_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location.format(tmp_path), "length": str(320 * 16 * 4)}.items():
        table.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    tiny.changed(folder)
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "ModelFolderError: embedding: the graph cannot be loaded" in found.stderr
