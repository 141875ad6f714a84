"""A job's configuration: one YAML file, checked as a whole before anything starts.

Unknown keys are refused with the nearest known one. `${NAME}` in a value stands for an environment
variable and `${file:PATH}` for a file's content, which is where secrets belong. Paths are relative to
the file.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from flink_llm.call import OperatorSettings
from flink_llm.engine.settings import HostSettings
from flink_llm.errors import ConfigError
from flink_llm.feature_settings import FeatureSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.kafka_settings import KafkaSettings, masked
from flink_llm.names import unknown

_REFERENCE = re.compile(r"\$\{(file:)?([^}]*)\}")


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a configuration: unknown keys are refused."""


class Topics(Section, frozen=True, kw_only=True):
    """Topic names. A request's `reply_to` may name one of `reply_to`, else the response goes to `responses`."""

    requests: list[str] = msgspec.field(default_factory=lambda: ["chat.requests"])
    responses: str = "chat.responses"
    tokens: str = "chat.tokens"
    failures: str = "chat.failures"
    reply_to: list[str] = []


class Files(Section, frozen=True, kw_only=True):
    """Without Kafka: requests are the lines of `requests`, outcomes are written below `outcomes`."""

    requests: str
    outcomes: str


class Operator(Section, frozen=True, kw_only=True):
    """How records are run; see `flink_llm.call.OperatorSettings`."""

    key: str = "session_id"
    capacity: Annotated[int, Meta(ge=1, le=100_000)] = 256
    deadline: Annotated[float, Meta(gt=0)] | None = 60.0
    ordered: bool = False
    on_outage: Literal["wait", "deadline"] = "wait"
    remember_s: Annotated[float, Meta(ge=0)] = 600.0
    max_result_bytes: Annotated[int, Meta(ge=1)] = 1_000_000
    keep_payload: bool = False


class Chat(Section, frozen=True, kw_only=True):
    """How a chat request becomes a reply.

    `model` is one of `models`; `features` a Feast view or service. `entities` finds join keys in the
    last message: name → regular expression with one group. `mask` names what the reply must not show.
    """

    model: str = "support-chat"
    features: str | None = None
    entities: dict[str, str] = {}
    system: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=32_768)] = 128
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    max_characters: Annotated[int, Meta(ge=1)] = 100_000
    mask: list[Literal["email", "card"]] = msgspec.field(default_factory=lambda: ["email", "card"])


class JobConfig(Section, frozen=True, kw_only=True):
    """The whole of a job. `job` is the name of an installed job, `name` this one's, unique per cluster."""

    job: str
    name: str
    kafka: KafkaSettings = KafkaSettings()
    topics: Topics = Topics()
    files: Files | None = None
    flink: FlinkSettings = FlinkSettings()
    operator: Operator = Operator()
    models: dict[str, str] = {}
    host: HostSettings = HostSettings()
    features: FeatureSettings | None = None
    chat: Chat = Chat()

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
            **chosen,
        )


def load(path: str | Path, environ: Mapping[str, str] = os.environ) -> JobConfig:
    """Reads and checks a file. Raises ConfigError, one line naming the key."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a configuration is a mapping with at least `job` and `name`")
    return parse(_resolved(raw, environ, ""), path.absolute().parent)


def parse(raw: dict[str, Any], folder: Path) -> JobConfig:
    """A checked configuration of plain values; paths are taken relative to `folder`. Raises ConfigError."""
    try:
        config = msgspec.convert(raw, JobConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(_explained(str(error))) from error
    if config.chat.model not in config.models and config.job == "llm_inference":
        raise ConfigError(unknown("chat.model", config.chat.model, config.models))
    if config.chat.features is not None and config.features is None:
        raise ConfigError(f"chat.features is {config.chat.features!r}: name the Feast repository in features.repo")
    for name, pattern in config.chat.entities.items():
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ConfigError(f"chat.entities.{name} is not a regular expression: {error}") from error
        if groups != 1:
            raise ConfigError(f"chat.entities.{name} must have one group, it has {groups}")
    return _placed(config, folder)


def _placed(config: JobConfig, folder: Path) -> JobConfig:
    def place(path: str | None) -> str | None:
        return None if path is None else str((folder / path).resolve())

    models = {name: str((folder / path).resolve()) for name, path in config.models.items()}
    changes: dict[str, Any] = {"models": models}
    if config.features is not None:
        repo, state = place(config.features.repo) or "", place(config.features.state)
        changes["features"] = msgspec.structs.replace(config.features, repo=repo, state=state)
    if config.files is not None:
        requests, outcomes = place(config.files.requests) or "", place(config.files.outcomes) or ""
        changes["files"] = Files(requests=requests, outcomes=outcomes)
    return msgspec.structs.replace(config, **changes)


def _resolved(value: Any, environ: Mapping[str, str], where: str) -> Any:
    if isinstance(value, dict):
        return {str(name): _resolved(item, environ, f"{where}{name}.") for name, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, environ, where) for item in value]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        name = found[2]
        if found[1]:
            try:
                return Path(name).read_text().strip()
            except OSError as error:
                raise ConfigError(f"{where[:-1]}: {name}: {error.strerror or error}") from error
        if name not in environ:
            raise ConfigError(f"{where[:-1]}: the environment variable {name} is not set")
        return environ[name]

    return _REFERENCE.sub(replace, value)


def _explained(message: str) -> str:
    """msgspec's message with the key first, and for an unknown key the nearest known one."""
    text, _, path = message.partition(" - at `$")
    where = path.rstrip("`").lstrip(".")
    surplus = re.fullmatch(r"Object contains unknown field `(.*)`", text)
    if surplus is None:
        return f"{where or 'configuration'}: {text}"
    return unknown(where or "configuration", surplus[1], _keys_at(where))


def _keys_at(where: str) -> list[str]:
    """The keys a section may have."""
    found: Any = JobConfig
    for part in [part for part in re.split(r"[.\[]", where) if part]:
        fields = {field.name: field.type for field in msgspec.structs.fields(found)}
        found = fields.get(part)
        options = [found, *getattr(found, "__args__", ())]
        found = next((option for option in options if isinstance(option, type) and issubclass(option, Struct)), None)
        if found is None:
            return []
    return [field.name for field in msgspec.structs.fields(found)]
