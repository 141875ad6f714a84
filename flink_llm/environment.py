"""The Flink settings that latency, back-pressure and recovery depend on, in one place.

`bundle.time`, `bundle.size` and the buffer timeout hold for a whole job: `configure` sets them, `check`
says what is wrong with an environment that somebody else has made.
"""

import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pyflink.common import Configuration
from pyflink.datastream import CheckpointingMode, StreamExecutionEnvironment
from pyflink.java_gateway import get_gateway

from flink_llm import reporters
from flink_llm.errors import ConfigError, LocalError
from flink_llm.flink_settings import FlinkSettings
from flink_llm.gateway import one_java_thread
from flink_llm.local import failures, jars, processes
from flink_llm.transactions import PARAMETER, checkpoint_timeout_ms

BUNDLE_TIME = "python.fn-execution.bundle.time"
BUNDLE_SIZE = "python.fn-execution.bundle.size"
BUNDLE_TIME_MS = 1
CHECKPOINT_TIMEOUT_MS = 600_000
"""Flink's default, taken for nobody's choice."""
BUFFER_TIMEOUT_MS = 0
"""Every record leaves at once: what leaves Python comes in bundles anyway."""
SLOWEST_S = 0.014
"""A bundle of a full operator lasts about so long, and its results with it: seconds of completions in one bundle."""
SMALLEST = 8
"""Records that a bundle may hold at any rate: one by one, a burst of what is refused or answered from memory would
wait before the operator. A full operator lets go of a bundle by itself (`flink_llm.places`)."""

_REMEDY = "call flink_llm.environment.configure(env, FlinkSettings())"


def bundle_size(capacity: int, expected_rate: float | None) -> int:
    """How many records a bundle may hold: an eighth of the places at most, and 14 ms of completions or a few."""
    by_rate = capacity // 8 if expected_rate is None else int(expected_rate * SLOWEST_S)
    return max(1, min(capacity // 8, max(by_rate, SMALLEST)))


def configure(env: StreamExecutionEnvironment, settings: FlinkSettings, *, capacity: int = 256) -> None:
    """Prepares `env` for jobs of this library; `capacity` is the largest of its operators'."""
    one_java_thread()
    options = {
        BUNDLE_TIME: str(BUNDLE_TIME_MS),
        BUNDLE_SIZE: str(bundle_size(capacity, settings.expected_rate)),
        "restart-strategy.type": "exponential-delay",
        "restart-strategy.exponential-delay.initial-backoff": "500 ms",
        "restart-strategy.exponential-delay.max-backoff": "30 s",
        "execution.checkpointing.tolerable-failed-checkpoints": "10",
        # A full operator is the normal case here: a barrier that queued behind its input would wait for seconds.
        "execution.checkpointing.unaligned.enabled": "true",
    }
    if settings.checkpoint_dir is not None:
        options["execution.checkpointing.storage"] = "filesystem"
        options["execution.checkpointing.dir"] = _uri(settings.checkpoint_dir)
    configuration = Configuration()
    for name, value in {**options, **settings.properties}.items():
        configuration.set_string(name, value)
    env.set_parallelism(settings.parallelism)
    env.set_max_parallelism(settings.max_parallelism)
    env.set_buffer_timeout(BUFFER_TIMEOUT_MS)
    mode = CheckpointingMode.EXACTLY_ONCE
    env.enable_checkpointing(settings.checkpoint_interval_ms, mode)
    env.configure(configuration)  # last: properties go before what is set here


def _uri(folder: str) -> str:
    return folder if "://" in folder else Path(folder).absolute().as_uri()


def check(env: StreamExecutionEnvironment, capacity: int) -> None:
    """Raises ConfigError when the job-wide bundle settings would make the operator wait."""
    configuration = env._j_stream_execution_environment.getConfiguration()
    size = _number(BUNDLE_SIZE, configuration.getString(BUNDLE_SIZE, "1000"))
    time_ms = _number(BUNDLE_TIME, str(configuration.getString(BUNDLE_TIME, "1000")).removesuffix("ms"))
    limit = max(1, capacity // 8)
    if size > limit:
        raise ConfigError(
            f"{BUNDLE_SIZE} is {size}, more than an eighth of capacity={capacity}: a full operator would "
            f"hold back timers and checkpoints; {_REMEDY}, or set it to {limit} at most"
        )
    if time_ms > 100:
        raise ConfigError(
            f"{BUNDLE_TIME} is {time_ms} ms, and every output waits for it; {_REMEDY}, or set it to {BUNDLE_TIME_MS}"
        )
    if env.get_buffer_timeout() < 0 or env.get_buffer_timeout() > 100:
        raise ConfigError(
            f"the buffer timeout is {env.get_buffer_timeout()} ms, and every output waits for it; "
            f"{_REMEDY}, or set_buffer_timeout({BUFFER_TIMEOUT_MS})"
        )


def bound_transactions(env: StreamExecutionEnvironment, timeout_ms: int | None) -> None:
    """A sink's transactions last so long at most: checkpoints are to end before, and operators are to know.

    Of several sinks the shortest counts. None leaves the checkpoints' timeout and the operators out. Raises
    ConfigError without checkpoints, with which transactions are committed, or when their own settings do not fit.
    """
    settings = env.get_checkpoint_config()
    if not settings.is_checkpointing_enabled():
        raise ConfigError(
            "exactly_once commits with checkpoints, and they are off: call env.enable_checkpointing(...), or "
            "flink_llm.environment.configure, before kafka.sink"
        )
    if timeout_ms is None:
        return
    config = env.get_config()
    parameters = dict(config.get_global_job_parameters() or {})
    tolerable = max(0, settings.get_tolerable_checkpoint_failure_number())
    bound = functools.partial(
        checkpoint_timeout_ms, interval_ms=settings.get_checkpoint_interval(), tolerable=tolerable
    )
    nobodys = {CHECKPOINT_TIMEOUT_MS}
    if PARAMETER in parameters:
        earlier_ms = int(parameters[PARAMETER])
        nobodys.add(bound(earlier_ms, chosen_ms=None))  # what was set for the sink before
        timeout_ms = min(timeout_ms, earlier_ms)
    configured = settings.get_checkpoint_timeout()
    settings.set_checkpoint_timeout(bound(timeout_ms, chosen_ms=None if configured in nobodys else configured))
    config.set_global_job_parameters({**parameters, PARAMETER: str(timeout_ms)})


def starts_from_savepoint(env: StreamExecutionEnvironment) -> bool:
    """Whether the job is submitted with a savepoint to begin from; a retained checkpoint is none."""
    configuration = env._j_stream_execution_environment.getConfiguration()
    path: str = configuration.getString("execution.state-recovery.path", "")
    folder = path.rstrip("/").removesuffix("/_metadata").rstrip("/")
    return bool(path) and not folder.rpartition("/")[2].startswith("chk-")


def environment(properties: dict[str, str] | None = None, *, kafka: bool = True) -> StreamExecutionEnvironment:
    """The cluster a job is submitted to, or else a mini-cluster in this process.

    On the mini-cluster Python runs in processes of its own, as it does on a cluster, the connector jar is
    fetched if need be unless `kafka` is off, checkpoints lie in a temporary folder unless `configure` or
    `properties` name another, and what the job fails of is told on stderr. Raises LocalError: no Java that
    Flink runs on, no connector jar; ConfigError: `rest.port` is no number.
    """
    local = not submitted()
    if local:
        reporters.to_class_path(properties or {})
        if any(character.isspace() for character in sys.executable):  # its script does not quote
            raise LocalError(f"{sys.executable}: Flink starts no Python at a path with a space: move it, .venv and all")
        jars.java()  # a Configuration is an object of Flink's, and starts Java
        os.environ.setdefault("JVM_ARGS", " ".join(jars.OPTIONS))
    configuration = Configuration()
    if local:
        leave_loopback()
        configuration.set_string("python.executable", sys.executable)
        if kafka:
            configuration.set_string("pipeline.jars", jars.connector_jar().as_uri())
        configuration.set_string("taskmanager.memory.managed.size", "512m")
        # What the job manager would keep instead may be 5 MB of each operator: a few large records in flight.
        configuration.set_string("execution.checkpointing.storage", "filesystem")
        configuration.set_string("execution.checkpointing.dir", _checkpoints())
        properties = {"rest.port": str(processes.free_port()), **(properties or {})}
        failures.watch(_number("rest.port", properties["rest.port"]))
    for name, value in (properties or {}).items():
        configuration.set_string(name, value)
    one_java_thread()
    return StreamExecutionEnvironment.get_execution_environment(configuration)


@functools.cache
def _checkpoints() -> str:
    """A temporary folder, deleted when Java ends: Flink's own kind, since a signal ends Python without a word."""
    gateway = get_gateway()
    folders = gateway.new_array(gateway.jvm.String, 1)
    folders[0] = tempfile.gettempdir()
    manager = gateway.jvm.org.apache.flink.runtime.io.disk.FileChannelManagerImpl(folders, "checkpoints")
    return str(manager.getPaths()[0].toURI())


def _number(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"flink.properties: {key} is {value!r}, which is no whole number") from None


def submitted() -> bool:
    """Whether `flink run` started this process: it reaches its gateway through the environment."""
    return "PYFLINK_GATEWAY_PORT" in os.environ and os.environ.get("FLINK_LLM_LOCAL") != str(os.getpid())


def leave_loopback() -> None:
    """Has Python run in processes of its own from now on, as on a cluster."""
    # The option python.execution-mode alone does not leave the mini-cluster's in-client "loopback".
    os.environ["_python_worker_execution_mode"] = "process"
    os.environ["FLINK_LLM_LOCAL"] = str(os.getpid())  # a `flink run` that this process starts inherits it


def tables(env: StreamExecutionEnvironment) -> Any:
    """The table environment over `env`, which the Kafka edges are made with."""
    from pyflink.table import StreamTableEnvironment

    one_java_thread()
    return StreamTableEnvironment.create(env)
