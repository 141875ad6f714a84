"""A real Kafka broker (KRaft, one node, loopback) in a state folder that survives."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from flink_llm.errors import ConfigError, LocalError
from flink_llm.kafka_settings import reason
from flink_llm.local import jars, processes
from flink_llm.local.cluster import last_words
from flink_llm.names import check_topic

START_S = 60.0
_TOPIC = re.compile(r"([^:]+)(?::([1-9][0-9]{0,3}))?")
TOPICS = ("chat.requests", "chat.tokens", "chat.responses", "chat.failures")
SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={data}
num.partitions=1
auto.create.topics.enable=false
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
log.segment.bytes=67108864
num.network.threads=2
num.io.threads=2
"""


def state_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the local stack keeps its state: `$FLINK_LLM_HOME`, else `.flink-llm` here."""
    return Path(environ.get("FLINK_LLM_HOME") or ".flink-llm").absolute()


class Broker:
    """The broker of one state folder. `up` and `down` may come from different processes.

    `port` is chosen free at the first `up` and kept, unless one is given. `properties` are Kafka's own
    settings; `{port}` and `{controller}` in their values stand for the broker's ports.
    """

    def __init__(self, state: Path, port: int | None = None, properties: Mapping[str, str] | None = None) -> None:
        self._state = state
        self._properties = dict(properties or {})
        self._folder = state / "kafka"
        self._wanted = port
        self._config = self._folder / "server.properties"
        self._pid = self._folder / "broker.json"
        self._log = self._folder / "broker.log"

    @property
    def port(self) -> int:
        """The port clients connect to. Raises LocalError before the first `up`."""
        for line in self._config.read_text().splitlines() if self._config.exists() else []:
            if line.startswith("advertised.listeners="):
                return int(line.rsplit(":", 1)[1])
        raise LocalError("there is no local broker here: run `flink-llm local up`")

    @property
    def bootstrap_servers(self) -> str:
        """What a Kafka client is given."""
        return f"127.0.0.1:{self.port}"

    @property
    def process(self) -> processes.Started | None:
        """The running broker, None when it is down."""
        return processes.recall(self._pid)

    def up(self, topics: Iterable[str] = TOPICS) -> None:
        """Starts the broker if it is down, waits until it answers, makes the topics (`name[:partitions]`).

        Raises LocalError: Java or Maven missing, port in use, up at another port, folder not writable;
        ConfigError: a topic that no broker takes.
        """
        topics = list(topics)
        _partitions(topics)
        with self._locked():
            if self.process is None:
                self._folder.mkdir(exist_ok=True)
                self._start()
        if self._wanted not in (None, self.port):
            raise LocalError(f"the broker is up at port {self.port} already: run `flink-llm local down` first")
        create_topics(self.bootstrap_servers, topics)

    def down(self) -> bool:
        """Stops the broker; whether one was running. Raises LocalError: a folder that cannot be written."""
        if not self._state.exists():
            return False
        with self._locked():
            return self._stop()

    def wipe(self) -> bool:
        """Stops the broker and deletes all it has stored; whether one was running. Raises LocalError."""
        if not self._state.exists():
            return False
        with self._locked():
            was_up = self._stop()
            if self._folder.exists():
                shutil.rmtree(self._folder)
        return was_up

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One command at a time; the lock lies beside the folder, which `wipe` deletes."""
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            with FileLock(self._state / "kafka.lock"):
                yield
        except OSError as error:
            where = error.filename or self._folder
            raise LocalError(f"{where} cannot be written: {error.strerror or error}") from error

    def _stop(self) -> bool:
        started = self.process
        if started is not None:
            processes.stop(started)
        if self._folder.exists():
            self._pid.unlink(missing_ok=True)
        return started is not None

    def _start(self) -> None:
        if "," in str(self._folder):
            raise LocalError(f"{self._folder}: Kafka takes no folder with a comma in its name: give another --state")
        port = self._wanted or (self.port if self._config.exists() else processes.free_port())
        if not processes.port_is_free(port):
            raise LocalError(f"port {port} is in use: give another one with --port")
        data = self._folder / "data"
        more = "".join(f"{name}={value}\n" for name, value in self._properties.items())  # of two, the last one holds
        escaped = json.dumps(str(data))[1:-1]  # Java's properties are Latin-1, and have the same escapes
        text = (SETTINGS + more).format(port=port, controller=processes.free_port(), data=escaped)
        self._config.write_text(text)
        classpath = os.pathsep.join(str(jar) for jar in jars.jars("broker"))
        java = [jars.java()[0], "-Xmx512m", *jars.OPTIONS, "-cp", classpath]
        if not (data / "meta.properties").exists():
            self._format(java)
        command = [*java, "-Dorg.slf4j.simpleLogger.showDateTime=true", "kafka.Kafka", str(self._config)]
        started = processes.start(command, self._log, file=self._pid)
        processes.wait_until_answers(port, started, self._log, START_S, "the Kafka broker")

    def _format(self, java: list[str]) -> None:
        command = [*java, "kafka.tools.StorageTool", "format", "-t", uuid.uuid4().hex[:22], "-c"]
        ran = subprocess.run([*command, str(self._config)], capture_output=True, text=True)
        if ran.returncode:
            raise LocalError(
                f"the broker's folder {self._folder} cannot be set up: {last_words(ran.stderr or ran.stdout)}; "
                f"`flink-llm local down --wipe` deletes it and all its topics, `flink-llm local up` makes it anew"
            )


def create_topics(bootstrap_servers: str, topics: Iterable[str]) -> None:
    """Makes the topics (`name[:partitions]`) that do not exist yet; others stay as they are.

    Raises ConfigError for a topic that no broker takes, LocalError when the broker refuses, or when a topic
    exists with another number of partitions than the one asked for.
    """
    from kafka import KafkaAdminClient  # slow to import, and not needed by `status`
    from kafka.admin import NewTopic
    from kafka.errors import KafkaError, TopicAlreadyExistsError

    wanted = _partitions(topics)
    try:
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers)
        try:
            there = set(admin.list_topics())
            for name in sorted(set(wanted) - there):
                with contextlib.suppress(TopicAlreadyExistsError):  # made meanwhile by somebody else
                    admin.create_topics([NewTopic(name, num_partitions=wanted[name] or 1, replication_factor=1)])
            asked = sorted(name for name in there.intersection(wanted) if wanted[name] is not None)
            for found in admin.describe_topics(asked) if asked else []:
                name, count = found["name"], len(found["partitions"])
                if count != wanted[name]:
                    raise LocalError(
                        f"topic {name} is there already, with {count} partitions, not {wanted[name]}: write {name} "
                        f"alone to take it as it is, or `flink-llm local down --wipe` first, which deletes all topics"
                    )
        finally:
            admin.close()
    except KafkaError as error:
        raise LocalError(
            f"the broker at {bootstrap_servers} refuses: {reason(error)}; kafka/broker.log in its state folder tells "
            f"more, and `flink-llm local down`, then `flink-llm local up` starts it anew"
        ) from error


def _partitions(topics: Iterable[str]) -> dict[str, int | None]:
    """Partitions by topic name, None where no number is given."""
    wanted: dict[str, int | None] = {}
    for topic in topics:
        found = _TOPIC.fullmatch(topic)
        if found is None:
            raise ConfigError(f"topic {topic!r}: write NAME or NAME:PARTITIONS, at most 9999 of them")
        check_topic("topic", found[1])
        for other in wanted:  # a metric's name has '_' for both
            if other != found[1] and other.replace(".", "_") == found[1].replace(".", "_"):
                raise ConfigError(f"topic {topic!r}: no broker takes it beside {other!r}")
        wanted[found[1]] = int(found[2]) if found[2] else None
    return wanted
