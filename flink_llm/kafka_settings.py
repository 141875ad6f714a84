"""How to reach Kafka. No Flink here, so that a doctor or a benchmark may use it too."""

import contextlib
import logging
import re
import socket
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from flink_llm.errors import ConfigError

log = logging.getLogger(__name__)

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


def check_reachable(settings: KafkaSettings) -> None:
    """Raises ConfigError when nothing listens at any of the bootstrap servers."""
    for server in settings.bootstrap_servers.split(","):
        host, _, port = server.strip().rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"kafka.bootstrap_servers: {server!r} is not HOST:PORT")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), PROBE_MS / 1000):
            return
    raise ConfigError(
        f"kafka.bootstrap_servers: no broker answers at {settings.bootstrap_servers}; "
        f"start one with `flink-llm local up`, or correct the address"
    )


def check_transaction_timeout(settings: KafkaSettings) -> None:
    """Raises ConfigError when the broker would refuse the transactions.

    Where its configuration cannot be read from here (another network, a keystore, no permission) that is
    a warning: the job may well be able to run.
    """
    try:
        limit = _transaction_limit(settings)
    except Exception as error:  # a client of its own, with less of the security settings than Flink's
        log.warning("the broker's %s could not be read from here: %s: %s", _MAXIMUM, type(error).__name__, error)
        return
    if limit is not None and settings.transaction_timeout_ms > limit:
        raise ConfigError(
            f"kafka.transaction_timeout_ms is {settings.transaction_timeout_ms}, the broker's "
            f"{_MAXIMUM} is {limit}: lower the first or raise the second"
        )


def _transaction_limit(settings: KafkaSettings) -> int | None:
    from kafka import KafkaAdminClient  # slow to import
    from kafka.admin import ConfigResource, ConfigResourceType

    admin = KafkaAdminClient(**client_options(settings), request_timeout_ms=PROBE_MS)
    try:
        broker = str(admin.describe_cluster()["brokers"][0]["broker_id"])
        wanted = [ConfigResource(ConfigResourceType.BROKER, broker)]
        found = admin.describe_configs(wanted, config_filter="all")["broker"][broker]
    finally:
        admin.close()
    return int(found[_MAXIMUM]["value"]) if _MAXIMUM in found else None
