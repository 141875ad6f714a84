"""A job's configuration: one YAML file, checked as a whole before anything starts.

Unknown keys are refused with the nearest known one. `${NAME}` in a value stands for an environment
variable and `${file:PATH}` for a file's content, which is where secrets belong; `$${` is a plain `${`.
Paths are relative to the file.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from flink_llm import config_file
from flink_llm.breakers import BreakerSettings
from flink_llm.call import OperatorSettings
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.errors import ConfigError
from flink_llm.feature_settings import FeatureSettings
from flink_llm.fitting import fitted
from flink_llm.flink_settings import FlinkSettings
from flink_llm.kafka_settings import PATHS, KafkaSettings, addresses, check_properties
from flink_llm.names import check_model, check_topic, unknown
from flink_llm.secrets import masked
from flink_llm.telemetry_settings import TelemetrySettings

Name = Annotated[str, Meta(min_length=1)]
REQUEST_SIZE, REQUEST_BYTES, REQUEST_ROOM = "max.request.size", 1_048_576, 16_384
"""The producer's own limit, its default, and how much of a request is not the record."""
ASK_A_MODEL = ("llm_inference", "embedding")
"""The jobs of the library whose model is `chat.model`."""


NAMED_TWICE = {
    "parallelism.default": "flink.parallelism",
    "pipeline.max-parallelism": "flink.max_parallelism",
    "execution.checkpointing.interval": "flink.checkpoint_interval_ms",
    "execution.checkpointing.mode": "flink.delivery",
}
"""Options of Flink that have a key of ours: a file says each thing in one place."""


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a configuration: unknown keys are refused."""


class Topics(Section, frozen=True, kw_only=True):
    """Topic names. A request's `reply_to` may name one of `reply_to`, else the response goes to `responses`.

    `tokens` null writes none: an embedding has no tokens.
    """

    requests: Annotated[list[str], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["chat.requests"])
    responses: str = "chat.responses"
    tokens: str | None = "chat.tokens"
    failures: str = "chat.failures"
    reply_to: list[str] = []

    def written(self) -> dict[str, str]:
        """Key → topic of all that is written."""
        replies = {f"reply_to[{number}]": name for number, name in enumerate(self.reply_to)}
        tokens = {} if self.tokens is None else {"tokens": self.tokens}
        return {"responses": self.responses, **tokens, "failures": self.failures, **replies}


class Files(Section, frozen=True, kw_only=True):
    """Without Kafka: requests are the lines of `requests`, outcomes are written below `outcomes`."""

    requests: Name
    outcomes: Name


class Operator(Section, frozen=True, kw_only=True):
    """How records are run; see `flink_llm.call.OperatorSettings`."""

    key: Name = "session_id"
    capacity: Annotated[int, Meta(ge=1, le=100_000)] = 256
    deadline: Annotated[float, Meta(gt=0)] | None = 60.0
    ordered: bool = False
    on_outage: Literal["wait", "deadline"] = "wait"
    retries: Annotated[int, Meta(ge=0)] = 4
    shed: bool = False
    remember_s: Annotated[float, Meta(ge=0, le=31_622_400)] = 600.0  # a year
    max_result_bytes: Annotated[int, Meta(ge=1)] = 1_000_000
    keep_payload: bool = False


class Chat(Section, frozen=True, kw_only=True):
    """How a chat request becomes a reply.

    `model` is one of `models`, `adapter` one of its LoRA adapters, "" for none; `features` a Feast view or
    service. `entities` finds join keys in the last message: name → regular expression with one group. `mask`
    names what the reply must not show. `max_characters` is the most that a request's messages may have
    together; a reply is bounded by `max_tokens` only, whatever characters those are.
    """

    model: str = "support-chat"
    adapter: str = ""
    features: str | None = None
    entities: dict[str, str] = {}
    system: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=32_768)] = 128
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    max_characters: Annotated[int, Meta(ge=1)] = 100_000
    mask: list[Literal["email", "card"]] = msgspec.field(default_factory=lambda: ["email", "card"])


class JobConfig(Section, frozen=True, kw_only=True):
    """The whole of a job. `job` is the name of an installed job, `name` this one's, unique per cluster."""

    job: Name
    name: Name
    kafka: KafkaSettings = KafkaSettings()
    topics: Topics = Topics()
    files: Files | None = None
    flink: FlinkSettings = FlinkSettings()
    operator: Operator = Operator()
    models: dict[str, str] = {}
    host: HostSettings = HostSettings()
    features: FeatureSettings | None = None
    breaker: BreakerSettings = BreakerSettings()
    chat: Chat = Chat()
    telemetry: TelemetrySettings = TelemetrySettings()

    def __repr__(self) -> str:
        return f"JobConfig({masked(msgspec.to_builtins(self))})"

    def operator_settings(self) -> OperatorSettings:
        """What the operator is told."""
        chosen = {name: getattr(self.operator, name) for name in Operator.__struct_fields__ if name != "key"}
        return OperatorSettings(
            job=self.name,
            shards=self.flink.shards,
            max_parallelism=self.flink.max_parallelism,
            reply_topics=[self.topics.responses, *self.topics.reply_to],
            telemetry=self.telemetry,
            **chosen,
        )


def load(path: str | Path, environ: Mapping[str, str] = os.environ, *, strict: bool = True) -> JobConfig:
    """Reads and checks a file. Raises ConfigError, one line naming the key.

    Not `strict`, a value that needs an environment variable or a file which is not there is left out.
    """
    path = Path(path)
    folder = path.absolute().parent
    return parse(config_file.resolve(config_file.read(path), folder, environ, strict=strict), folder)


def parse(raw: dict[str, Any], folder: Path) -> JobConfig:
    """A checked configuration of plain values; paths are taken relative to `folder`. Raises ConfigError."""
    config = fitted(raw, JobConfig, "configuration")
    _check_topics(config.topics)
    _check_chat(config)
    _check_flink(config.flink)
    _check_sizes(config)
    addresses(config.kafka)
    check_properties(config.kafka)
    resolve_device(config.host.device)
    _check_host(config)
    for name in config.models:
        check_model("models", name)
    return _placed(config, folder)


def _check_topics(topics: Topics) -> None:
    kinds: dict[str, str] = {}
    for number, name in enumerate(topics.requests):
        check_topic(f"topics.requests[{number}]", name)
    for key, name in topics.written().items():
        check_topic(f"topics.{key}", name)
        if name in topics.requests:
            raise ConfigError(f"topics.{key} is {name!r}, a topic of requests: the job would read what it writes")
        other = kinds.setdefault(name, key)
        if {other, key} & {"tokens", "failures"} and other != key:
            raise ConfigError(f"topics.{key} is {name!r}, as topics.{other} is: no reader could tell the two apart")


def _check_chat(config: JobConfig) -> None:
    chat = config.chat
    if config.job in ASK_A_MODEL and chat.model not in config.models:
        raise ConfigError(unknown("chat.model", chat.model, config.models))
    if chat.features is not None and config.features is None:
        raise ConfigError(f"chat.features is {chat.features!r}: name the Feast repository in features.repo")
    for name, pattern in chat.entities.items():
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ConfigError(f"chat.entities.{name} is not a regular expression: {error}") from error
        if groups != 1:
            raise ConfigError(f"chat.entities.{name} must have one group, it has {groups}")


def _check_flink(flink: FlinkSettings) -> None:
    highest = flink.max_parallelism
    if flink.parallelism > highest:
        raise ConfigError(f"flink.parallelism is {flink.parallelism}, more than flink.max_parallelism {highest}")
    if highest % flink.shards:
        raise ConfigError(f"flink.max_parallelism is {highest}, which is no multiple of flink.shards {flink.shards}")
    if flink.parallelism > flink.shards:
        raise ConfigError(
            f"flink.parallelism is {flink.parallelism}, more than flink.shards {flink.shards}: the other subtasks "
            f"would have nothing to do; about 4 shards for each subtask you will ever run are right"
        )
    for name, key in NAMED_TWICE.items():
        if name in flink.properties:
            raise ConfigError(f"flink.properties.{name}: say {key} instead")


def _check_host(config: JobConfig) -> None:
    host, capacity = config.host, config.operator.capacity
    if host.engine == "embedded" and host.metrics_port is not None:
        raise ConfigError("host.metrics_port: it is a host that serves metrics, and host.engine is embedded")
    if config.job in ASK_A_MODEL and capacity > host.slots + host.queue:
        raise ConfigError(
            f"operator.capacity is {capacity}, more calls than host.slots {host.slots} and host.queue {host.queue} "
            f"take: the host would refuse the others again and again; lower the first or raise the last"
        )


def _check_sizes(config: JobConfig) -> None:
    """What the operator lets through must also be what Kafka's producer takes: its refusal restarts the job."""
    asked = config.kafka.properties.get(REQUEST_SIZE, str(REQUEST_BYTES))
    if not asked.isdecimal() or config.operator.max_result_bytes > int(asked) - REQUEST_ROOM:
        raise ConfigError(
            f"operator.max_result_bytes is {config.operator.max_result_bytes}, kafka.properties.{REQUEST_SIZE} "
            f"{asked}: the latter must be {REQUEST_ROOM} bytes more at least"
        )


def _placed(config: JobConfig, folder: Path) -> JobConfig:
    """The configuration with its paths made absolute; a URL is none."""

    def place(path: str | None) -> str | None:
        return path if path is None or "://" in path else str((folder / path).resolve())

    def put(section: Any, *names: str) -> Any:
        return msgspec.structs.replace(section, **{name: place(getattr(section, name)) for name in names})

    changes = {
        # A link stays one: a deployment file may be exchanged by it, and its path is what its work is found by.
        "models": {
            name: path if "://" in path else os.path.abspath(folder / path) for name, path in config.models.items()
        },
        "flink": put(config.flink, "checkpoint_dir"),
        "host": put(config.host, "socket_dir"),
    }
    if config.telemetry.logs == "json":
        changes["host"] = msgspec.structs.replace(changes["host"], logs="json")
    if config.features is not None:
        changes["features"] = put(config.features, "repo", "state")
    if config.files is not None:
        changes["files"] = put(config.files, "requests", "outcomes")
    properties = config.kafka.properties
    stores = {name: place(properties[name]) for name in PATHS if name in properties}
    changes["kafka"] = msgspec.structs.replace(config.kafka, properties={**properties, **stores})
    return msgspec.structs.replace(config, **changes)
