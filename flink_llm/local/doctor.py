"""Everything a job needs, checked one by one: what is there, and what to do about the rest."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flink_llm.config import JobConfig, load
from flink_llm.errors import ConfigError, FlinkLlmError
from flink_llm.local import jars
from flink_llm.local.broker import Broker
from flink_llm.local.demo import shipped

OLDEST_JAVA = 11


def examine(config: Path | None, state: Path) -> bool:
    """Prints a line for each check; whether all of them passed."""
    console = Console()
    good = True
    settings: JobConfig | None = None
    if config is not None:
        try:
            settings = load(config)
        except ConfigError as error:
            console.print(f"[red]✗[/] configuration: {escape(str(error))}")
            return False
    for name, check in _checks(settings, state):
        try:
            console.print(f"[green]✓[/] {name}: {escape(check())}", highlight=False)
        except FlinkLlmError as error:
            good = False
            console.print(f"[red]✗[/] {name}: {escape(str(error))}", highlight=False)
    return good


def _checks(settings: JobConfig | None, state: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "Python", _python
    yield "Java", _java
    yield "Maven", lambda: jars.program("mvn")
    yield "Flink and its Kafka connector", _connector
    yield "ONNX Runtime", _onnxruntime
    yield "GPU", _gpu
    if settings is None:
        yield "local broker", lambda: _local_broker(state)
        yield "demo model", lambda: _model(str(shipped("models") / "support-chat"))
        return
    if settings.files is None:
        yield "Kafka", lambda: _kafka(settings)
        yield "topics", lambda: _topics(settings)
    for name, folder in settings.models.items():
        yield f"model {name}", partial(_model, folder)
    if settings.features is not None:
        yield "features", lambda: _features(settings)


def _python() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        raise ConfigError(f"this is Python {version}: use 3.11 or 3.12")
    return f"{version} at {sys.executable}"


def _java() -> str:
    path = jars.program("java")
    said = subprocess.run([path, "-version"], capture_output=True, text=True).stderr
    found = re.search(r'version "(\d+)', said)
    if found is None or int(found[1]) < OLDEST_JAVA:
        raise ConfigError(f"{path} is too old: {jars.INSTALL['java']}")
    return f"{found[1]} at {path}"


def _connector() -> str:
    flink = importlib.metadata.version("apache-flink")
    jar = jars.connector_jar()
    return f"Flink {flink}, {jar.name}"


def _onnxruntime() -> str:
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if not found:
        raise ConfigError("it is not installed: pip install 'flink-llm[cpu]' (or [gpu])")
    if len(found) == 2:
        raise ConfigError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall both, then install one"
        )
    return f"{found[0]} {importlib.metadata.version(found[0])}"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none; models run on the CPU"
    names = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    listed = ", ".join(names.stdout.split("\n")).strip(", ")
    if not _installed("onnxruntime-gpu"):
        raise ConfigError(f"{listed} is here, ONNX Runtime is the CPU's: install flink-llm[gpu] instead of [cpu]")
    return f"{listed}; CUDA_VISIBLE_DEVICES={visible or 'unset: host.device auto means the CPU'}"


def _local_broker(state: Path) -> str:
    broker = Broker(state)
    if broker.process is None:
        return "down; `flink-llm local up` starts one"
    return f"up at {broker.bootstrap_servers}"


def _kafka(settings: JobConfig) -> str:
    from flink_llm.kafka_settings import check_reachable, check_transaction_timeout

    check_reachable(settings.kafka)
    check_transaction_timeout(settings.kafka)
    return f"{settings.kafka.bootstrap_servers}, transactions of {settings.kafka.transaction_timeout_ms} ms"


def _topics(settings: JobConfig) -> str:
    from kafka import KafkaAdminClient

    from flink_llm.kafka_settings import client_options

    topics = settings.topics
    wanted = [*topics.requests, topics.responses, topics.tokens, topics.failures, *topics.reply_to]
    admin = KafkaAdminClient(**client_options(settings.kafka))
    try:
        missing = sorted(set(wanted) - set(admin.list_topics()))
    finally:
        admin.close()
    if missing:
        options = " ".join(f"--topic {name}" for name in missing)
        raise ConfigError(f"{', '.join(missing)} do not exist: make them, locally by `flink-llm local up {options}`")
    return ", ".join(wanted)


def _model(folder: str) -> str:
    from flink_llm.engine.model import open_model_folder

    opened = open_model_folder(folder)
    manifest = opened.manifest
    return f"{manifest.architecture}, {manifest.precision}, {opened.sha256[:12]} in {folder}"


def _features(settings: JobConfig) -> str:
    from flink_llm.feature_admin import describe

    if settings.features is None:
        return "none"
    report = describe(settings.features)
    if report.problems:
        raise ConfigError(f"{report.problems[0]}; `flink-llm features apply CONFIG` registers the definitions")
    return f"{report.online_store}: {', '.join(view.name for view in report.views)}"
