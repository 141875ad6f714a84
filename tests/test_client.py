"""The client against real hosts: processes of their own, with scripted models, killed and stopped."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from filelock import FileLock

from flink_llm import __version__, services
from flink_llm.engine import client as client_module
from flink_llm.engine import connection, launch
from flink_llm.engine import peer as peer_module
from flink_llm.engine.client import HostClient, open_engine
from flink_llm.engine.deployment import deployment_id
from flink_llm.engine.host import Host
from flink_llm.engine.launch import start_host
from flink_llm.engine.place import held_file, socket_path
from flink_llm.engine.protocol import PROTOCOL_VERSION, Done, Event, Loaded, Submit, Tokens
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.engine.work import WorkTable
from flink_llm.errors import ConfigError, ModelFolderError, Outage, ProtocolError, RecordError
from flink_llm.services import RealServices, ServiceSettings
from flink_llm.testing import Script, ScriptedBackend

SCRIPTS: dict[str, dict[str, Any]] = {
    "echo": {"tokens": 3},
    "slow": {"text": "word " * 40, "tokens": 40, "gap_ms": 50},
    "endless": {"fault": "hang"},
}
SILENCE_S = 0.9


def hosts(folder: Path) -> list[psutil.Process]:
    """The living host processes whose socket is in `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and f"{folder}/" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path with the script of the models; no host may be left in it."""
    made = Path(tempfile.mkdtemp(prefix="fl-"))
    (made / "script.json").write_bytes(msgspec.json.encode(SCRIPTS))
    yield made
    deadline = time.monotonic() + 10
    while left := hosts(made):
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
            pytest.fail(f"{len(left)} hosts were left behind")
        time.sleep(0.05)
    shutil.rmtree(made)


def settings_in(folder: Path, **changed: Any) -> HostSettings:
    plain = HostSettings(
        device="cpu",
        linger_s=0.5,
        silence_s=SILENCE_S,
        start_timeout_s=30,
        socket_dir=str(folder),
        launcher="flink_llm.testing",
        launcher_args=[str(folder / "script.json")],
    )
    return msgspec.structs.replace(plain, **changed)


Case = Callable[[HostClient], Awaitable[None]]


def run(settings: HostSettings, case: Case) -> None:
    async def main() -> None:
        client = HostClient(settings)
        try:
            await asyncio.wait_for(case(client), 60)
        finally:
            await client.close()

    asyncio.run(main())


def work(model: str, name: str = "w", prompt: str = "abcdef") -> Submit:
    return Submit(call=0, model=model, kind="generate", work=name, request_id=name, prompt=prompt)


async def answer(client: HostClient, what: Submit) -> list[Event]:
    return [event async for event in client.submit(what)]


async def until(condition: Callable[[], bool], patience: float = 20.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


def test_first_client_starts_the_host_and_it_goes_after_the_last(folder: Path) -> None:
    settings = settings_in(folder)

    async def case(client: HostClient) -> None:
        loaded = await client.load("echo")
        events = await answer(client, work(loaded.sha256))
        assert [e.text for e in events if isinstance(e, Tokens)] == ["ab", "cd", "ef"]
        assert isinstance(events[-1], Done)
        assert events[-1].text == "abcdef"
        (host,) = hosts(folder)
        assert os.getsid(host.pid) == host.pid != os.getsid(0)
        assert client.outage_since is None

    run(settings, case)
    deadline = time.monotonic() + 10
    while hosts(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not socket_path(settings).exists()
    assert "client" in socket_path(settings).with_suffix(".log").read_text()


def test_clients_that_come_at_once_share_one_host(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        others = [HostClient(settings_in(folder)) for _ in range(4)]
        loaded = await asyncio.gather(*(c.load("echo") for c in [client, *others]))
        assert len({one.sha256 for one in loaded}) == 1
        assert len(hosts(folder)) == 1
        first = await answer(client, work(loaded[0].sha256))
        assert (await answer(others[0], work(loaded[0].sha256)))[-1].generation == first[-1].generation
        for other in others:
            await other.close()
        assert (await answer(client, work(loaded[0].sha256, "v")))[-1].text == "abcdef"

    run(settings_in(folder), case)


def test_host_that_dies_at_its_start_says_why(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        expect = (
            r"^the model host ended at its start: flink-llm host: host\.launcher_args: "
            r"name the JSON file of scripts \(log: .*\.log\)$"
        )
        for _ in range(2):
            with pytest.raises(ConfigError, match=expect):
                await client.load("echo")
        with pytest.raises(ConfigError, match=expect):
            await answer(client, work("any"))
        assert client.outage_since is None

    run(settings_in(folder, launcher_args=[]), case)


def test_refused_model_is_the_callers_error(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        with pytest.raises(ModelFolderError, match="no script for the model 'nowhere'"):
            await client.load("nowhere")
        assert (await client.load("echo")).name == "echo"

    run(settings_in(folder), case)


def test_killed_host_is_an_outage_and_the_next_one_answers(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        loaded = await client.load("slow")
        echo = await client.load("echo")
        running = [client.submit(work(loaded.sha256, f"w{n}")) for n in range(20)]
        for events in running:
            await anext(aiter(events))
        (first,) = hosts(folder)
        began = time.monotonic()
        first.kill()
        for events in running:
            with pytest.raises(Outage, match="the model host is gone"):
                async for _ in events:
                    pass
        assert client.outage_since is not None
        assert began <= client.outage_since <= time.monotonic()
        assert (await answer(client, work(echo.sha256)))[-1].text == "abcdef"
        assert client.outage_since is None
        (second,) = hosts(folder)
        assert second.pid != first.pid

    run(settings_in(folder), case)


def test_a_deployment_is_found_again_by_the_next_host(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        file = folder / "chat.yaml"
        file.write_text("versions: [{folder: echo}]")
        loaded = await client.load(str(file))
        assert (loaded.name, loaded.sha256) == ("chat", deployment_id(str(file)))
        before = (await answer(client, work(loaded.sha256)))[-1]
        [process] = hosts(folder)
        process.kill()
        await until(lambda: client.outage_since is not None)
        after = (await answer(client, work(loaded.sha256)))[-1]
        assert after.model == before.model != ""
        assert after.generation != before.generation
        assert client.outage_since is None

    run(settings_in(folder), case)


def test_iterator_left_while_the_host_is_gone_is_never_submitted(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        loaded = await client.load("slow")
        hosts(folder)[0].kill()
        await until(lambda: client.outage_since is not None)
        left = client.submit(work(loaded.sha256, "left"))
        left.close()
        assert [event async for event in left] == []
        await client.load("echo")
        assert (await answer(client, work(loaded.sha256, "other")))[0].sequence == 0

    run(settings_in(folder), case)


def test_host_that_cannot_start_again_is_an_outage_not_an_error(folder: Path) -> None:
    script = folder / "script.json"

    async def case(client: HostClient) -> None:
        loaded = await client.load("echo")
        script.rename(folder / "away")
        hosts(folder)[0].kill()
        await until(lambda: client.outage_since is not None)
        waiting = asyncio.create_task(answer(client, work(loaded.sha256)))
        await asyncio.sleep(2)
        assert not waiting.done()
        (folder / "away").rename(script)
        assert (await waiting)[-1].text == "abcdef"

    run(settings_in(folder), case)


def test_stopped_host_is_an_outage_after_its_silence(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        endless = await client.load("endless")
        echo = await client.load("echo")
        events = client.submit(work(endless.sha256))
        await asyncio.sleep(0.2)
        (host,) = hosts(folder)
        host.suspend()
        began = time.monotonic()
        try:
            with pytest.raises(Outage):
                await anext(aiter(events))
            assert SILENCE_S <= time.monotonic() - began + 0.35 < 3 * SILENCE_S + 0.35
            assert client.outage_since is not None
        finally:
            host.resume()
        assert (await answer(client, work(echo.sha256, "other")))[-1].text == "abcdef"
        assert [process.pid for process in hosts(folder)] == [host.pid]

    run(settings_in(folder), case)


def test_worker_that_was_held_up_itself_sees_no_outage(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        loaded = await client.load("slow")
        events = client.submit(work(loaded.sha256))
        await anext(aiter(events))
        for _ in range(2):
            time.sleep(1.5 * SILENCE_S)  # noqa: ASYNC251 (what the test is about)
            await asyncio.sleep(0.05)
        assert [e.text async for e in events][-1] == "word " * 40
        assert client.outage_since is None

    run(settings_in(folder), case)


WORKER = """
import asyncio, sys, msgspec
from flink_llm.engine.client import HostClient, open_engine
from flink_llm.engine.protocol import Submit
from flink_llm.engine.settings import HostSettings
async def main():
    client = HostClient(msgspec.json.decode(sys.argv[1], type=HostSettings))
    model = (await client.load("slow")).sha256
    work = Submit(call=0, model=model, kind="generate", work="w", request_id="r", prompt="p")
    async for event in client.submit(work):
        print(event.generation, flush=True)
asyncio.run(main())
"""


def test_killed_worker_finds_its_generation_again(folder: Path) -> None:
    settings = settings_in(folder, linger_s=5)
    words = [sys.executable, "-c", WORKER, msgspec.json.encode(settings).decode()]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        generation = worker.stdout.readline().strip()
        worker.send_signal(signal.SIGKILL)
        worker.wait()

    async def case(client: HostClient) -> None:
        loaded = await client.load("slow")
        events = await answer(client, work(loaded.sha256))
        assert {event.generation for event in events} == {generation}
        assert [e.sequence for e in events if isinstance(e, Tokens)] == list(range(40))
        hosts(folder)[0].terminate()

    run(settings, case)


def test_leaving_a_call_cancels_its_work(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        model = (await client.load("slow")).sha256
        events = client.submit(work(model))
        first = await anext(aiter(events))
        events.close()
        await client.load("echo")
        assert (await answer(client, work(model)))[0].generation != first.generation

    run(settings_in(folder), case)


def test_closing_leaves_the_work_for_the_next_to_find(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        other = HostClient(settings_in(folder))
        model = (await other.load("slow")).sha256
        events = other.submit(work(model))
        first = await anext(aiter(events))
        await other.close()
        with pytest.raises(Outage, match="the engine is closed"):
            async for _ in events:
                pass
        events.close()
        await client.load("slow")
        await asyncio.sleep(0.1)
        found = await answer(client, work(model))
        assert {event.generation for event in found} == {first.generation}
        assert [event.sequence for event in found if isinstance(event, Tokens)] == list(range(40))

    run(settings_in(folder), case)


class Picky(ScriptedBackend):
    """Scripts whose folders may be refused later."""

    def __init__(self) -> None:
        super().__init__({"echo": Script(tokens=3), "other": Script(tokens=3)})
        self.refused: set[str] = set()

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        if Path(folder).name in self.refused:
            raise ModelFolderError(f"{folder} is another model than expected: 0123 instead of {(sha256 or '')[:12]}")
        return await super().load(folder, sha256)


def test_a_folder_that_is_refused_after_a_crash_takes_its_own_work_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "RELOAD_S", 0.1)
    settings = settings_in(folder)
    backend = Picky()

    async def start() -> tuple[Host, "asyncio.Task[None]"]:
        host = Host(backend, "cpu", linger_s=30)
        task = asyncio.create_task(host.run(socket_path(settings)))
        await until(socket_path(settings).exists)
        return host, task

    async def case(client: HostClient) -> None:
        host, task = await start()
        echo, other = (await client.load("echo")).sha256, (await client.load("other")).sha256
        host.stop()
        await task
        await until(lambda: client.outage_since is not None)
        backend.refused.add("other")
        waiting = client.submit(work(other, "waiting"))
        host, task = await start()
        assert (await answer(client, work(echo)))[-1].text == "abcdef"
        for events in (waiting, client.submit(work(other))):
            with pytest.raises(Outage, match="is another model than expected"):
                await anext(aiter(events))
        assert (await answer(client, work(echo, "again")))[-1].text == "abcdef"
        assert client.outage_since is not None
        assert len(host.peers) == 1
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert any(f"other, model {other}, is missing" in text and "0123 instead of" in text for text in told)
        backend.refused.clear()
        await until(lambda: client.outage_since is None)
        assert (await answer(client, work(other)))[-1].text == "abcdef"
        host.stop()
        await task

    run(settings, case)


def test_a_host_that_will_not_let_go_is_an_outage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_in(folder, launcher_args=[str(folder / "absent.json")])
    path = socket_path(settings)
    with FileLock(held_file(path)), pytest.raises(Outage, match=r"another host of .* is alive and does not listen"):
        monkeypatch.setattr(launch, "_command", lambda *_: [sys.executable, "-c", "import sys; sys.exit(1)"])
        start_host(settings, path)
    with pytest.raises(ConfigError, match="the model host ended at its start"):
        start_host(settings, path)


def test_a_gpu_that_this_onnx_runtime_cannot_use_ends_the_host_at_its_start(folder: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    refused = r"host\.device is 'cuda:0', this ONNX Runtime has no CUDA: install flink-llm\[gpu\] instead of \[cpu\]"
    settings = HostSettings(device="cuda", socket_dir=str(folder), metrics_port=0)
    with pytest.raises(ConfigError, match=rf"^the model host ended at its start: flink-llm host: {refused} \(log: "):
        start_host(settings, socket_path(settings))
    with pytest.raises(ConfigError, match=rf"^{refused}$"):
        open_engine(HostSettings(device="cuda", engine="embedded"))


def test_a_memory_budget_makes_another_host_and_reaches_it(folder: Path) -> None:
    plain, bounded = settings_in(folder), settings_in(folder, memory_mb=700)
    path = socket_path(bounded)
    assert path != socket_path(plain)
    words = launch._command(bounded, "cpu", path)
    assert words[words.index("--memory-mb") + 1] == "700"
    assert "--memory-mb" not in launch._command(plain, "cpu", path)


def test_a_hosts_log_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LOG_BYTES", 1000)
    monkeypatch.setattr(launch, "_command", lambda *_: [sys.executable, "-c", "print('x' * 600); exit(1)"])
    settings = settings_in(folder)
    path = socket_path(settings)
    for _ in range(5):
        with pytest.raises(ConfigError, match="ended at its start: xxx"):
            start_host(settings, path)
    logs = sorted(path.parent.glob("*.log*"))
    assert [log.name for log in logs] == [f"{path.stem}.log", f"{path.stem}.log.1"]
    assert all(log.stat().st_size < 2000 for log in logs)


def test_a_path_that_cannot_be_sent_is_refused(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        with pytest.raises(ModelFolderError, match="is no path that can be sent"):
            await client.load("/models/\udcff")

    run(settings_in(folder), case)


def test_a_start_that_waits_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(services, "START_RETRY_S", 0.001)

    class Late(ScriptedBackend):
        attempts = 0

        async def load(self, folder: str, sha256: str | None) -> Loaded:
            self.attempts += 1
            if self.attempts <= services.TOLD_EVERY + 3:
                raise Outage("no memory")
            return await super().load(folder, sha256)

    async def main() -> None:
        made = RealServices(ServiceSettings(models={"chat": "echo"}))
        monkeypatch.setattr(services, "open_engine", lambda _: WorkTable(Late({"echo": Script()})))
        made.model("chat")
        await made.start()
        await made.close()

    asyncio.run(main())
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["models.chat cannot be loaded yet: no memory"] * 2


def test_reader_of_a_closed_client_gets_an_outage(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        events = client.submit(work((await client.load("endless")).sha256))
        await client.close()
        for stream in (events, client.submit(work("any"))):
            with pytest.raises(Outage, match="the engine is closed"):
                await anext(aiter(stream))
        with pytest.raises(Outage, match="the engine is closed"):
            await client.load("echo")

    run(settings_in(folder), case)


def test_ten_thousand_calls_and_cancels_at_once(folder: Path) -> None:
    async def case(client: HostClient) -> None:
        endless, echo = await client.load("endless"), await client.load("echo")
        calls = [client.submit(work(endless.sha256, f"e{n}")) for n in range(10_000)]
        assert (await answer(client, work(echo.sha256)))[-1].text == "abcdef"
        began = time.monotonic()
        for events in calls:
            events.close()
        answers = await asyncio.gather(*(answer(client, work(echo.sha256, f"a{n}")) for n in range(1000)))
        assert [a[-1].text for a in answers] == ["abcdef"] * 1000
        assert time.monotonic() - began < 20
        assert client.outage_since is None

    run(settings_in(folder, silence_s=20), case)


def test_work_too_large_for_a_frame_fails_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(client: HostClient) -> None:
        loaded = await client.load("echo")
        monkeypatch.setattr("flink_llm.engine.protocol.MAX_FRAME_BYTES", 1000)
        with pytest.raises(RecordError, match="above the limit of 1000"):
            await answer(client, work(loaded.sha256, "big", "x" * 2000))
        assert (await answer(client, work(loaded.sha256)))[-1].text == "abcdef"

    run(settings_in(folder), case)


def test_host_of_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_in(folder)
    monkeypatch.setattr(peer_module, "__version__", "9.9.9")

    async def case(client: HostClient) -> None:
        host = Host(ScriptedBackend({"echo": Script()}), "cpu", linger_s=30)
        served = asyncio.create_task(host.run(socket_path(settings)))
        await until(socket_path(settings).exists)
        expect = f"speaks protocol {PROTOCOL_VERSION} of {__version__}, this host .* of 9.9.9"
        with pytest.raises(ProtocolError, match=expect):
            await client.load("echo")
        host.stop()
        await served

    run(settings, case)


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\n\r\n", b""], ids=["garbage", "nothing"])
def test_something_else_on_the_socket_is_an_outage(folder: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(connection, "GREETING_S", 0.2)
    settings = settings_in(folder)

    async def impostor(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)

    async def case(client: HostClient) -> None:
        server = await asyncio.start_unix_server(impostor, str(socket_path(settings)))
        loading = asyncio.create_task(client.load("echo"))
        await until(lambda: client.outage_since is not None)
        assert not loading.done()
        loading.cancel()
        server.close()

    run(settings, case)


def test_embedded_engine_needs_no_host() -> None:
    assert isinstance(open_engine(HostSettings(engine="embedded", device="cpu")), WorkTable)
    assert isinstance(open_engine(HostSettings(device="cpu")), HostClient)


def test_workers_do_not_import_onnxruntime() -> None:
    code = "import sys, flink_llm.services; print('onnxruntime' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@pytest.mark.parametrize(
    ("device", "visible", "expect"),
    [
        ("auto", None, "cpu"),
        ("auto", "", "cpu"),
        ("auto", "-1", "cpu"),
        ("auto", "3,4", "cuda:0"),
        ("cuda", None, "cuda:0"),
        ("cuda:2", None, "cuda:2"),
        ("cpu", "0", "cpu"),
    ],
)
def test_device(device: str, visible: str | None, expect: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert resolve_device(device, environ) == expect


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", ""])
def test_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r"host\.device is .* use auto, cpu, cuda or cuda:N"):
        resolve_device(device, {})
