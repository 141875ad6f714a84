"""How to reach Kafka. No Flink here, so that a doctor or a benchmark may use it too."""

import re
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from flink_llm.errors import ConfigError

_SECRET = re.compile(
    r"password|secret|jaas|connection_string|(^|[._])token$|(ssl|api|access|private)[._].*key", re.IGNORECASE
)
MASK = "********"
PROBE_MS = 10_000
_MAXIMUM = "transaction.max.timeout.ms"


class KafkaSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`properties` are passed through to Flink's connector as they are, security among them.

    `transaction_timeout_ms` bounds how long a job may be down, in exactly-once delivery, before the
    broker drops what it had not committed; it must not exceed the broker's own maximum.
    """

    bootstrap_servers: str = "127.0.0.1:9092"
    group: str = "flink-llm"
    properties: dict[str, str] = {}
    transaction_timeout_ms: Annotated[int, Meta(ge=1_000)] = 600_000

    def __repr__(self) -> str:
        return f"KafkaSettings({masked(msgspec.to_builtins(self))})"


def masked(value: object) -> object:
    """`value` with every secret replaced, for printing: entries whose name says password, secret, ..."""
    if isinstance(value, dict):
        return {
            name: MASK if isinstance(item, str) and _SECRET.search(str(name)) else masked(item)
            for name, item in value.items()
        }
    return [masked(item) for item in value] if isinstance(value, list) else value


def client_options(settings: KafkaSettings) -> dict[str, object]:
    """Options of a kafka-python client for the same cluster: what of `properties` it understands."""
    options: dict[str, object] = {"bootstrap_servers": settings.bootstrap_servers.split(",")}
    for name in ("security.protocol", "sasl.mechanism"):
        if name in settings.properties:
            options[name.replace(".", "_")] = settings.properties[name]
    jaas = settings.properties.get("sasl.jaas.config", "")
    for name in ("username", "password"):
        found = re.search(rf'{name}="([^"]*)"', jaas)
        if found:
            options[f"sasl_plain_{name}"] = found.group(1)
    return options


def check_transaction_timeout(settings: KafkaSettings) -> None:
    """Raises ConfigError when the broker would refuse the transactions, or is not there."""
    from kafka import KafkaAdminClient  # slow to import
    from kafka.admin import ConfigResource, ConfigResourceType
    from kafka.errors import KafkaError

    try:
        admin = KafkaAdminClient(**client_options(settings), request_timeout_ms=PROBE_MS)
        try:
            broker = str(admin.describe_cluster()["brokers"][0]["broker_id"])
            wanted = [ConfigResource(ConfigResourceType.BROKER, broker)]
            found = admin.describe_configs(wanted, config_filter="all")["broker"][broker]
        finally:
            admin.close()
    except (KafkaError, OSError) as error:
        raise ConfigError(
            f"kafka.bootstrap_servers: no broker answers at {settings.bootstrap_servers} "
            f"({type(error).__name__}); start one with `flink-llm local up`, or correct the address"
        ) from error
    limit = int(found[_MAXIMUM]["value"]) if _MAXIMUM in found else None
    if limit is not None and settings.transaction_timeout_ms > limit:
        raise ConfigError(
            f"kafka.transaction_timeout_ms is {settings.transaction_timeout_ms}, the broker's "
            f"{_MAXIMUM} is {limit}: lower the first or raise the second"
        )
