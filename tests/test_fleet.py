"""Deployments, canaries and the memory budget, over real sockets: tiny random models where memory and answers
matter, scripted ones where a version has to fail or to be slow."""

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine import fleet as fleet_module
from flink_llm.engine.client import HostClient
from flink_llm.engine.deployment import deployment_id
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.fleet import Fleet
from flink_llm.engine.generation import Model
from flink_llm.engine.host import Host
from flink_llm.engine.model import MB, read_manifest
from flink_llm.engine.place import socket_path
from flink_llm.engine.protocol import Done, Event, Fault, Loaded, Options, Submit, Tokens
from flink_llm.engine.readers import Classifier, Embedder
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.stock import Stock, needed_bytes, to_leave
from flink_llm.errors import ModelFolderError, Outage
from flink_llm.testing import Script, ScriptedBackend
from tests import tiny

SLOTS = 16
SETTINGS = HostSettings(device="cpu", slots=SLOTS, threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders v1, v2 and v3: one tiny decoder under three manifests, so that they are three models."""
    folder = tmp_path_factory.mktemp("models")
    tiny.decoder(folder / "v1")
    for name in ("v2", "v3"):
        shutil.copytree(folder / "v1", folder / name)
        tiny.changed(folder / name, name=name)
    return folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: those of Unix sockets may have 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="fl-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "WATCH_S", 0.02)
    monkeypatch.setattr(fleet_module, "RETRY_S", 0.1)


class Stage:
    """A host on this loop, a client of it, and a file of a deployment."""

    def __init__(self, backend: Any, client: HostClient, file: Path) -> None:
        self.backend = backend
        self.client = client
        self.file = file
        self._number = itertools.count()

    def write(self, *versions: Any) -> None:
        """Exchanges the file, whole."""
        plain = [
            version if isinstance(version, dict) else {"folder": str(version), "weight": 100} for version in versions
        ]
        scratch = self.file.with_suffix(".new")
        scratch.write_text(yaml.safe_dump({"versions": plain}))
        os.replace(scratch, self.file)

    async def chat(self, path: Path) -> Model:
        model = Model(self.client, "chat", str(path))
        await model.load()
        return model

    async def ask(self, model: str, request: str | None = None, again: str = "", **options: Any) -> list[Event]:
        """What a request hears; `again` makes other work of the same request id."""
        name = request or f"request-{next(self._number)}"
        work = Submit(
            call=0, model=model, kind="generate", work=name + again, request_id=name, prompt=f"say {name}",
            options=Options(**{"max_tokens": 4, **options}),
        )  # fmt: skip
        return [event async for event in self.client.submit(work)]

    async def answers(self, model: str, hash_of: str) -> bool:
        last = (await self.ask(model))[-1]
        assert isinstance(last, Done), last
        return last.model == hash_of


Case = Callable[[Stage], Awaitable[None]]


def run(folder: Path, backend: Any, case: Case, memory_mb: int | None = None) -> None:
    async def main() -> None:
        settings = msgspec.structs.replace(SETTINGS, socket_dir=str(folder))
        host = Host(Fleet(backend, memory_mb), "cpu", linger_s=30)
        path = socket_path(settings)
        serving = asyncio.create_task(host.run(path))
        await until(path.exists)
        client = HostClient(settings)
        try:
            await asyncio.wait_for(case(Stage(backend, client, folder / "chat.yaml")), 60)
        finally:
            await client.close()
            host.stop()
            await serving

    asyncio.run(main())


async def until(condition: Callable[[], bool], patience: float = 20.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


async def until_answered_by(stage: Stage, model: str, hash_of: str) -> None:
    deadline = time.monotonic() + 20
    while not await stage.answers(model, hash_of):
        assert time.monotonic() < deadline, "the version does not answer"


def hash_of(folder: Path) -> str:
    return read_manifest(folder)[1]


@contextlib.asynccontextmanager
async def stream(stage: Stage, model: str) -> AsyncIterator[dict[str, list[Event]]]:
    """Requests that come one after another in eight lanes, as long as the block runs; what each heard."""
    heard: dict[str, list[Event]] = {}
    over = False

    async def lane(number: int) -> None:
        for turn in itertools.count():
            if over:
                return
            name = f"{number}-{turn}"
            heard[name] = []
            heard[name] += await stage.ask(model, name, max_tokens=12)

    lanes = [asyncio.create_task(lane(number)) for number in range(8)]
    try:
        yield heard
    finally:
        over = True
        await asyncio.gather(*lanes)


# Exchanging versions.


def test_a_swap_under_load_drops_nothing_and_lets_go_of_the_old_one(folder: Path, models: Path) -> None:
    async def case(stage: Stage) -> None:
        stage.write(models / "v1")
        model = await stage.chat(stage.file)
        name, first, second = model.loaded.sha256, hash_of(models / "v1"), hash_of(models / "v2")
        assert name == deployment_id(str(stage.file))
        old = weakref.ref(stage.backend._models[first]._decoder)
        async with stream(stage, name) as heard:
            await until(lambda: len(heard) > 20)
            stage.write(models / "v2")
            await until_answered_by(stage, name, second)
            await until(lambda: first not in stage.backend._models)
            already = len(heard)
            await until(lambda: len(heard) > already + 20)
        dones = [events[-1] for events in heard.values()]
        assert all(isinstance(done, Done) for done in dones)
        assert all(sum(isinstance(event, Done) for event in events) == 1 for events in heard.values())
        assert {done.model for done in dones[:8]} == {first}
        assert {done.model for done in dones[-8:]} == {second}
        for events in heard.values():
            said = [event for event in events if isinstance(event, Tokens)]
            assert [event.sequence for event in said] == list(range(len(said)))
            assert said[0].model == events[-1].model
        assert list(stage.backend._models) == [second]
        await until(lambda: old() is None, 2)

    run(folder, OnnxBackend(SETTINGS), case)


def test_swap_after_swap_answers_every_request_once(folder: Path, models: Path) -> None:
    async def case(stage: Stage) -> None:
        stage.write(models / "v1")
        name = (await stage.client.load(str(stage.file))).sha256
        async with stream(stage, name) as heard:
            for version in ("v2", "v3", "v1", "v3", "v2"):
                stage.write(models / version)
                await until_answered_by(stage, name, hash_of(models / version))
        assert all(isinstance(events[-1], Done) and events[-1].completion_tokens for events in heard.values())
        assert {events[-1].model for events in heard.values()} <= {hash_of(models / f"v{n}") for n in (1, 2, 3)}
        await until(lambda: list(stage.backend._models) == [hash_of(models / "v2")])

    run(folder, OnnxBackend(SETTINGS), case)


def test_work_ends_on_the_version_that_it_began_with(folder: Path) -> None:
    scripts = {"v1": Script(text="old " * 40, tokens=40, gap_ms=15), "v2": Script(text="new")}

    async def case(stage: Stage) -> None:
        stage.write("v1")
        name = (await stage.client.load(str(stage.file))).sha256
        long = asyncio.create_task(stage.ask(name, "long"))
        await until(lambda: stage.backend.started == 1)
        stage.write("v2")
        await asyncio.sleep(0.2)
        late = (await stage.ask(name, "late"))[-1]
        assert (late.text, len(stage.backend._by_hash)) == ("new", 2)
        done = (await long)[-1]
        assert done.text == "old " * 40
        await until(lambda: list(stage.backend._by_hash) == [late.model])
        assert stage.backend.cancelled == 0

    run(folder, ScriptedBackend(scripts), case)


def test_the_rooms_that_a_reply_is_kept_in_survive_a_swap(folder: Path) -> None:
    """The same work, asked for again after the swap, is answered from memory and not done again."""

    async def case(stage: Stage) -> None:
        stage.write("v1")
        name = (await stage.client.load(str(stage.file))).sha256
        before = (await stage.ask(name, "once"))[-1]
        stage.write("v2")
        await until_answered_by(stage, name, (await stage.backend.look("v2", None))[0].sha256)
        started = stage.backend.started
        again = (await stage.ask(name, "once"))[-1]
        assert (again.generation, again.model) == (before.generation, before.model)
        assert stage.backend.started == started

    run(folder, ScriptedBackend({"v1": Script(), "v2": Script()}), case)


def test_a_model_that_a_client_loaded_as_a_folder_stays_when_a_deployment_drops_it(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        stage.write("v1")
        name = (await stage.client.load(str(stage.file))).sha256
        plain = (await stage.client.load("/somewhere/v1")).sha256
        stage.write("v2")
        await until(lambda: len(stage.backend._by_hash) == 2)
        await until_answered_by(stage, name, (await stage.backend.look("v2", None))[0].sha256)
        await asyncio.sleep(0.1)
        assert (await stage.ask(plain))[-1].model == plain

    run(folder, ScriptedBackend({"v1": Script(), "v2": Script()}), case)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "versions: [{folder: v2, wieght: 1}]",
            "chat.yaml: versions[0]: unknown name 'wieght'; did you mean 'weight'?",
        ),
        ("versions: [{folder: v1}, {folder: v9}]", "no script for the model 'v9'"),
        ("versions: [{folder: embed}]", "is of kind 'embedding' with labels [], the deployment serves 'decoder'"),
        ("versions: [{folder: v1}, {folder: sub/v1}]", "versions[1].folder is the same model as versions[0]"),
        (None, "chat.yaml: No such file or directory; correct the path"),
    ],
)
def test_a_file_that_cannot_be_taken_is_one_line_in_the_log_and_changes_nothing(
    folder: Path, content: str | None, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    scripts = {"v1": Script(), "v2": Script(), "embed": Script(kind="embedding")}

    async def case(stage: Stage) -> None:
        stage.write("v1")
        name = (await stage.client.load(str(stage.file))).sha256
        first = (await stage.ask(name))[-1].model
        if content is None:
            stage.file.unlink()
        else:
            stage.file.write_text(content)
        await until(lambda: says in caplog.text)
        await asyncio.sleep(0.4)
        assert [record.levelname for record in caplog.records if says in record.message] == ["ERROR"]
        assert caplog.text.count("said before goes on serving") == 1
        assert "\n" not in next(record.message for record in caplog.records if says in record.message)
        assert await stage.answers(name, first)
        assert list(stage.backend._by_hash) == [first]
        stage.write("v2")
        await until_answered_by(stage, name, (await stage.backend.look("v2", None))[0].sha256)

    caplog.set_level(logging.ERROR)
    run(folder, ScriptedBackend(scripts), case)


def test_a_file_that_is_being_written_is_not_taken_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The looks are the test's own: the watch sleeps meanwhile."""
    backend = ScriptedBackend({name: Script() for name in ("v1", "v2", "v3")})
    file = folder / "chat.yaml"

    async def case() -> None:
        fleet = Fleet(backend)
        file.write_text("versions: [{folder: v1}]")
        live = fleet._live[(await fleet.load(str(file), None)).sha256]

        async def look() -> set[str]:
            await fleet._look_again(live)
            await asyncio.sleep(0.01)
            return {held.loaded.name for held in live.models}

        file.write_text("versions: [{folder: v2}]")
        assert await look() == {"v1"}
        file.write_text("versions: [{folder: v2}, {folder: v3}]")
        assert await look() == {"v1"}
        assert await look() == {"v2", "v3"}
        file.write_text("versions: [{folder: v1}]")
        assert await look() == {"v2", "v3"}
        file.write_text("versions: [{folder: v2}, {folder: v3}]")
        assert [await look(), await look()] == [{"v2", "v3"}] * 2
        await fleet.close()

    monkeypatch.setattr(fleet_module, "WATCH_S", 60.0)
    asyncio.run(case())


def test_a_version_that_cannot_be_loaded_takes_no_other_with_it_into_memory(
    folder: Path, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = folder / "broken"
    shutil.copytree(models / "v3", broken)
    (broken / "model.onnx").write_bytes(b"no graph")
    tiny.changed(broken)

    async def case(stage: Stage) -> None:
        stage.write(models / "v1")
        name = (await stage.client.load(str(stage.file))).sha256
        stage.write(models / "v2", broken)
        await until(lambda: "the graph cannot be loaded" in caplog.text)
        await until(lambda: list(stage.backend._models) == [hash_of(models / "v1")])
        assert await stage.answers(name, hash_of(models / "v1"))
        stage.write({"folder": str(models / "v1"), "weight": 1}, {"folder": str(broken), "weight": 0})
        await asyncio.sleep(0.3)
        assert await stage.answers(name, hash_of(models / "v1"))

    caplog.set_level(logging.ERROR)
    run(folder, OnnxBackend(SETTINGS), case)


def test_a_file_whose_folder_comes_later_is_taken_then(folder: Path, models: Path) -> None:
    async def case(stage: Stage) -> None:
        stage.write(models / "v1")
        name = (await stage.client.load(str(stage.file))).sha256
        stage.write({"folder": "late"})
        await asyncio.sleep(0.2)
        assert await stage.answers(name, hash_of(models / "v1"))
        shutil.copytree(models / "v2", folder / "arriving")
        (folder / "arriving").rename(folder / "late")
        await until_answered_by(stage, name, hash_of(models / "v2"))

    run(folder, OnnxBackend(SETTINGS), case)


def test_a_first_file_that_cannot_be_taken_is_the_clients_error(folder: Path, models: Path) -> None:
    async def case(stage: Stage) -> None:
        with pytest.raises(ModelFolderError, match=r"chat.yaml: No such file or directory; correct the path$"):
            await stage.client.load(str(stage.file))
        stage.write(models / "v1", models / "v9")
        with pytest.raises(
            ModelFolderError, match=r"/v9 is not a model folder: No such file or directory; correct the path, "
        ):
            await stage.client.load(str(stage.file))
        assert stage.backend._models == {}
        stage.write(models / "v1")
        with pytest.raises(ModelFolderError, match="is a deployment, no model abc"):
            await stage.client.load(str(stage.file), "abc")
        await stage.client.load(str(stage.file))

    run(folder, OnnxBackend(SETTINGS), case)


def test_a_classifier_and_an_embedder_are_deployed_too(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        for kind, served in (("classifier", Classifier), ("embedding", Embedder)):
            made = tiny.encoder(folder / kind, kind)
            stage.write(made)
            other = stage.file.rename(folder / f"{kind}.yaml")
            model: Any = served(stage.client, kind, str(other))
            await model.load()
            assert (await model("hello")).model_hash == hash_of(made)

    run(folder, OnnxBackend(SETTINGS), case)


# Shares.


def test_versions_share_the_requests_by_their_weights_and_an_id_stays_with_its_version(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        stage.write({"folder": "v1", "weight": 75}, {"folder": "v2", "weight": 25})
        name = (await stage.client.load(str(stage.file))).sha256
        texts = {each: (await stage.ask(name, each))[-1].text for each in (f"id-{n}" for n in range(800))}
        shares = Counter(texts.values())
        assert shares["two"] / 800 == pytest.approx(0.25, abs=0.05)
        again = {each: (await stage.ask(name, each, "again"))[-1].text for each in texts}
        assert again == texts
        stage.write({"folder": "v1", "weight": 50}, {"folder": "v2", "weight": 50})
        await asyncio.sleep(0.2)
        later = {each: (await stage.ask(name, each, "later"))[-1].text for each in texts}
        assert Counter(later.values())["two"] / 800 == pytest.approx(0.5, abs=0.06)
        assert all(later[each] == "two" for each, text in texts.items() if text == "two")

    run(folder, ScriptedBackend({"v1": Script(text="one"), "v2": Script(text="two")}), case)


def test_a_reply_that_is_left_early_names_its_version(folder: Path) -> None:
    async def case(stage: Stage) -> None:
        stage.write("v1")
        model = await stage.chat(stage.file)
        reply = model.generate("hello")
        async for _ in reply:
            break
        reply.expire()
        assert reply.response.model_hash == (await stage.backend.look("v1", None))[0].sha256
        assert reply.response.finish_reason == "deadline"

    run(folder, ScriptedBackend({"v1": Script(text="one two", tokens=2, gap_ms=500)}), case)


# Canaries.


def with_canary(**bounds: Any) -> list[Any]:
    return [{"folder": "v1", "weight": 50}, {"folder": "v2", "weight": 50, "canary": {"window": 20, **bounds}}]


def good() -> Script:
    return Script(text="one two", tokens=2, first_ms=4, gap_ms=4)


@pytest.mark.parametrize(
    ("canary", "says"),
    [
        (Script(fault="model_error"), "more than 5% of 20"),
        (Script(text="one two", tokens=2, first_ms=60, gap_ms=4), "ms to the first token, "),
        (Script(text="one two", tokens=2, first_ms=4, gap_ms=60), "ms for each further token, "),
    ],
)
def test_a_bad_canary_is_rolled_back_and_let_go(
    folder: Path, canary: Script, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def case(stage: Stage) -> None:
        stage.write(*with_canary())
        name = (await stage.client.load(str(stage.file))).sha256
        bad = (await stage.backend.look("v2", None))[0].sha256
        while "is rolled back" not in caplog.text:
            await asyncio.gather(*(stage.ask(name) for _ in range(8)))
        await until(lambda: bad not in stage.backend._by_hash)
        lasts = [(await stage.ask(name))[-1] for _ in range(20)]
        assert all(isinstance(last, Done) and last.model != bad for last in lasts)
        assert says in caplog.text
        assert caplog.text.count("is rolled back") == 1
        stage.file.write_text(stage.file.read_text() + "# once more\n")
        await until(lambda: bad in stage.backend._by_hash)

    caplog.set_level(logging.ERROR)
    run(folder, ScriptedBackend({"v1": good(), "v2": canary}), case)


@pytest.mark.parametrize("canary", [good(), Script(fault="bad_option"), Script(fault="overloaded")])
def test_a_canary_stays_when_it_is_as_good_or_when_the_records_are_at_fault(
    folder: Path, canary: Script, caplog: pytest.LogCaptureFixture
) -> None:
    async def case(stage: Stage) -> None:
        stage.write(*with_canary(max_latency_ratio=8.0))
        name = (await stage.client.load(str(stage.file))).sha256
        for _ in range(10):
            await asyncio.gather(*(stage.ask(name) for _ in range(16)))
        assert "is rolled back" not in caplog.text
        assert len(stage.backend._by_hash) == 2

    caplog.set_level(logging.ERROR)
    run(folder, ScriptedBackend({"v1": good(), "v2": canary}), case)


def test_a_canary_that_never_answers_is_rolled_back_by_those_who_give_up(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def case(stage: Stage) -> None:
        stage.write(*with_canary())
        name = (await stage.client.load(str(stage.file))).sha256

        async def impatient() -> None:
            events = stage.client.submit(
                Submit(call=0, model=name, kind="generate", work=os.urandom(8).hex(), request_id=os.urandom(8).hex())
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(anext(events), 0.1)
            events.close()

        for _ in range(40):
            await asyncio.gather(*(impatient() for _ in range(8)))
            if "is rolled back" in caplog.text:
                break
        assert "ms to the first token, " in caplog.text
        assert isinstance((await stage.ask(name))[-1], Done)

    caplog.set_level(logging.ERROR)
    run(folder, ScriptedBackend({"v1": good(), "v2": Script(fault="hang")}), case)


# The budget.


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(-20, 200))
def test_as_few_as_possible_leave_and_none_in_vain(idle: list[int], missing: int) -> None:
    count = to_leave(idle, missing)
    if count is None:
        assert sum(idle) < missing
    else:
        assert sum(idle[:count]) >= missing
        assert count == 0 or sum(idle[: count - 1]) < missing


def test_a_decoder_needs_its_files_and_its_cache(models: Path) -> None:
    manifest, _ = read_manifest(models / "v1")
    files = sum(path.stat().st_size for path in (models / "v1").iterdir() if path.name != "manifest.json")
    cache = OnnxBackend(SETTINGS)._open(str(models / "v1"), hash_of(models / "v1"))._decoder._cache
    held = sum(array.nbytes for array in cache._arrays)
    assert needed_bytes(manifest, SLOTS, mixed_mb=0) == files + held
    assert needed_bytes(manifest, SLOTS) == files + held + manifest.files["model.onnx.data"].bytes


def test_idle_models_make_room_and_come_back_by_themselves(folder: Path, models: Path) -> None:
    """Two of three fit: the longest unused leaves, and is there again for the next request."""

    async def case(stage: Stage) -> None:
        names = {each: (await stage.client.load(str(models / each))).sha256 for each in ("v1", "v2")}
        await stage.ask(names["v1"])
        names["v3"] = (await stage.client.load(str(models / "v3"))).sha256
        assert set(stage.backend._models) == {names["v1"], names["v3"]}
        for each in ("v2", "v1", "v3", "v2", "v2", "v1"):
            assert await stage.answers(names[each], names[each])
            assert len(stage.backend._models) == 2
        together = await asyncio.gather(*(stage.ask(names["v1"]) for _ in range(6)))
        assert all(isinstance(events[-1], Done) for events in together)

    run(folder, OnnxBackend(SETTINGS), case, memory_mb=2 * need_mb(models) + 1)


def need_mb(models: Path) -> int:
    return -(-needed_bytes(read_manifest(models / "v1")[0], SLOTS) // 1024**2)


def test_a_model_that_can_never_fit_says_what_it_needs(folder: Path, models: Path) -> None:
    need = need_mb(models)

    async def case(stage: Stage) -> None:
        with pytest.raises(ModelFolderError, match=rf"/v1 needs {need} MB, host.memory_mb is {need - 1}$"):
            await stage.client.load(str(models / "v1"))

    run(folder, OnnxBackend(SETTINGS), case, memory_mb=need - 1)


def test_versions_that_do_not_fit_together_are_refused(folder: Path, models: Path) -> None:
    async def case(stage: Stage) -> None:
        stage.write(models / "v1", models / "v2")
        with pytest.raises(ModelFolderError, match=r"chat.yaml needs \d+ MB, host.memory_mb is \d+$"):
            await stage.client.load(str(stage.file))
        assert stage.backend._models == {}

    run(folder, OnnxBackend(SETTINGS), case, memory_mb=need_mb(models) + 1)


def test_what_is_at_work_or_deployed_is_not_let_go(folder: Path, models: Path) -> None:
    async def case(stage: Stage) -> None:
        first = (await stage.client.load(str(models / "v1"))).sha256
        events = stage.client.submit(
            Submit(
                call=0, model=first, kind="generate", work="w", request_id="r", prompt="x",
                options=Options(max_tokens=500, temperature=1.0),
            )
        )  # fmt: skip
        await anext(events)
        with pytest.raises(Outage, match=r"/v2 needs \d+ MB; of host.memory_mb \d+ the models that are at work"):
            await stage.client.load(str(models / "v2"))
        events.close()
        stage.write(models / "v2")
        await until_loaded(stage, stage.file)
        with pytest.raises(Outage, match="at work or deployed"):
            await stage.client.load(str(models / "v1"))
        last = (await stage.ask(first))[-1]
        assert (last.kind, "host.memory_mb" in last.message) == ("outage", True)

    run(folder, OnnxBackend(SETTINGS), case, memory_mb=need_mb(models) + 1)


async def until_loaded(stage: Stage, path: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(Outage):
            await stage.client.load(str(path))
            return
        await asyncio.sleep(0.02)
    pytest.fail("there was never room")


class Shelf:
    """Models of one byte that are folders' names; `gone` are folders that hold none, `held` stop where they are."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.gone: set[str] = set()
        self.bad: set[str] = set()
        self.gates: dict[str, asyncio.Event] = {}

    async def look(self, folder: str, sha256: str | None) -> tuple[Loaded, int]:
        return self._loaded(folder), MB

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        if folder in self.gone:
            raise ModelFolderError(f"{folder} is gone")
        await self._pass(f"load {folder}")
        return self._loaded(folder)

    async def unload(self, sha256: str) -> None:
        await self._pass(f"unload {sha256}")

    def start(self, work: Submit, generation: str, emit: Callable[[Event], None]) -> Callable[[], None]:
        fault = Fault(call=0, kind="outage", code="outage", message="it fails")
        event = fault if work.model in self.bad else Done(call=0, generation=generation, text="t")
        asyncio.get_running_loop().call_soon(emit, event)
        return lambda: None

    async def close(self) -> None:
        pass

    async def _pass(self, what: str) -> None:
        self.log.append(what)
        if what in self.gates:
            await self.gates[what].wait()

    @staticmethod
    def _loaded(folder: str) -> Loaded:
        name = Path(folder).name
        return Loaded(call=0, name=name, sha256=name, kind="decoder", context_length=9)


def test_a_model_that_gets_work_while_another_makes_room_stays() -> None:
    async def main() -> None:
        shelf = Shelf()
        stock = Stock(shelf, 2)
        a, b, c = [await stock.look(name) for name in ("a", "b", "c")]
        c.need = 2 * MB
        for held in (a, b):
            await stock.ready(held)
        gate = shelf.gates["unload a"] = asyncio.Event()
        loading = asyncio.ensure_future(stock.ready(c))
        await until(lambda: "unload a" in shelf.log)
        b.running += 1
        gate.set()
        with pytest.raises(Outage, match="at work or deployed hold 1"):
            await loading
        assert b.ready and "unload b" not in shelf.log
        b.running -= 1
        await stock.ready(c)
        assert (a.ready, b.ready, c.ready) == (False, False, True)

    asyncio.run(main())


def test_a_model_is_loaded_from_any_place_that_has_it() -> None:
    async def main() -> None:
        shelf = Shelf()
        stock = Stock(shelf)
        held = await stock.look("/one/m")
        await stock.ready(held)
        shelf.gone = {"/one/m"}
        assert await stock.look("/two/m") is held
        await stock.ready(held)  # it is in memory
        assert shelf.log == ["load /one/m"]
        await stock.sweep()
        assert shelf.log[-1] == "unload m"
        await stock.ready(held)
        assert shelf.log[-1] == "load /two/m"
        await stock.sweep()
        shelf.gone = {"/two/m"}
        await stock.ready(held)
        assert shelf.log[-1] == "load /one/m"
        await stock.sweep()
        shelf.gone = {"/one/m", "/two/m"}
        with pytest.raises(ModelFolderError):
            await stock.ready(held)

    asyncio.run(main())


def test_a_canary_that_the_next_file_keeps_is_not_let_go_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rolled back by the file before, while the next one's other version is still being loaded."""
    monkeypatch.setattr("flink_llm.engine.fleet.WATCH_S", 0.02)
    file = folder / "chat.yaml"

    def write(*versions: dict[str, Any]) -> None:
        scratch = file.with_suffix(".new")
        scratch.write_text(yaml.safe_dump({"versions": versions}))
        os.replace(scratch, file)

    async def main() -> None:
        shelf, numbers = Shelf(), itertools.count()
        fleet = Fleet(shelf)
        write({"folder": "v1", "weight": 50}, {"folder": "v2", "weight": 50, "canary": {"window": 20}})
        loaded = await fleet.load(str(file), None)

        async def ask() -> None:
            done = asyncio.get_running_loop().create_future()
            name = f"r{next(numbers)}"
            work = Submit(call=0, model=loaded.sha256, kind="generate", work=name, request_id=name)
            fleet.start(work, "g", done.set_result)
            await done

        gate = shelf.gates[f"load {folder / 'v3'}"] = asyncio.Event()
        write({"folder": "v2", "weight": 50}, {"folder": "v3", "weight": 50, "canary": {}})
        await until(lambda: f"load {folder / 'v3'}" in shelf.log)
        shelf.bad = {"v2"}
        for _ in range(60):
            await ask()
        assert fleet._live[loaded.sha256].routes.rolled_back == {1}
        shelf.bad = set()
        gate.set()
        await until(lambda: "unload v1" in shelf.log)
        for _ in range(20):
            await ask()
            await asyncio.sleep(0)
        assert "unload v2" not in shelf.log
        await fleet.close()

    asyncio.run(main())
