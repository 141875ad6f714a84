"""Environments that somebody else has made, and what an operator asks of them, on a real Java."""

import pytest
from pyflink.common import Row

from flink_llm import environment, kafka
from flink_llm.errors import ConfigError
from flink_llm.flink_settings import FlinkSettings
from flink_llm.handler import AsyncUdf
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
        (lambda: made(timeout=101), r"^the buffer timeout is 101 ms, .*or set_buffer_timeout\(0\)$"),
        (lambda: made(timeout=-1), r"^the buffer timeout is -1 ms, "),
    ],
    ids=["untouched", "size", "time", "timeout", "only full buffers"],
)
def test_what_would_make_an_operator_wait_is_refused(env, words):
    with pytest.raises(ConfigError, match=words):
        environment.check(env(), 256)


class Echo(AsyncUdf):
    async def call(self, request, ctx):
        return request


@pytest.mark.parametrize("mode", ["BATCH", "batch", "AUTOMATIC"])
def test_batch_mode_is_refused(mode):
    env = made({"execution.runtime-mode": mode})
    rows = env.from_collection([Row(b"k", b"{}", {}, None)], kafka.OUTBOUND)
    with pytest.raises(ConfigError, match=rf"(?i)^execution.runtime-mode is {mode}: .*: use STREAMING$"):
        apply(rows, Echo(), key="key", uid="echo")
