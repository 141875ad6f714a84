"""A savepoint of the release before, restored by the next release of its handler."""

import re
import shutil

import pytest

from flink_llm.handler import AsyncUdf
from flink_llm.local.broker import create_topics
from tests.integration.stored import ANSWERED, DATA, IN_FLIGHT, KEYS, SAVEPOINT, TOPICS
from tests.integration.test_savepoint import Job, request

META = re.compile(rb"\x01([\x92\x93]\x10\xcc\x80)")  # 16 shards, 128 key groups: an entry of each shard


def after() -> AsyncUdf:
    """Another class, another code, one more field in the state, and a record that has changed."""

    class LongerReply(AsyncUdf):  # inside: the worker cannot import the tests
        stateful = True

        async def open(self, ctx):
            import stored_records  # noqa: F401 - registers what the state of the first call holds

        async def call(self, request: dict, ctx):
            from stored_records import Turn

            turns = ctx.state.get("turns", [])
            ctx.state["turns"] = [*turns, Turn(request["text"], len(turns), "de")]
            ctx.state["seen"] = ctx.state.get("seen", 0) + 1
            said = [f"{turn.number} {turn.said} {turn.language}" for turn in ctx.state["turns"]]
            return {"request_id": request["request_id"], "said": said, "seen": ctx.state["seen"]}

    return LongerReply()


@pytest.fixture(scope="module")
def job(broker, tmp_path_factory):
    create_topics(broker.bootstrap_servers, TOPICS)
    job = Job(broker, TOPICS, tmp_path_factory.mktemp("stored"))
    job.send(*ANSWERED, *IN_FLIGHT)
    return job


def start(job, savepoint):
    modules = [DATA / "after" / "stored_records.py"]
    return job.start(parallelism=2, savepoint=savepoint.as_uri(), udf=after(), modules=modules)


@pytest.mark.timeout(240)
def test_its_records_its_state_and_its_answers_are_there(job):
    again = [request(20 + number, key, text="more") for number, key in enumerate(KEYS)]
    job.send(*again, ANSWERED[0])
    running = start(job, SAVEPOINT)
    answers = job.wait(2 * len(KEYS) + 1)
    running.cancel().result()
    expected = [{"request_id": "r0", "key": "ada", "turns": ["hello 0"]}]  # remembered, as the release before said it
    for number in range(len(KEYS)):
        first, second, third = f"0 hello {number} en", "1 wait de", "2 more de"
        expected.append({"request_id": f"r1{number}", "said": [first, second], "seen": 1})
        expected.append({"request_id": f"r2{number}", "said": [first, second, third], "seen": 2})
    assert sorted(answers, key=by_id) == sorted(expected, key=by_id)


def by_id(answer):
    return answer["request_id"]


@pytest.mark.timeout(240)
def test_one_of_a_later_release_is_refused_with_both_versions(job, tmp_path):
    doctored = tmp_path / "savepoint"
    shutil.copytree(SAVEPOINT, doctored)
    changed = 0
    for file in doctored.iterdir():
        data, count = META.subn(lambda found: b"\x07" + found[1], file.read_bytes())
        changed += count
        file.write_bytes(data)
    assert changed
    with pytest.raises(Exception, match=r"state was written in version 7, this release reads version 1"):
        start(job, doctored).get_job_execution_result().result()
