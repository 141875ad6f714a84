"""Makes the savepoint that `test_stored_savepoint` restores: python -m tests.integration.stored

It stands for the release before: make it anew only when that shall be another one. Topics, ids and texts in it
are the test's, which sends the same records again so that a new broker has them at the same offsets.
"""

import shutil
import tempfile
from pathlib import Path

from flink_llm.handler import AsyncUdf
from flink_llm.local.broker import Broker, create_topics
from tests.integration.test_savepoint import Job, request

DATA = Path(__file__).parents[1] / "data"
SAVEPOINT = DATA / "savepoint"
TOPICS = ("stored.requests", "stored.responses", "stored.extra")
KEYS = ["ada", "grace", "Zoë"]
ANSWERED = [request(number, key, text=f"hello {number}") for number, key in enumerate(KEYS)]
IN_FLIGHT = [request(10 + number, key, text="wait", wait=True) for number, key in enumerate(KEYS)]


def before() -> AsyncUdf:
    """Keeps what was said, in a record of its own; waits for ever where it is told to."""

    class Reply(AsyncUdf):  # inside: the worker cannot import the tests
        stateful = True

        async def call(self, request: dict, ctx):
            import asyncio

            from stored_records import Turn

            if request.get("wait"):
                await asyncio.Event().wait()
            turns = [*ctx.state.get("turns", []), Turn(request["text"], len(ctx.state.get("turns", [])))]
            ctx.state["turns"] = turns
            return {"request_id": request["request_id"], "key": ctx.key, "turns": [turn.text for turn in turns]}

    return Reply()


def main() -> None:
    """Runs the job, stops it with its savepoint while records are in flight, and keeps that."""
    with tempfile.TemporaryDirectory(prefix="flink-llm-") as name:
        folder = Path(name)
        broker = Broker(folder / "broker")
        broker.up([])
        try:
            create_topics(broker.bootstrap_servers, TOPICS)
            job = Job(broker, TOPICS, folder)
            job.send(*ANSWERED, *IN_FLIGHT)
            running = job.start(udf=before(), modules=[DATA / "before" / "stored_records.py"])
            assert len(job.wait(len(ANSWERED))) == len(ANSWERED)
            savepoint = job.stop(running)
        finally:
            broker.wipe()
        shutil.rmtree(SAVEPOINT, ignore_errors=True)
        shutil.copytree(savepoint.removeprefix("file:"), SAVEPOINT)
    sizes = {file.name: file.stat().st_size for file in SAVEPOINT.iterdir()}
    print(f"{SAVEPOINT}: {sizes}")


if __name__ == "__main__":
    main()
