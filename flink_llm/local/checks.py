"""What a job needs, a function for each part: for the doctor, and before a job starts here.

Each gives a few words about what it found and raises a FlinkLlmError, one line that says what to do.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout

from flink_llm import tracing
from flink_llm.config import REQUEST_ROOM, JobConfig
from flink_llm.engine.place import socket_folder
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.errors import ConfigError, LocalError
from flink_llm.kafka_settings import (
    TOPIC_SIZE,
    beyond_this_client,
    check_reachable,
    check_transaction_timeout,
    topic_limits,
    topics_there,
)
from flink_llm.local import jars
from flink_llm.names import nearest, unknown
from flink_llm.telemetry_settings import TelemetrySettings

SLOTS, MANAGERS = "taskmanager.numberOfTaskSlots", "minicluster.number-of-taskmanagers"
FLAVOURS = {"onnxruntime": "cpu", "onnxruntime-gpu": "gpu"}


def before_start(config: JobConfig) -> None:
    """All that would otherwise end in a job that restarts for ever, for a job on this machine."""
    gpu(config.host)
    slots(config)
    tracing.check(config.telemetry)
    if config.files is not None:
        requests(config)
    else:
        kafka(config)
        topics(config)
    for name, folder in served(config).items():
        model(folder, adapter_of(config, name))
    if config.features is not None:
        features(config)


def alone(config: JobConfig) -> FileLock | None:
    """A lock to hold while the job runs; None for one of files. Raises ConfigError: it runs here already."""
    if config.files is not None:
        return None
    digest = hashlib.sha256(f"{config.kafka.bootstrap_servers}/{config.name}".encode()).hexdigest()[:16]
    lock = FileLock(socket_folder(config.host) / f"job-{digest}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"name: a job {config.name!r} runs on this machine already, and both would use the same transactions and "
            f"shut each other out: end it first, or give this one another name"
        ) from None
    return lock


def slots(config: JobConfig) -> str:
    """Slots for all subtasks, where `flink.properties` says how many the mini-cluster has."""
    given = config.flink.properties
    each, managers = (given.get(name, "") for name in (SLOTS, MANAGERS))
    if each.isdecimal() and (managers or "1").isdecimal():
        there = int(each) * int(managers or 1)
        if there < config.flink.parallelism:
            raise ConfigError(
                f"flink.parallelism is {config.flink.parallelism}, flink.properties.{SLOTS} gives {there} slots: "
                f"leave the latter out, or raise it"
            )
    calls = config.flink.parallelism * config.operator.capacity
    return (
        f"{config.flink.parallelism} of at most {config.flink.shards} subtasks (flink.shards), which run {calls} calls "
        f"at once; {config.host.slots} generations at once for each device (host.slots)"
    )


def job(name: str) -> ModuleType:
    """The module of the installed job of that name. Raises ConfigError, and whatever its import raises."""
    found = _jobs()
    if name not in found:
        raise ConfigError(unknown("job", name, found))
    module = found[name].load()
    if not callable(getattr(module, "main", None)):
        raise ConfigError(f"job: {name} is {found[name].value!r}: name a module that has main(arguments) there")
    return module  # type: ignore[no-any-return]


def distribution_of(job: str) -> str:
    """The name of what an installed job came with."""
    dist = _jobs()[job].dist
    return dist.name if dist is not None else "flink-llm"


def _jobs() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="flink_llm.jobs")}


def python() -> str:
    """This interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        raise ConfigError(f"this is Python {version}: use 3.11 or 3.12")
    return f"{version} at {sys.executable}"


def java() -> str:
    """Java's version."""
    path, version = jars.java()
    return f"{version} at {path}"


def maven() -> str:
    """Maven, unless what it would fetch is in the cache."""
    try:
        return jars.program("mvn")
    except LocalError:
        if not jars.all_cached():
            raise
        return f"not installed, and not needed: the jars are in {jars.cache_folder()}"


def connector() -> str:
    """The connector jar, and whether this Flink is one that it runs on."""
    flink = importlib.metadata.version("apache-flink")
    jar = jars.connector_jar().name
    built_for = re.search(r"-(\d+)\.(\d+)\.jar$", jar)
    if built_for is not None:
        here, there = _release(flink), (int(built_for[1]), int(built_for[2]))
        if here[0] != there[0] or here < there:
            raise ConfigError(
                f"{jar} is for Flink {there[0]}.{there[1]} and later {there[0]}.x, this is Flink {flink}: "
                f"install flink-llm anew, which brings both"
            )
    return f"Flink {flink}, {jar}"


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def flavour() -> str:
    """The one ONNX Runtime package that is installed."""
    found = [name for name in FLAVOURS if _installed(name)]
    if not found:
        raise ConfigError("ONNX Runtime is not installed: pip install 'flink-llm[cpu]' (or [gpu])")
    if len(found) == 2:
        raise ConfigError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall both, then install one"
        )
    return found[0]


def onnxruntime() -> str:
    """ONNX Runtime's flavour and version."""
    name = flavour()
    return f"{name} {importlib.metadata.version(name)}"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def kernels() -> str:
    """Whether models on the CPU run by kernels of our own."""
    from flink_llm.engine import native  # ONNX Runtime is slow to import

    return native.state()


def gpu(host: HostSettings) -> str:
    """What `host.device` means on this machine; a GPU that is asked for must be there."""
    device = resolve_device(host.device)
    seen = _gpus()
    if device == "cpu":
        idle = f"; not used: {', '.join(seen)} (host.device: cuda, or CUDA_VISIBLE_DEVICES)" if seen else ""
        return f"host.device {host.device} is the CPU here{idle}"
    from flink_llm.engine.graphs import providers  # ONNX Runtime is slow to import

    flavour()
    providers(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(seen) if visible is None else len([one for one in visible.split(",") if one not in ("", "-1")])
    number = int(device.partition(":")[2])
    if not seen or number >= count:
        shown = "no NVIDIA GPU is seen" if not seen else f"{count} are visible (CUDA_VISIBLE_DEVICES={visible})"
        raise ConfigError(
            f"host.device is {host.device!r}, {shown} here: correct it, install the driver, or use host.device: cpu"
        )
    return f"host.device {host.device} is {device} of {', '.join(seen)}"


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    ran = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return [] if ran.returncode else [line.strip() for line in ran.stdout.splitlines() if line.strip()]


def requests(config: JobConfig) -> str:
    """`files.requests`, which must be there and readable."""
    if config.files is None:
        return "none"
    path = Path(config.files.requests)
    if not path.exists():
        raise ConfigError(f"files.requests: {path} does not exist")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"files.requests: {path} cannot be read: permission denied")
    return str(path)


def kafka(config: JobConfig) -> str:
    """A broker that answers."""
    check_reachable(config.kafka)
    return config.kafka.bootstrap_servers


def transactions(config: JobConfig) -> str:
    """Exactly-once transactions, which the broker must let last long enough."""
    unread = check_transaction_timeout(config.kafka)
    timeout = f"{config.kafka.transaction_timeout_ms} ms"
    return f"not checked: {unread}" if unread else timeout


def topics(config: JobConfig) -> str:
    """The job's topics, which must exist and take what is written to them."""
    why = beyond_this_client(config.kafka)
    if why is not None:
        return f"not checked: {why}"
    wanted = list(dict.fromkeys([*config.topics.requests, *config.topics.written().values()]))
    there = topics_there(config.kafka)
    missing = [name for name in wanted if name not in there]
    if missing:
        others = there.difference(wanted)
        near = {name: found for name in missing if (found := nearest(name, others, 0.85))}
        hint = "".join(f"; did you mean {found!r} for {name!r}?" for name, found in near.items())
        options = " ".join(f"--topic {name}" for name in missing)
        raise ConfigError(
            f"topics: {', '.join(missing)} not there: make {'it' if len(missing) == 1 else 'them'}, "
            f"locally by `flink-llm local up {options}`{hint}"
        )
    unread = sizes(config)
    return ", ".join(wanted) + (f" (sizes not checked: {unread})" if unread else "")


def sizes(config: JobConfig) -> str | None:
    """What the operator lets through must also be what the topics take: a refusal restarts the job for ever.

    None, or why that is not known. Failures are small enough for any topic unless they keep the payload.
    """
    keys = {name: key for key, name in config.topics.written().items() if key != "failures"}
    if config.operator.keep_payload:
        keys.setdefault(config.topics.failures, "failures")
    limits, unread = topic_limits(config.kafka, list(keys))
    largest = config.operator.max_result_bytes
    for name, limit in limits.items():
        if largest > limit - REQUEST_ROOM:
            raise ConfigError(
                f"operator.max_result_bytes is {largest}, {TOPIC_SIZE} of topic {name} (topics.{keys[name]}) is "
                f"{limit}: raise the latter to {largest + REQUEST_ROOM} at least, or lower the former"
            )
    return unread


def served(config: JobConfig) -> dict[str, str]:
    """The folders and deployment files that the library's own host reads; another launcher knows its models."""
    return config.models if config.host.launcher == HostSettings().launcher else {}


def adapter_of(config: JobConfig, name: str) -> str:
    """The adapter that the job asks of one of its models, "" for none."""
    return config.chat.adapter if name == config.chat.model else ""


def model(path: str, adapter: str = "") -> str:
    """A model folder, or those of a deployment file, compared with their manifests; each has the `adapter`."""
    from flink_llm.local.models import versions

    found = []
    for version, opened in versions(path):
        manifest = opened.manifest
        if adapter and adapter not in manifest.adapters:
            raise ConfigError(unknown(f"chat.adapter: {version.folder}", adapter, manifest.adapters))
        found.append(f"{manifest.architecture}, {manifest.precision}, {opened.sha256[:12]} in {version.folder}")
    return "; ".join(found)


def traces(telemetry: TelemetrySettings) -> str:
    """Whether spans can be sent from here: the workers need the same."""
    tracing.check(telemetry)
    return f"sent to {telemetry.traces}"


def features(config: JobConfig) -> str:
    """The feature repository, which must be applied, and hold what `chat.features` names."""
    from flink_llm.feature_admin import describe

    if config.features is None:
        return "none"
    report = describe(config.features)
    if report.problems:
        raise LocalError(f"{report.problems[0]}; `flink-llm features apply CONFIG` registers the definitions")
    names = [*(view.name for view in report.views), *report.services]
    if config.chat.features is not None and config.chat.features not in names:
        raise ConfigError(unknown("chat.features", config.chat.features, names))
    return f"{report.online_store}: {', '.join(view.name for view in report.views)}"
