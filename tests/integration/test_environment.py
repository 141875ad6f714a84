"""Environments that somebody else has made, and what an operator asks of them, on a real Java."""

import sys
import time
from pathlib import Path

import pytest
import yaml
from pyflink.common import Row, Types

from flink_llm import environment, kafka
from flink_llm.errors import ConfigError
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf
from flink_llm.jobs import edges
from flink_llm.local import processes
from flink_llm.transactions import checkpoint_timeout_ms
from flink_llm.udfs.async_operator import apply

SIZE, TIME = environment.BUNDLE_SIZE, environment.BUNDLE_TIME


def made(properties=None, *, timeout=None):
    env = environment.environment()
    environment.configure(env, FlinkSettings(properties=properties or {}))
    if timeout is not None:
        env.set_buffer_timeout(timeout)
    return env


def test_what_is_configured_here_is_good():
    environment.check(made(), 256)
    environment.check(made({SIZE: "1", TIME: "100ms"}, timeout=100), 1)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (environment.environment, rf"^{SIZE} is 1000, more than an eighth of capacity=256: .*or set it to 32 at most$"),
        (lambda: made({SIZE: "33"}), rf"^{SIZE} is 33, more than an eighth of capacity=256: "),
        (lambda: made({TIME: "101"}), rf"^{TIME} is 101 ms, .*or set it to 1$"),
        (lambda: made({SIZE: "x"}), rf"^flink.properties: {SIZE} is 'x', which is no whole number$"),
        (lambda: made({TIME: "1 s"}), rf"^flink.properties: {TIME} is '1 s', which is no whole number$"),
        (lambda: made(timeout=101), r"^the buffer timeout is 101 ms, .*or set_buffer_timeout\(0\)$"),
        (lambda: made(timeout=-1), r"^the buffer timeout is -1 ms, "),
    ],
    ids=["untouched", "size", "time", "no size", "no time", "timeout", "only full buffers"],
)
def test_what_would_make_an_operator_wait_is_refused(env, words):
    with pytest.raises(ConfigError, match=words):
        environment.check(env(), 256)


def test_properties_go_before_what_is_set_beside_them():
    env = made({
        "execution.checkpointing.interval": "7 s", "execution.buffer-timeout.interval": "5 ms",
        "parallelism.default": "3", "pipeline.max-parallelism": "64",
    })  # fmt: skip
    found = env.get_checkpoint_config().get_checkpoint_interval(), env.get_buffer_timeout()
    assert (*found, env.get_parallelism(), env.get_max_parallelism()) == (7000, 5, 3, 64)


@pytest.mark.parametrize(
    ("path", "savepoint"),
    [
        ("", False),
        ("file:///s/chk-12", False),
        ("/s/chk-12/", False),
        ("file:///s/chk-12/_metadata", False),
        ("file:///s/savepoint-1", True),
        ("file:///s/savepoint-1/_metadata", True),
    ],
)
def test_a_retained_checkpoint_is_no_savepoint_however_it_is_named(path, savepoint):
    assert environment.starts_from_savepoint(made({"execution.state-recovery.path": path})) is savepoint


@pytest.mark.parametrize("timeouts", [(600_000, 300_000), (300_000, 600_000), (300_000, None)])
def test_the_shortest_transactions_of_a_job_bound_its_checkpoints(timeouts):
    env = made()
    for timeout_ms in timeouts:
        environment.bound_transactions(env, timeout_ms)
    found = env.get_checkpoint_config().get_checkpoint_timeout()
    assert found == checkpoint_timeout_ms(300_000, interval_ms=1000, tolerable=10, chosen_ms=None)


def test_a_checkpoint_timeout_of_ones_own_must_fit_the_shortest_transactions():
    env = made({"execution.checkpointing.timeout": "40 s"})
    environment.bound_transactions(env, 600_000)
    assert env.get_checkpoint_config().get_checkpoint_timeout() == 40_000
    with pytest.raises(ConfigError, match=r"^kafka.transaction_timeout_ms is 300000, .* of 40000 ms and 1000 ms apart"):
        environment.bound_transactions(env, 300_000)


def checkpoints(env):
    configuration = env._j_stream_execution_environment.getConfiguration()
    return [configuration.getString(f"execution.checkpointing.{name}", "") for name in ("storage", "dir")]


def test_checkpoints_of_a_mini_cluster_are_files_unless_it_is_told_otherwise(tmp_path):
    storage, folder = checkpoints(made())
    assert (storage, Path(folder.removeprefix("file:")).is_dir()) == ("filesystem", True)
    env = environment.environment()
    environment.configure(env, FlinkSettings(checkpoint_dir=str(tmp_path)))
    assert checkpoints(env) == ["filesystem", tmp_path.as_uri()]
    assert checkpoints(environment.environment({"execution.checkpointing.storage": "jobmanager"}))[0] == "jobmanager"


BEGUN = """
import time
from flink_llm import environment
print(environment._checkpoints(), flush=True)
time.sleep(60)
"""


def test_a_mini_cluster_that_is_ended_by_a_signal_leaves_no_checkpoints(tmp_path):
    said = tmp_path / "said"
    started = processes.start([sys.executable, "-c", BEGUN], said)
    deadline = time.monotonic() + 60
    while not said.read_text().endswith("/\n") and time.monotonic() < deadline:
        time.sleep(0.1)
    folder = Path(said.read_text().strip().removeprefix("file:"))
    assert folder.is_dir()
    processes.stop(started)
    assert not folder.exists()


class Echo(AsyncUdf):
    async def call(self, request, ctx):
        return request


@pytest.mark.parametrize("mode", ["BATCH", "batch", "AUTOMATIC"])
def test_batch_mode_is_refused(mode):
    env = made({"execution.runtime-mode": mode})
    rows = env.from_collection([Row(b"k", b"{}", {}, None)], kafka.OUTBOUND)
    with pytest.raises(ConfigError, match=rf"(?i)^execution.runtime-mode is {mode}: .*: use STREAMING$"):
        apply(rows, Echo(), key="key", uid="echo")


def test_a_uid_that_another_operator_has_and_a_stream_that_is_keyed_are_refused():
    env = made()
    stream = env.from_collection(['{"id": "a"}'], Types.STRING())
    apply(stream, Echo(), key="id", uid="echo")
    with pytest.raises(ConfigError, match=r"^echo: the job has an operator of this uid already: "):
        apply(stream, Echo(), key="id", uid="echo")
    with pytest.raises(ConfigError, match=r"^other: .*: give it the stream before key_by$"):
        apply(stream.key_by(lambda text: text, Types.STRING()), Echo(), key="id", uid="other")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rest.port", "abc", "flink.properties: rest.port is 'abc', which is no whole number"),
        (
            "execution.checkpointing.timeout",
            "often",
            "Flink refuses the job: Could not parse value 'often' for key 'execution.checkpointing.timeout': "
            "java.lang.NumberFormatException: text does not start with a number, ",
        ),
        (
            "taskmanager.memory.managed.size",
            "many",
            "the job failed: Could not parse value 'many' for key 'taskmanager.memory.managed.size': "
            "java.lang.NumberFormatException: text does not start with a number",
        ),
    ],
)
def test_a_property_that_flink_refuses_is_one_line(key, value, words, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PYFLINK_GATEWAY_PORT", raising=False)
    (tmp_path / "in").touch()
    raw = {"job": "other", "name": "n", "files": {"requests": "in", "outcomes": "out"}}
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump({**raw, "flink": {"properties": {key: value}}}))
    with pytest.raises(SystemExit) as ended:
        edges.run(lambda env, settings: env.from_collection(["a"]).print(), ["--config", str(config)])
    assert ended.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if " starts on a mini-cluster" not in line]
    assert [line[: len(words) + 11] for line in said] == [f"flink-llm: {words}"]
