"""Everything a job needs, checked one by one: what is there, and what to do about the rest."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flink_llm.config import JobConfig, load
from flink_llm.engine.settings import HostSettings
from flink_llm.errors import ConfigError, FlinkLlmError
from flink_llm.local import checks
from flink_llm.local.broker import Broker
from flink_llm.local.demo_job import shipped
from flink_llm.secrets import masked

log = logging.getLogger(__name__)
STANDS_ON = {"topics": "Kafka", "transactions": "Kafka"}
"""Check → the one without which it is not made."""


def examine(config: Path | None, state: Path) -> bool:
    """Prints a line for each check; whether all of them passed."""
    console = Console()
    failed = set()

    def say(mark: str, name: str, text: str) -> None:
        line = " ".join(text.split())
        console.print(f"{mark} {name}: {escape(line)}", highlight=False, soft_wrap=True)

    settings: JobConfig | None = None
    try:
        settings = load(config) if config is not None else None
    except ConfigError as error:
        failed.add("configuration")
        say("[red]✗[/]", "configuration", str(error))
    for name, check in _checks(settings, None if config is not None else state):
        if STANDS_ON.get(name) in failed:
            say("[yellow]–[/]", name, f"not checked without {STANDS_ON[name]}")
            continue
        try:
            say("[green]✓[/]", name, check())
        except Exception as error:  # a check may fail in a foreign way, and the others are made all the same
            log.info("%s", name, exc_info=True)
            failed.add(name)
            own = isinstance(error, FlinkLlmError)
            say("[red]✗[/]", name, str(error) if own else masked(f"{type(error).__name__}: {error}"))
    return not failed


def _checks(settings: JobConfig | None, state: Path | None) -> Iterator[tuple[str, Callable[[], str]]]:
    """The checks of this machine, then those of a job, or of the local stack in `state`."""
    yield "Python", checks.python
    yield "Java", checks.java
    yield "Maven", checks.maven
    yield "Flink and its Kafka connector", checks.connector
    yield "ONNX Runtime", checks.onnxruntime
    yield "kernels", checks.kernels
    yield "GPU", partial(checks.gpu, settings.host if settings else HostSettings())
    if state is not None:
        yield "local broker", partial(_local_broker, state)
        yield "demo model", lambda: checks.model(str(shipped("models") / "support-chat"))
    if settings is None:
        return
    yield "job", lambda: checks.job(settings.job).__name__
    yield "slots", partial(checks.slots, settings)
    if settings.files is not None:
        yield "requests", partial(checks.requests, settings)
    else:
        yield "Kafka", partial(checks.kafka, settings)
        yield "topics", partial(checks.topics, settings)
        if settings.flink.delivery == "exactly_once":
            yield "transactions", partial(checks.transactions, settings)
    for name, folder in checks.served(settings).items():
        yield f"model {name}", partial(checks.model, folder, checks.adapter_of(settings, name))
    if settings.features is not None:
        yield "features", partial(checks.features, settings)
    if settings.telemetry.traces is not None:
        yield "traces", partial(checks.traces, settings.telemetry)


def _local_broker(state: Path) -> str:
    broker = Broker(state)
    if broker.process is None:
        return "down; `flink-llm local up` starts one"
    return f"up at {broker.bootstrap_servers}"
