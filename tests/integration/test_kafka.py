"""Whole records through a real broker and a job whose Python runs in a process of its own."""

import subprocess
import sys
import time

import pytest
import yaml
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic
from pyflink.common import Row
from pyflink.datastream.functions import ProcessFunction

from flink_llm import environment, kafka
from flink_llm.config import parse
from flink_llm.errors import ConfigError, LocalError
from flink_llm.flink_settings import FlinkSettings
from flink_llm.jobs import edges
from flink_llm.kafka_settings import KafkaSettings, topic_limits
from flink_llm.local import checks
from flink_llm.local.broker import create_topics

NOW = int(time.time() * 1000)
YEAR_MS = 365 * 24 * 3600 * 1000
NO_LIMIT = str(2**63 - 1)


def sent(broker, topic):
    """What the job reads, a kind of record on each line."""
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    headers = [("trace", b"\xff\x00"), ("é", b"")]
    for key, value, stamp, kept in [
        (b"whole", b"{}", NOW - 5000, headers),
        (b"tombstone", None, NOW - 4000, []),
        (None, b"\xff\xfe", NOW - 3000, []),  # no UTF-8, no key
        (b"", b"", NOW - 2000, []),
        (b"routed", b"r", NOW - 1000, [("to", f"other.{topic.split('.')[1]}".encode())]),
        (b"future", b"f", NOW + YEAR_MS, []),
    ]:
        producer.send(topic, key=key, value=value, timestamp_ms=stamp, headers=kept)
    producer.close()


def committed(broker, topic):
    consumer = KafkaConsumer(
        topic, bootstrap_servers=broker.bootstrap_servers, isolation_level="read_committed",
        auto_offset_reset="earliest", consumer_timeout_ms=1000,
    )  # fmt: skip
    found = list(consumer)
    consumer.close()
    return found


def seeing():
    """A process function that writes what Python saw into the header `seen`."""

    class Seeing(ProcessFunction):  # inside: the worker cannot import the tests
        def process_element(self, row, ctx):
            place = (row.topic, row.partition, row.offset, row.time.to_epoch_milli(), ctx.timestamp())
            headers = {**row.headers, "seen": repr((row.key, row.value, place)).encode()}
            yield Row(row.key, row.value, headers, row.headers.get("to", b"").decode() or None)

    return Seeing()


@pytest.fixture(scope="module", params=["at_least_once", "exactly_once"])
def outcome(request, broker):
    """The committed records of (default topic, other topic, topic of unstamped rows), and the input's name."""
    delivery = request.param
    source, *sinks = names = [f"{name}.{delivery}" for name in ("in", "out", "other", "plain")]
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    lenient = {"message.timestamp.after.max.ms": NO_LIMIT}
    admin.create_topics([NewTopic(name, 1, 1, topic_configs=lenient if name == source else {}) for name in names])
    admin.close()
    sent(broker, source)
    settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, group=delivery)
    none = {"restart-strategy.type": "none"}
    env = environment.environment(none)
    environment.configure(env, FlinkSettings(delivery=delivery, checkpoint_interval_ms=500, properties=none))
    tables = environment.tables(env)
    read = kafka.source(tables, settings, [source], uid="read", start="earliest", bounded=True)
    rows = read.process(seeing(), kafka.OUTBOUND).uid("see")
    kafka.sink(tables, rows, settings, sinks[:2], uid="write", delivery=delivery)
    unstamped = env.from_collection([Row(b"k", b"v", {}, None)], kafka.OUTBOUND)
    kafka.sink(tables, unstamped, settings, sinks[2:], uid="plain", delivery=delivery)
    env.execute(delivery)
    return [committed(broker, name) for name in sinks], source


def by_key(outcome):
    return {record.key: record for record in outcome[0][0]}


def test_every_record_arrives_once(outcome):
    (default, other, plain), _ = outcome
    assert [record.key for record in default] == [b"whole", b"tombstone", None, b"", b"future"]
    assert [record.key for record in other] == [b"routed"]
    assert [record.key for record in plain] == [b"k"]


def test_key_value_place_and_time_reach_python(outcome):
    _, source = outcome
    seen = dict(by_key(outcome)[b"whole"].headers)["seen"].decode()
    assert seen == repr((b"whole", b"{}", (source, 0, 0, NOW - 5000, NOW - 5000)))


def test_headers_go_through_as_they_are(outcome):
    headers = dict(by_key(outcome)[b"whole"].headers)
    del headers["seen"]
    assert headers == {"trace": b"\xff\x00", "é": b""}


@pytest.mark.parametrize(
    ("key", "value"), [(b"tombstone", None), (None, b"\xff\xfe"), (b"", b"")], ids=["null", "no-utf8", "empty"]
)
def test_odd_values_are_data(outcome, key, value):
    assert by_key(outcome)[key].value == value


def test_a_record_keeps_its_time(outcome):
    assert by_key(outcome)[b"whole"].timestamp == NOW - 5000


def test_a_time_that_no_broker_takes_is_the_time_of_writing(outcome):
    (default, _, plain), _ = outcome
    for record in (default[-1], plain[0]):
        assert NOW - 1000 < record.timestamp < time.time() * 1000 + 1000


def test_a_job_reads_what_is_committed_and_ends_no_transaction_but_its_own(broker, topics):
    source, sink = topics("committed", "shared")

    def producer(name):
        made = KafkaProducer(bootstrap_servers=broker.bootstrap_servers, transactional_id=name)
        made.init_transactions()
        made.begin_transaction()
        return made

    before = producer("before")
    before.send(source, b"aborted").get()
    before.abort_transaction()
    before.begin_transaction()
    before.send(source, b"committed").get()
    before.commit_transaction()
    others = producer(f"{kafka.transactions_of('chat', 'out-eu')}-0-1")
    others.send(sink, b"of another sink").get()

    settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, group="chat")
    none = {"restart-strategy.type": "none"}
    env = environment.environment(none)
    environment.configure(env, FlinkSettings(checkpoint_interval_ms=500, properties=none))
    tables = environment.tables(env)
    read = kafka.source(tables, settings, [source], uid="in", start="earliest", bounded=True)
    kafka.sink(tables, read, settings, [sink], uid="out", delivery="exactly_once")
    env.execute("out")

    others.commit_transaction()
    assert sorted(record.value for record in committed(broker, sink)) == [b"committed", b"of another sink"]


def test_a_sink_says_which_type_it_takes(broker):
    env = environment.environment()
    words = env.from_collection(["a"])
    settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers)
    with pytest.raises(ConfigError, match=r"words: a sink takes rows of key, value, headers and topic"):
        kafka.sink(environment.tables(env), words, settings, ["t"], uid="words")


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ({"fetch.min.bytes": "many"}, r"Invalid value many for configuration fetch\.min\.bytes"),
        ({"acks": "1"}, "Must set acks to all"),
        ({"linger.ms": "-1"}, r"linger\.ms"),
    ],
)
def test_what_flinks_client_would_not_take_is_refused_before_the_start(broker, properties, said):
    env = environment.environment()
    env.enable_checkpointing(1000)
    tables = environment.tables(env)
    settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, properties=properties)
    with pytest.raises(ConfigError, match=rf"^kafka\.properties: .*{said}"):
        rows = kafka.source(tables, settings, ["t"], uid="in")
        kafka.sink(tables, rows, settings, ["t"], uid="out", delivery="exactly_once")


def test_classes_that_only_tasks_know_and_one_acknowledgement_without_transactions_refuse_nothing(broker):
    env = environment.environment()
    tables = environment.tables(env)
    given = {"acks": "1", "sasl.client.callback.handler.class": "of.a.Jar"}
    settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, properties=given)
    kafka.sink(tables, kafka.source(tables, settings, ["t"], uid="in"), settings, ["t"], uid="out")


def test_a_transaction_longer_than_the_brokers_maximum_is_refused(broker):
    env = environment.environment()
    rows = env.from_collection([Row(b"k", b"v", {}, None)], kafka.OUTBOUND)
    settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, transaction_timeout_ms=3_600_000)
    with pytest.raises(ConfigError, match=r"is 3600000, the broker's transaction\.max\.timeout\.ms is 900000"):
        kafka.sink(environment.tables(env), rows, settings, ["t"], uid="rows", delivery="exactly_once")


def test_exactly_once_without_checkpoints_is_refused(broker):
    env = environment.environment()
    rows = env.from_collection([Row(b"k", b"v", {}, None)], kafka.OUTBOUND)
    for resume in (False, True):
        settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, resume_after_timeout=resume)
        with pytest.raises(ConfigError, match=r"^exactly_once commits with checkpoints, and they are off: call env\."):
            kafka.sink(environment.tables(env), rows, settings, ["t"], uid="rows", delivery="exactly_once")


WITHOUT_A_CONNECTOR = """
from pyflink.datastream import StreamExecutionEnvironment
from flink_llm import environment, kafka
from flink_llm.kafka_settings import KafkaSettings, topic_limits
from flink_llm.local import checks
from flink_llm.local.broker import create_topics

tables = environment.tables(StreamExecutionEnvironment.get_execution_environment())
kafka.source(tables, KafkaSettings(), ["requests"], uid="requests")
"""


def test_an_environment_without_the_connector_is_told_so():
    ran = subprocess.run([sys.executable, "-c", WITHOUT_A_CONNECTOR], capture_output=True, text=True)
    said = ran.stderr.strip().splitlines()[-1]
    assert "ConfigError: requests: this environment has no Kafka connector: on a cluster" in said


def test_a_topic_with_other_partitions_is_not_taken_for_the_one_asked_for(broker, topics):
    (name,) = topics("orders", partitions=2)
    create_topics(broker.bootstrap_servers, [name])
    create_topics(broker.bootstrap_servers, [f"{name}:2"])
    with pytest.raises(LocalError, match=f"topic {name} is there already, with 2 partitions, not 9: "):
        create_topics(broker.bootstrap_servers, [f"{name}:9"])


def test_a_topic_that_takes_less_than_the_operator_lets_through_is_refused(broker, topics, tmp_path):
    *names, failures = topics("requests", "responses", "tokens", "failures")
    small = f"small.{names[0]}"
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    admin.create_topics([NewTopic(small, 1, 1, topic_configs={"max.message.bytes": "100000"})])
    admin.close()

    def config(operator=None, **changed):
        written = {"requests": names[:1], "responses": names[1], "tokens": names[2], "failures": small}
        servers = {"bootstrap_servers": broker.bootstrap_servers}
        raw = {"job": "other", "name": "n", "topics": {**written, **changed}, "kafka": servers}
        return parse({**raw, "operator": operator or {}}, tmp_path)

    assert checks.topics(config()) == ", ".join([*names, small]), "failures are small"
    wanted = (
        f"operator.max_result_bytes is 1000000, max.message.bytes of topic {small} (topics.{{}}) is 100000: "
        f"raise the latter to 1016384 at least, or lower the former"
    )
    for key, changed in [
        ("responses", config(responses=small, failures=failures)),
        ("reply_to[0]", config(reply_to=[small], failures=failures)),
        ("failures", config({"keep_payload": True})),
    ]:
        with pytest.raises(ConfigError) as refused:
            checks.topics(changed)
        assert str(refused.value) == wanted.format(key)
    assert checks.topics(config({"keep_payload": True, "max_result_bytes": 83_616}))
    with pytest.raises(ConfigError):
        checks.topics(config({"keep_payload": True, "max_result_bytes": 83_617}))


def test_a_topic_that_the_broker_does_not_show_is_not_refused(broker):
    settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers)
    why = "the broker's max.message.bytes could not be read: the broker does not show it"
    assert topic_limits(settings, ["nowhere.at.all"]) == ({}, why)


def test_a_job_that_is_submitted_asks_the_topics_too(broker, topics, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYFLINK_GATEWAY_PORT", "1")
    monkeypatch.delenv("FLINK_LLM_LOCAL", raising=False)
    [name] = topics("requests")
    written = {kind: f"{name}.{kind}" for kind in ("responses", "tokens", "failures")}
    create_topics(broker.bootstrap_servers, written.values())
    config = tmp_path / "job.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "job": "other",
                "name": "n",
                "topics": {"requests": [name], **written},
                "kafka": {
                    "bootstrap_servers": broker.bootstrap_servers,
                    "properties": {"max.request.size": "3000000"},
                },
                "operator": {"max_result_bytes": 2_000_000},
            }
        )
    )
    with pytest.raises(SystemExit) as ended:
        edges.run(lambda env, settings: pytest.fail("it was built"), ["--config", str(config)])
    [line] = capsys.readouterr().err.splitlines()
    assert (ended.value.code, "max.message.bytes" in line) == (1, True)
