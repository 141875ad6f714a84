"""The host over real sockets, with scripted models. It runs on the test's own loop."""

import asyncio
import contextlib
import gc
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from filelock import FileLock

from flink_llm import __version__
from flink_llm.engine import host as host_module
from flink_llm.engine import peer as peer_module
from flink_llm.engine import work as work_module
from flink_llm.engine.host import Host, serve
from flink_llm.engine.place import socket_folder, socket_path
from flink_llm.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Done,
    Fault,
    FrameReader,
    Hello,
    Load,
    Loaded,
    Ping,
    Pong,
    Submit,
    Tokens,
    Welcome,
    frame,
)
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import WorkTable
from flink_llm.errors import ConfigError, ModelFolderError, Outage
from flink_llm.testing import Script, ScriptedBackend
from tests import tiny

HELLO = Hello(protocol=PROTOCOL_VERSION, package=__version__, client="test")
SCRIPTS = {
    "echo": Script(tokens=3),
    "slow": Script(text="one two three four", tokens=4, gap_ms=60),
    "endless": Script(fault="hang"),
    "poison": Script(fault="model_error"),
    "full": Script(fault="overloaded"),
    "long": Script(text="x" * 300_000),
    "embed": Script(kind="embedding"),
    "classify": Script(kind="classifier", labels=["a", "b"]),
}


class Wire:
    """A client that speaks frames, right or wrong."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._frames = FrameReader("client")
        self._messages: list[Any] = []

    def send(self, *messages: Any) -> None:
        self.writer.write(b"".join(frame(message) for message in messages))

    async def receive(self, patience: float = 5.0) -> Any:
        """The next message, None when the host has closed the connection."""
        while not self._messages:
            data = await asyncio.wait_for(self._reader.read(65536), patience)
            if not data:
                return None
            self._messages += self._frames.feed(data)
        return self._messages.pop(0)

    async def greet(self) -> Welcome:
        self.send(HELLO)
        welcome = await self.receive()
        assert isinstance(welcome, Welcome)
        return welcome

    async def load(self, name: str) -> str:
        self.send(Load(call=1, folder=name))
        loaded = await self.receive()
        assert isinstance(loaded, Loaded)
        return loaded.sha256

    async def answer(self) -> tuple[list[Any], Any]:
        """The tokens and the last event of the one call in flight."""
        tokens = []
        while isinstance(event := await self.receive(), Tokens):
            tokens.append(event)
        return tokens, event

    async def alive(self) -> bool:
        self.send(Ping(call=99))
        return await self.receive() == Pong(call=99)


class Served:
    """A running host and what its clients need."""

    def __init__(self, host: Host, backend: ScriptedBackend, path: Path, task: "asyncio.Task[None]") -> None:
        self.host = host
        self.backend = backend
        self.path = path
        self.task = task
        self.wires: list[Wire] = []

    async def connect(self, *, greet: bool = True) -> Wire:
        wire = Wire(*await asyncio.open_unix_connection(str(self.path)))
        self.wires.append(wire)
        if greet:
            await wire.greet()
        return wire


@contextlib.asynccontextmanager
async def serving(
    folder: Path, *, linger_s: float = 30, linger_work_s: float = 30, scripts: Mapping[str, Script] = SCRIPTS
) -> AsyncIterator[Served]:
    backend = ScriptedBackend(scripts)
    host = Host(backend, "cpu", linger_s=linger_s, linger_work_s=linger_work_s)
    path = folder / "host.sock"
    task = asyncio.create_task(host.run(path))
    await until(path.exists)
    try:
        served = Served(host, backend, path, task)
        yield served
    finally:
        host.stop()
        await task
        for wire in served.wires:
            wire.writer.close()
            with contextlib.suppress(ConnectionError):
                await wire.writer.wait_closed()


async def until(condition: Callable[[], bool], patience: float = 5.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


def work(model: str, *, call: int = 7, name: str = "w", kind: Any = "generate", prompt: str = "abc") -> Submit:
    return Submit(call=call, model=model, kind=kind, work=name, request_id="r", prompt=prompt, text=prompt)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: those of Unix sockets may have 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="fl-"))
    yield made
    shutil.rmtree(made)


Case = Callable[[Served], Awaitable[None]]


def run(folder: Path, case: Case, **options: Any) -> None:
    async def main() -> None:
        async with serving(folder, **options) as served:
            await asyncio.wait_for(case(served), 30)

    asyncio.run(main())


def test_handshake(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect(greet=False)
        assert await wire.greet() == Welcome(
            protocol=PROTOCOL_VERSION, package=__version__, pid=os.getpid(), device="cpu"
        )

    run(folder, case)


@pytest.mark.parametrize(("protocol", "package"), [(99, __version__), (PROTOCOL_VERSION, "9.9.9")])
def test_another_version_is_refused_with_both_named(folder: Path, protocol: int, package: str) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect(greet=False)
        wire.send(Hello(protocol=protocol, package=package, client="old"))
        fault = await wire.receive()
        expect = (
            f"the client speaks protocol {protocol} of {package}, "
            f"this host protocol {PROTOCOL_VERSION} of {__version__}"
        )
        assert fault == Fault(call=0, kind="protocol", code="version", message=expect)
        assert await wire.receive() is None

    run(folder, case)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x03abc",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        frame(Ping(call=1)),
        frame(HELLO).replace(b"test", b"te\xff\xfe"),
    ],
    ids=["http", "not msgpack", "too long", "empty", "before hello", "no text"],
)
def test_garbage_drops_that_peer_only(folder: Path, data: bytes) -> None:
    async def case(served: Served) -> None:
        good, bad = await served.connect(), await served.connect(greet=False)
        bad.writer.write(data)
        assert await bad.receive() is None
        assert await good.alive()
        await until(lambda: len(served.host.peers) == 1)

    run(folder, case)


def test_garbage_after_the_handshake_leaves_its_work_to_linger(folder: Path) -> None:
    async def case(served: Served) -> None:
        good, bad = await served.connect(), await served.connect()
        model = await bad.load("endless")
        bad.send(work(model))
        await until(lambda: served.host.table.alive == 1)
        bad.writer.write(b"\x00\x00\x00\x01\xc1")
        assert await bad.receive() is None
        assert await good.alive()
        assert served.host.table.alive == 1

    run(folder, case)


def test_half_a_frame_waits_and_harms_nobody(folder: Path) -> None:
    async def case(served: Served) -> None:
        good, half = await served.connect(), await served.connect()
        data = frame(Ping(call=1))
        half.writer.write(data[:5])
        assert await good.alive()
        half.writer.write(data[5:])
        assert await half.receive() == Pong(call=1)
        half.writer.write(data[:3])
        half.writer.close()
        await until(lambda: len(served.host.peers) == 1)
        assert await good.alive()

    run(folder, case)


def test_client_without_a_greeting_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "GREETING_S", 0.1)

    async def case(served: Served) -> None:
        good, silent = await served.connect(), await served.connect(greet=False)
        assert await silent.receive() is None
        assert await good.alive()

    run(folder, case)


def test_tokens_come_in_sequence_and_make_the_text(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        wire.send(work(await wire.load("echo"), prompt="abcdef"))
        tokens, done = await wire.answer()
        assert [(t.call, t.sequence, t.text) for t in tokens] == [(7, 0, "ab"), (7, 1, "cd"), (7, 2, "ef")]
        assert (done.call, done.text, {t.generation for t in tokens}) == (7, "abcdef", {done.generation})

    run(folder, case)


def test_same_work_at_the_same_time_is_heard_twice_and_done_once(folder: Path) -> None:
    async def case(served: Served) -> None:
        first, second = await served.connect(), await served.connect()
        model = await first.load("slow")
        first.send(work(model, call=1))
        await asyncio.sleep(0.1)
        second.send(work(model, call=2))
        heard, heard_too = await asyncio.gather(first.answer(), second.answer())
        assert [t.text for t in heard[0]] == [t.text for t in heard_too[0]]
        assert [t.sequence for t in heard_too[0]] == [0, 1, 2, 3]
        assert heard[1].generation == heard_too[1].generation
        assert served.backend.started == 1

    run(folder, case)


def test_same_work_twice_on_one_connection(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load("slow")
        wire.send(work(model, call=1), work(model, call=2))
        events = [await wire.receive() for _ in range(10)]
        assert [e.call for e in events].count(1) == [e.call for e in events].count(2) == 5
        assert served.backend.started == 1

    run(folder, case)


def test_call_number_used_twice_is_a_breach(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load("endless")
        wire.send(work(model, call=1), work(model, call=1, name="other"))
        assert await wire.receive() is None

    run(folder, case)


def test_cancel_stops_the_work_unless_another_listens(folder: Path) -> None:
    async def case(served: Served) -> None:
        first, second = await served.connect(), await served.connect()
        model = await first.load("endless")
        first.send(work(model))
        second.send(work(model))
        assert await second.alive()
        first.send(Cancel(call=7))
        assert await first.alive()
        assert (served.host.table.alive, served.backend.cancelled) == (1, 0)
        second.send(Cancel(call=7), Cancel(call=7), Cancel(call=1234))
        assert await second.alive()
        assert (served.host.table.alive, served.backend.cancelled) == (0, 1)

    run(folder, case)


def test_lost_client_finds_its_generation_again_from_the_start(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load("slow")
        wire.send(work(model))
        first = await wire.receive()
        wire.writer.transport.abort()
        await until(lambda: not served.host.peers)
        again = await served.connect()
        again.send(work(model, call=8))
        tokens, done = await again.answer()
        assert [t.sequence for t in tokens] == [0, 1, 2, 3]
        assert {t.generation for t in tokens} == {first.generation, done.generation}
        assert (served.backend.started, served.backend.cancelled) == (1, 0)

    run(folder, case)


def test_work_of_a_lost_client_ends_after_its_linger_time(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        wire.send(work(await wire.load("endless")))
        await until(lambda: served.host.table.alive == 1)
        wire.writer.transport.abort()
        await until(lambda: served.backend.cancelled == 1)
        assert served.host.table.alive == 0

    run(folder, case, linger_work_s=0.1)


def test_linger_time_begins_anew_when_a_client_is_lost_again(folder: Path) -> None:
    async def case(served: Served) -> None:
        for _ in range(2):
            wire = await served.connect()
            wire.send(work(await wire.load("endless")))
            assert await wire.alive()
            wire.writer.transport.abort()
            await asyncio.sleep(0.7)
        assert (served.backend.started, served.backend.cancelled) == (1, 0)

    run(folder, case, linger_work_s=1.2)


def test_finished_work_is_answered_from_memory(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load("echo")
        wire.send(work(model))
        first = await wire.answer()
        wire.send(work(model))
        assert await wire.answer() == first
        assert served.backend.started == 1

    run(folder, case)


def test_memory_is_bounded_in_number_and_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "REMEMBERED", 2)
    monkeypatch.setattr(work_module, "REMEMBER_S", 0.2)

    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load("echo")
        for name in ("a", "b", "c", "b", "a"):
            wire.send(work(model, name=name))
            await wire.answer()
        assert served.backend.started == 4
        await asyncio.sleep(0.25)
        wire.send(work(model, name="a"))
        await wire.answer()
        assert served.backend.started == 5

    run(folder, case)


def test_memory_is_bounded_in_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "REMEMBERED_BYTES", 700_000)

    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load("long")
        for name in ("a", "b", "b", "a"):
            wire.send(work(model, name=name))
            await wire.answer()
        assert served.backend.started == 3

    run(folder, case)


def test_memory_is_given_back_when_nobody_asks_any_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "REMEMBER_S", 0.1)

    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load("echo")
        for name in ("a", "b"):
            wire.send(work(model, name=name))
            await wire.answer()
        table = served.host.table
        assert (len(table._finished), table._finished_bytes > 0) == (2, True)
        assert not any(map(gc.is_tracked, table._finished.values())), "nothing that a collection would look at"
        await until(lambda: not table._finished)
        assert (table._finished_bytes, table._pruning) == (0, None)

    run(folder, case)


@pytest.mark.parametrize(("name", "kind"), [("embed", "embed"), ("classify", "classify")])
def test_what_is_soon_done_again_is_not_remembered(folder: Path, name: str, kind: str) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load(name)
        for _ in range(2):
            wire.send(work(model, kind=kind))
            await wire.answer()
        assert served.backend.started == 2
        assert not served.host.table._finished

    run(folder, case)


def test_a_deadline_that_has_passed_ends_nothing(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load("slow")
        wire.send(msgspec.structs.replace(work(model), deadline=0.01))
        _, done = await wire.answer()
        assert (done.text, done.finish) == ("one two three four", "stop")

    run(folder, case)


def test_a_table_that_is_closed_answers_with_an_outage() -> None:
    async def main() -> None:
        table = WorkTable(ScriptedBackend(SCRIPTS))
        model = (await table.load("endless")).sha256
        await table.close()
        fault = [event async for event in table.submit(work(model))][-1]
        assert isinstance(fault, Fault)
        assert (fault.call, fault.kind, fault.message) == (7, "outage", "the engine is closed")
        with pytest.raises(Outage, match="the engine is closed"):
            await table.load("endless")
        assert (table.alive, table._backend.started) == (0, 0)  # type: ignore[attr-defined]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "kind", "code"), [("poison", "record", "model_error"), ("full", "overloaded", "overloaded")]
)
def test_fault_is_told_and_not_remembered(folder: Path, name: str, kind: str, code: str) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        model = await wire.load(name)
        for _ in range(2):
            wire.send(work(model))
            _, fault = await wire.answer()
            assert (fault.kind, fault.code) == (kind, code)
        assert served.backend.started == 2

    run(folder, case)


def test_unexpected_error_of_the_backend_costs_one_piece_of_work(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        wire.send(work("never loaded"))
        _, fault = await wire.answer()
        assert (fault.kind, fault.code) == ("record", "model_error")
        assert await wire.alive()

    run(folder, case)


def test_refused_model_is_told(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        wire.send(Load(call=5, folder="nowhere"))
        fault = await wire.receive()
        assert (fault.call, fault.kind) == (5, "model_folder")
        assert "no script for the model 'nowhere'" in fault.message

    run(folder, case)


def test_a_collection_does_not_walk_over_what_came_with_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(host_module, "spare", lambda: done.append("spared"))

    async def case(served: Served) -> None:
        wire = await served.connect()
        for name in ("echo", "echo", "slow"):
            await wire.load(name)
            assert await wire.alive()
        assert done == 2 * ["spared"]  # for each model once

    run(folder, case)


def test_a_load_is_answered_whatever_the_error_says(folder: Path) -> None:
    errors = [ModelFolderError("/models/\udcff is refused"), ValueError("\udcff"), Outage("no memory")]

    async def case(served: Served) -> None:
        async def load(*_: Any) -> Loaded:
            raise errors[0]

        served.backend.load = load  # type: ignore[method-assign]
        wire = await served.connect()
        for kind, text in (("model_folder", r"\udcff is refused"), ("outage", r"\udcff"), ("outage", "no memory")):
            wire.send(Load(call=5, folder="any"))
            fault = await wire.receive()
            assert (fault.call, fault.kind) == (5, kind)
            assert text in fault.message
            errors.pop(0)

    run(folder, case)


def test_a_reply_too_large_for_a_frame_fails_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        long, echo = await wire.load("long"), await wire.load("echo")
        monkeypatch.setattr("flink_llm.engine.protocol.MAX_FRAME_BYTES", 1000)
        wire.send(work(long, call=7))
        _, last = await wire.answer()
        assert (last.call, last.code) == (7, "result_too_large")
        wire.send(work(echo, call=8, name="other"))
        while not (isinstance(last, Done) and last.call == 8):
            last = await wire.receive()
        assert last.text == "abc"
        assert served.host.table.alive == 0

    run(folder, case)


def test_client_that_does_not_read_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "UNSENT_LIMIT_BYTES", 1_000_000)

    async def case(served: Served) -> None:
        good = await served.connect()
        slow = socket.socket(socket.AF_UNIX)
        slow.connect(str(served.path))
        model = await good.load("long")
        slow.sendall(frame(HELLO) + b"".join(frame(work(model, call=n, name=str(n))) for n in range(20)))
        await until(lambda: len(served.host.peers) == 1)
        slow.close()
        assert await good.alive()

    run(folder, case)


def test_ten_thousand_cancels_at_once(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire, other = await served.connect(), await served.connect()
        model = await wire.load("endless")
        wire.send(*(work(model, call=n, name=str(n)) for n in range(10_000)))
        assert await wire.alive()
        assert served.host.table.alive == 10_000
        began = time.monotonic()
        wire.send(*(Cancel(call=n) for n in range(10_000)))
        assert await other.alive()
        assert await wire.alive()
        assert time.monotonic() - began < 5
        assert (served.host.table.alive, served.backend.cancelled) == (0, 10_000)

    run(folder, case)


def test_host_goes_after_its_last_client(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        await asyncio.sleep(0.3)
        assert await wire.alive()
        wire.writer.close()
        await asyncio.wait_for(served.task, 2)
        assert not served.path.exists()

    run(folder, case, linger_s=0.1)


def test_host_that_is_stopped_closes_its_clients_connections(folder: Path) -> None:
    async def case(served: Served) -> None:
        wire = await served.connect()
        wire.send(work(await wire.load("endless")))
        assert await wire.alive()
        served.host.stop()
        assert await wire.receive() is None
        await served.task
        assert served.backend.cancelled == 1

    run(folder, case)


def test_stale_socket_is_replaced(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "host.sock"))

    async def case(served: Served) -> None:
        await until(lambda: bool(served.host.peers) or _connects(served.path))
        assert await (await served.connect()).alive()

    run(folder, case)


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_a_host_removes_no_socket_but_its_own(folder: Path) -> None:
    async def case(served: Served) -> None:
        served.path.unlink()
        other = Host(ScriptedBackend(SCRIPTS), "cpu", linger_s=30)
        task = asyncio.create_task(other.run(served.path))
        await until(served.path.exists)
        served.host.stop()
        await served.task
        assert _connects(served.path)
        other.stop()
        await task
        assert not served.path.exists()

    run(folder, case)


DYING = """
import os, sys, threading
from pathlib import Path
from flink_llm.engine import engine, host
from flink_llm.engine.settings import HostSettings
def dies(self, said):
    if self._inbox:
        print("works in", os.getcwd(), flush=True)
        raise RuntimeError("a bug")
engine.OnnxBackend._take_in = dies
host.serve(host._onnx, HostSettings(device="cpu", threads=1), Path(sys.argv[1]))
"""


def test_host_whose_engine_dies_ends_and_says_so(folder: Path) -> None:
    model = tiny.encoder(folder / "embedding", "embedding")
    path = folder / "host.sock"

    async def case() -> None:
        await until(lambda: path.exists() and _connects(path), 60)
        wire = Wire(*await asyncio.open_unix_connection(str(path)))
        await wire.greet()
        wire.send(work(await wire.load(str(model)), kind="embed"))
        while await wire.receive(30) is not None:
            pass
        wire.writer.close()

    words = [sys.executable, "-c", DYING, path.name]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as host:
        try:
            asyncio.run(case())
            said, log = host.communicate(timeout=30)
        finally:
            host.kill()
    assert "CRITICAL the engine's thread has died, and its host ends with it" in log
    assert "RuntimeError: a bug" in log
    assert said == f"works in {folder}\n"
    assert not path.exists()


def test_second_host_of_a_socket_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_module, "PREDECESSOR_S", 0.1)
    path = folder / "host.sock"
    with FileLock(folder / "host.held"), pytest.raises(SystemExit):
        serve(lambda _: ScriptedBackend({}), HostSettings(device="cpu"), path)
    assert capsys.readouterr().err == f"flink-llm host: another host of {path} is alive; stop it first\n"


def test_socket_is_the_owners_alone(folder: Path) -> None:
    async def case(served: Served) -> None:
        assert stat.S_IMODE(served.path.stat().st_mode) & 0o077 == 0

    run(folder, case)


def test_folder_is_made_for_its_owner_alone(folder: Path) -> None:
    made = socket_folder(HostSettings(socket_dir=str(folder)))
    assert made == folder / f"flink-llm-{os.getuid()}"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.parametrize("spoil", ["readable", "link", "file", "foreign"])
def test_folder_that_others_reach_is_refused(folder: Path, spoil: str) -> None:
    place = folder / f"flink-llm-{os.getuid()}"
    if spoil == "link":
        (folder / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(folder / "elsewhere")
    elif spoil == "file":
        place.touch()
    else:
        place.mkdir(mode=0o700)
        if spoil == "readable":
            place.chmod(0o750)
        elif os.getuid() == 0:
            os.chown(place, 12345, 12345)
        else:
            pytest.skip("only root can give a folder away")
    with pytest.raises(ConfigError, match=r"host\.socket_dir"):
        socket_folder(HostSettings(socket_dir=str(folder)))


def test_path_too_long_for_a_socket_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        socket_path(HostSettings(device="cpu", socket_dir=str(folder / ("d" * 100))))


def test_name_tells_hosts_apart(folder: Path) -> None:
    plain = HostSettings(device="cpu", socket_dir=str(folder))
    others = [
        HostSettings(device="cuda:1", socket_dir=str(folder)),
        HostSettings(device="cpu", socket_dir=str(folder), launcher="flink_llm.testing"),
        HostSettings(device="cpu", socket_dir=str(folder), slots=2),
        HostSettings(device="cpu", socket_dir=str(folder), cache_mb=2),
    ]
    names = {socket_path(settings).name for settings in [plain, *others]}
    assert len(names) == 5
    assert all(f"-p{PROTOCOL_VERSION}-{__version__}-" in name for name in names)
