"""How to reach Kafka. No Flink here, so that a doctor or a benchmark may use it too."""

import contextlib
import logging
import re
import socket
import ssl
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from flink_llm.errors import ConfigError
from flink_llm.names import unknown
from flink_llm.secrets import masked

log = logging.getLogger(__name__)

PROBE_MS = 10_000
DEFAULT_GROUP = "flink-llm"
PATHS = ("ssl.truststore.location", "ssl.keystore.location")
"""Properties that are paths on this machine, relative to the configuration file."""

TOPIC_SIZE = "max.message.bytes"
_MAXIMUM = "transaction.max.timeout.ms"
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_NAMED_TWICE = {
    "bootstrap.servers": "kafka.bootstrap_servers",
    "group.id": "kafka.group",
    "transaction.timeout.ms": "kafka.transaction_timeout_ms",
    "transactional.id": "name (of kafka.sink: transactions)",
}


class KafkaSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`properties` are passed through to Flink's connector as they are, security among them; see `check_properties`.

    `group` is by default the job's name, in a job of a configuration, and else `DEFAULT_GROUP`.

    `transaction_timeout_ms` bounds how long a job may be down, in exactly-once delivery, before the
    broker drops what it had not committed; it must not exceed the broker's own maximum. A job that was down
    for longer does not go on unless `resume_after_timeout` says that it shall, at the price of what was dropped.
    """

    bootstrap_servers: str = "127.0.0.1:9092"
    group: str | None = None
    properties: dict[str, str] = {}
    transaction_timeout_ms: Annotated[int, Meta(ge=1_000)] = 600_000
    resume_after_timeout: bool = False

    def __repr__(self) -> str:
        return f"KafkaSettings({masked(msgspec.to_builtins(self))})"


def addresses(settings: KafkaSettings) -> list[tuple[str, int]]:
    """The bootstrap servers as host and port. Raises ConfigError."""
    found = []
    for server in settings.bootstrap_servers.split(","):
        match = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})", server.strip())
        if match is None or not 0 < int(match[2]) < 65_536:
            raise ConfigError(f"kafka.bootstrap_servers: {masked(server)!r} is not HOST:PORT")
        found.append((match[1].strip("[]"), int(match[2])))
    return found


def check_properties(settings: KafkaSettings) -> None:
    """Raises ConfigError for a property that would go unheard; the values of others are Flink's client's to judge."""
    given = settings.properties
    for name, key in _NAMED_TWICE.items():
        if name in given:
            raise ConfigError(f"kafka.properties.{name}: say {key} instead")
    protocol = given.get("security.protocol", "PLAINTEXT")
    if protocol.strip().upper() not in _PROTOCOLS:
        raise ConfigError(
            unknown("kafka.properties.security.protocol", protocol, _PROTOCOLS)
        )  # Python's takes it for none


def beyond_this_client(settings: KafkaSettings) -> str | None:
    """Why Flink's client may reach this cluster and the one used from here cannot; None when it can."""
    given = settings.properties
    for store in ("truststore", "keystore"):
        kind = given.get(f"ssl.{store}.type", "JKS").upper()
        if f"ssl.{store}.location" in given and kind != "PEM":
            return f"a {store} of type {kind} is read by Java only"
    if given.get("security.protocol", "").upper().startswith("SASL_"):
        mechanism = given.get("sasl.mechanism", "GSSAPI")
        if mechanism not in _MECHANISMS or "sasl.client.callback.handler.class" in given:
            return f"sasl.mechanism {mechanism} is spoken by Java only"
        if not {"sasl_plain_username", "sasl_plain_password"} <= set(_login(given)):
            return "sasl.jaas.config names no username and password"
    return None


def client_options(settings: KafkaSettings) -> dict[str, Any]:
    """Options of a kafka-python client for the same cluster: what of `properties` it understands.

    See `beyond_this_client` for what it does not. Raises ConfigError for a certificate that cannot be read.
    """
    given = settings.properties
    servers = [server.strip() for server in settings.bootstrap_servers.split(",")]
    options: dict[str, Any] = {"bootstrap_servers": servers, **_login(given)}
    for name in ("security.protocol", "sasl.mechanism"):
        if name in given:
            options[name.replace(".", "_")] = given[name].strip().upper()
    if given.get("security.protocol", "").upper().endswith("SSL"):
        options["ssl_context"] = _ssl_context(given)
    return options


def _login(given: Mapping[str, str]) -> dict[str, str]:
    options = {}
    for name in ("username", "password"):
        quoted = r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
        found = re.search(rf"\b{name}\s*=\s*{quoted}", given.get("sasl.jaas.config", ""))
        if found:
            options[f"sasl_plain_{name}"] = re.sub(r"\\(.)", r"\1", found[1][1:-1])
    return options


def _ssl_context(given: Mapping[str, str]) -> ssl.SSLContext:
    """PEM certificates as Flink's client takes them: in files, or in the properties themselves."""
    try:
        context = ssl.create_default_context(
            cafile=given.get("ssl.truststore.location"), cadata=given.get("ssl.truststore.certificates")
        )
        with _own_certificate(given) as path:
            if path is not None:
                context.load_cert_chain(path, password=given.get("ssl.key.password", ""))
    except (OSError, ValueError) as error:  # what `ssl` raises is an OSError too
        raise ConfigError(f"kafka.properties.ssl: the certificates cannot be read: {error}") from error
    if given.get("ssl.endpoint.identification.algorithm") == "":
        context.check_hostname = False
    return context


@contextlib.contextmanager
def _own_certificate(given: Mapping[str, str]) -> Iterator[str | None]:
    if "ssl.keystore.key" not in given:
        yield given.get("ssl.keystore.location")
        return
    with tempfile.NamedTemporaryFile("w") as file:  # Python reads a key from a file only; this one is private
        file.write(given["ssl.keystore.key"] + "\n" + given.get("ssl.keystore.certificate.chain", ""))
        file.flush()
        yield file.name


def check_reachable(settings: KafkaSettings) -> None:
    """Raises ConfigError when nothing listens at any of the bootstrap servers."""
    for address in addresses(settings):
        with contextlib.suppress(OSError), socket.create_connection(address, PROBE_MS / 1000):
            return
    raise ConfigError(
        f"kafka.bootstrap_servers: no broker answers at {settings.bootstrap_servers}; "
        f"start one with `flink-llm local up`, or correct the address"
    )


def topics_there(settings: KafkaSettings) -> set[str]:
    """The topics that the cluster shows. Raises ConfigError when it cannot be asked."""
    from kafka import KafkaAdminClient  # slow to import
    from kafka.errors import KafkaError

    try:
        admin = KafkaAdminClient(**client_options(settings), request_timeout_ms=PROBE_MS, bootstrap_timeout_ms=PROBE_MS)
        try:
            return set(admin.list_topics())
        finally:
            admin.close()
    except KafkaError as error:
        raise ConfigError(f"kafka: {settings.bootstrap_servers} cannot be asked: {reason(error)}") from error


def reason(error: Exception) -> str:
    """A Kafka error's own message: the broker's where there is one, without number, class and request."""
    told = (error.args or (None,))[0] or getattr(error, "message", None) or type(error).__name__
    text = " ".join(str(told).split())
    said = re.search(r"""error_message=(["'])(.+?)\1[,)]""", text)
    return said[2] if said else text


def check_transaction_timeout(settings: KafkaSettings) -> str | None:
    """Raises ConfigError when the broker would refuse the transactions; else None, or why that is not known."""
    limits, unread = _limits(settings, _MAXIMUM)
    for limit in limits.values():
        if settings.transaction_timeout_ms > limit:
            raise ConfigError(
                f"kafka.transaction_timeout_ms is {settings.transaction_timeout_ms}, the broker's "
                f"{_MAXIMUM} is {limit}: lower the first or raise the second"
            )
    return unread


def topic_limits(settings: KafkaSettings, topics: Sequence[str]) -> tuple[dict[str, int], str | None]:
    """Topic → bytes of the largest batch that it takes; and why, where that is not known of all of them."""
    return _limits(settings, TOPIC_SIZE, topics)


def _limits(settings: KafkaSettings, name: str, topics: Sequence[str] = ()) -> tuple[dict[str, int], str | None]:
    """A setting of each topic, or of a broker without any; and why, where it is not known.

    Where it cannot be read from here (another network, a keystore, no permission) that is a warning: the
    job may well be able to run.
    """
    found: dict[str, int] = {}
    why = beyond_this_client(settings)
    if why is None:
        try:
            found = _read_limits(settings, name, topics)
        except Exception as error:  # a client of its own, with less of the security settings than Flink's
            why = f"{type(error).__name__}: {reason(error)}"
        else:
            why = None if len(found) == max(1, len(topics)) else "the broker does not show it"
    if why is None:
        return found, None
    log.warning("the broker's %s could not be read from here: %s", name, why)
    return found, f"the broker's {name} could not be read: {why}"


def _read_limits(settings: KafkaSettings, name: str, topics: Sequence[str]) -> dict[str, int]:
    from kafka import KafkaAdminClient  # slow to import
    from kafka.admin import ConfigResource, ConfigResourceType

    admin = KafkaAdminClient(**client_options(settings), request_timeout_ms=PROBE_MS, bootstrap_timeout_ms=PROBE_MS)
    try:
        broker = [] if topics else [str(admin.describe_cluster()["brokers"][0]["broker_id"])]
        kind = ConfigResourceType.TOPIC if topics else ConfigResourceType.BROKER
        wanted = [ConfigResource(kind, each) for each in (*topics, *broker)]
        described = admin.describe_configs(wanted, config_filter="all")[kind.name.lower()]
    finally:
        admin.close()
    return {each: int(configs[name]["value"]) for each, configs in described.items() if name in configs}
