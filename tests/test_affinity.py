"""The next turn of a session finds what the one before has left in the model host's cache."""

import shutil
import tempfile
from pathlib import Path

import pytest

from flink_llm.call import OperatorSettings
from flink_llm.engine.generation import current_call
from flink_llm.engine.settings import HostSettings
from flink_llm.handler import AsyncUdf
from flink_llm.local import processes
from flink_llm.records import Message
from flink_llm.services import RealServices, ServiceSettings
from flink_llm.testing import Harness
from tests.test_client import hosts
from tests.test_metrics import read, until
from tests.test_readme import ROOT


@pytest.fixture
def services():
    """What a worker opens; the host behind it is one, of the real kind."""
    folder = Path(tempfile.mkdtemp(prefix="fl-"))
    port = processes.free_port()
    host = HostSettings(device="cpu", slots=4, threads=1, linger_s=1, socket_dir=str(folder), metrics_port=port)
    models = {"support-chat": str(ROOT / "models" / "support-chat")}
    yield lambda: RealServices(ServiceSettings(models=models, host=host)), port, folder
    until(lambda: not hosts(folder))
    shutil.rmtree(folder)


class Chat(AsyncUdf):
    stateful = True

    async def open(self, ctx):
        self.model = ctx.model("support-chat")

    async def call(self, request: dict, ctx):
        turns = [*ctx.state.get("turns", []), Message("user", request["text"])]
        reply = await self.model.chat(turns, max_tokens=4)
        ctx.state["turns"] = [*turns, Message("assistant", reply.text)]
        return {"request_id": request["request_id"], "session": current_call.get().session_id}


def turn(worker, number, session):
    text = f"{session} begins its turn {number} by a name, so that no other session says any of it"
    worker.send({"request_id": f"{session}-{number}", "session_id": session, "text": text})
    worker.finish()


def reused(port):
    return sum(value for key, value in read(port).items() if key[0] == "flink_llm_prompt_tokens_reused_total")


def test_a_sessions_next_turn_finds_its_prefix_from_another_subtask_too(services):
    opened, port, folder = services
    settings = OperatorSettings(deadline=None)
    with Harness(Chat(), opened(), settings=settings, real_time=True) as stays:
        with Harness(Chat(), opened(), settings=settings, real_time=True) as first:
            for session in ("a", "b", "c"):
                turn(first, 0, session)
            assert reused(port) == 0
            turn(first, 1, "a")
            found = reused(port)
            assert found > 40  # the first turn, the template's words included
            state = first.checkpoint()
        with Harness(
            Chat(), opened(), settings=settings, real_time=True, state=state
        ) as moved:  # as after a change of parallelism
            turn(moved, 2, "a")
            assert reused(port) > 2 * found  # two turns of it
            turn(moved, 1, "b")
            assert [result["session"] for result in moved.results()] == ["a", "b"]
        turn(stays, 0, "other")
        assert len(hosts(folder)) == 1
