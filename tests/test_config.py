import re
from pathlib import Path

import pytest

from flink_llm.config import load, parse
from flink_llm.errors import ConfigError
from flink_llm.feature_settings import FeatureSettings
from flink_llm.flink_settings import FlinkSettings
from flink_llm.secrets import literal, masked

ROOT = Path(__file__).parents[1]
GOOD = {"job": "llm_inference", "name": "n", "models": {"support-chat": "m"}}


def write(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(f"job: other\nname: n\n{text}")
    return file


def test_the_shipped_configuration_is_valid():
    config = load(ROOT / "jobs" / "llm_inference.yaml", {"KAFKA": "k:1", "FLINK_LLM_STATE": "state"})
    assert config.kafka.bootstrap_servers == "k:1"
    assert config.models["support-chat"] == str(ROOT / "models" / "support-chat")
    assert config.operator_settings().reply_topics == ["chat.responses"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"operatr": {}}, "configuration: unknown name 'operatr'; did you mean 'operator'?"),
        ({"chat": {"modle": "x"}}, "chat: unknown name 'modle'; did you mean 'model'?"),
        ({"chat": {"model": "support-chta"}}, "chat.model: unknown name 'support-chta'; did you mean 'support-chat'?"),
        ({"job": "embedding", "models": {}}, "chat.model: unknown name 'support-chat'; known: none"),
        ({"operator": {"capacity": -1}}, "operator.capacity: Expected `int` >= 1"),
        ({"operator": {"deadline": float("inf")}}, "operator.deadline: inf is no number to work with"),
        ({"operator": {"key": ""}}, "operator.key: Expected `str` of length >= 1"),
        ({"flink": {"delivery": "twice"}}, "flink.delivery: unknown name 'twice'; known: at_least_once, exactly_once"),
        (
            {"flink": {"delivery": "exactly-once"}},
            "flink.delivery: unknown name 'exactly-once'; did you mean 'exactly_once'?",
        ),
        ({"operator": {"on_outage": True}}, "operator.on_outage: unknown name True; known: deadline, wait"),
        ({"operator": {"shed": "on"}}, "operator.shed: write true or false, without quotes"),
        ({"flink": {"parallelism": 129}}, "flink.parallelism is 129, more than flink.max_parallelism 128"),
        ({"flink": {"shards": 7}}, "flink.max_parallelism is 128, which is no multiple of flink.shards 7"),
        (
            {"flink": {"parallelism": 32}},
            "flink.parallelism is 32, more than flink.shards 16: the other subtasks would have nothing to do",
        ),
        (
            {"flink": {"properties": {"parallelism.default": 4}}},
            "flink.properties.parallelism.default: say flink.parallelism instead",
        ),
        (
            {"operator": {"capacity": 5000}},
            "operator.capacity is 5000, more calls than host.slots 16 and host.queue 4096 take",
        ),
        ({"features": {"freshness": {"orders": "x"}}}, "features.freshness.orders: Expected `float`, got `str`"),
        ({"kafka": {"properties": {"max.poll.records": []}}}, "kafka.properties.max.poll.records: Expected `str`"),
        ({"kafka": {"bootstrap_servers": "a:9092,b"}}, "kafka.bootstrap_servers: 'b' is not HOST:PORT"),
        ({"host": {"device": "cuda:x"}}, "host.device is 'cuda:x': use auto, cpu, cuda or cuda:N"),
        ({"topics": {"requests": []}}, "topics.requests: Expected `array` of length >= 1"),
        ({"topics": {"requests": ["a b"]}}, "topics.requests[0]: no broker takes 'a b'"),
        ({"topics": {"tokens": ".."}}, "topics.tokens: no broker takes '..'"),
        ({"topics": {"failures": "chat.requests"}}, "topics.failures is 'chat.requests', a topic of requests"),
        ({"topics": {"failures": "a", "tokens": "a"}}, "topics.failures is 'a', as topics.tokens is"),
        (
            {"topics": {"reply_to": ["x", "chat.requests"]}},
            "topics.reply_to[1] is 'chat.requests', a topic of requests",
        ),
        ({"models": {"support-chat": "m", "a/b": "m"}}, "models: 'a/b' is no model name"),
        ({"models": {"support-chat": "m", ".b": "m"}}, "models: '.b' is no model name"),
        ({"chat": {"features": "x"}}, "chat.features is 'x': name the Feast repository in features.repo"),
        ({"chat": {"entities": {"order": "("}}}, "chat.entities.order is not a regular expression"),
        ({"chat": {"entities": {"order": "x"}}}, "chat.entities.order must have one group, it has 0"),
        ({"chat": {"mask": ["email", "iban"]}}, "chat.mask[1]: unknown name 'iban'; known: card, email"),
        ({"files": {"requests": "x"}}, "files: the key `outcomes` is missing: add it"),
        ({"name": None}, "name: Expected `str`, got `null`"),
        ({"name": ""}, "name: Expected `str` of length >= 1"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(change, text):
    with pytest.raises(ConfigError) as caught:
        parse({**GOOD, **change}, Path())
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_values_come_from_the_environment_and_from_files_beside_the_configuration(tmp_path):
    (tmp_path / "secret").write_text("s3cret\n")
    file = tmp_path / "job.yaml"
    file.write_text("job: other\nname: ${NAME}\nkafka:\n  properties:\n    sasl.jaas.config: ${file:secret}\n")
    config = load(file, {"NAME": "mine"})
    assert config.name == "mine"
    assert config.kafka.properties["sasl.jaas.config"] == "s3cret"
    assert "s3cret" not in repr(config)
    with pytest.raises(ConfigError, match=r"^name: the environment variable NAME is not set: export NAME=\.\.\.$"):
        load(file, {})


def test_a_reference_may_stand_for_a_number_and_a_quoted_number_may_not(tmp_path):
    text = "operator: {capacity: '${N}', ordered: '${YES}', deadline: '${NONE}'}\nchat: {model: '${N}'}\n"
    config = load(write(tmp_path, text), {"N": "12", "YES": "true", "NONE": "null"})
    assert (config.operator.capacity, config.operator.ordered, config.operator.deadline) == (12, True, None)
    assert config.chat.model == "12"
    with pytest.raises(ConfigError, match=r"^operator.capacity: Expected `int`, got `str`$"):
        load(write(tmp_path, "operator: {capacity: '${N}'}\n"), {"N": "many"})
    with pytest.raises(ConfigError, match=r"^operator.capacity: Expected `int`, got `str`$"):
        load(write(tmp_path, "operator: {capacity: '12'}\n"))


def test_two_dollars_are_a_plain_reference(tmp_path):
    config = load(write(tmp_path, "chat: {system: 'write $${NAME}, ${NAME}'}\n"), {"NAME": "x"})
    assert config.chat.system == "write ${NAME}, x"


def test_scalars_of_properties_are_texts(tmp_path):
    text = "kafka: {properties: {max.poll.records: 5, enable.x: true}}\nflink: {properties: {a.b: 1.5}}\n"
    config = load(write(tmp_path, text))
    assert config.kafka.properties == {"max.poll.records": "5", "enable.x": "true"}
    assert config.flink.properties == {"a.b": "1.5"}


def test_paths_are_relative_to_the_file_and_urls_are_none(tmp_path):
    text = """
flink: {checkpoint_dir: checkpoints}
host: {socket_dir: run}
kafka: {properties: {ssl.truststore.location: certs/ca.pem, ssl.truststore.type: PEM}}
"""
    config = load(write(tmp_path, text))
    assert config.flink.checkpoint_dir == str(tmp_path / "checkpoints")
    assert config.host.socket_dir == str(tmp_path / "run")
    assert config.kafka.properties["ssl.truststore.location"] == str(tmp_path / "certs" / "ca.pem")
    config = load(write(tmp_path, "flink: {checkpoint_dir: 's3://bucket/job'}\n"))
    assert config.flink.checkpoint_dir == "s3://bucket/job"


def test_what_is_not_set_is_left_out_where_that_is_allowed(tmp_path):
    text = "name: ${NAME}\nkafka: {bootstrap_servers: '${KAFKA}'}\ntopics: {requests: [a, '${TOPIC}']}\n"
    file = tmp_path / "job.yaml"
    file.write_text(f"job: other\n{text}operator: {{capacity: '${{N}}'}}\n")
    config = load(file, {}, strict=False)
    assert (config.name, config.kafka.bootstrap_servers) == ("${NAME}", "127.0.0.1:9092")
    assert (config.topics.requests, config.operator.capacity) == (["chat.requests"], 256)


@pytest.mark.parametrize(
    ("text", "expect"),
    [
        ("- a", "a configuration is a mapping"),
        ("a: [", "line 1, column 5 is not YAML"),
        ("kafka: {bootstrap_servers: ${KAFKA}}", "got '{'; quote a reference: \"${NAME}\""),
        ("\tx: 1", "is not YAML"),
        ("", "a configuration is a mapping"),
        ("job: a\nname: n\njob: b\n", "line 3: the key 'job' stands there twice"),
        ("job: a\nkafka:\n  group: x\n  group: y\n", "line 4: the key 'group' stands there twice"),
        ("job: a\nname: n\nchat: &c {entities: *c}\n", "an anchor holds itself"),
        ("? [a]\n: 1\n", "is not YAML"),
        ("job: other\nname: ${file:binary}\n", "is not a text file"),
        ("job: other\nname: ${file:nowhere}\n", "No such file"),
    ],
)
def test_what_is_no_configuration_is_one_line(tmp_path, text, expect):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert expect in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "s3.access-key",
        "fs.azure.account.key.x",
        "basic.auth.user.info",
        "ssl.keystore.key",
        "ssl.key.password",
        "Authorization",
        "redis.pwd",
    ],
)
def test_secrets_are_known_by_their_names(name):
    assert "hunter" not in repr(FlinkSettings(properties={name: "hunter"}))
    assert list(literal({"a": {name: "hunter"}})) == [f"a.{name}"]
    assert list(literal({"a": {name: "${PASSWORD}"}})) == []


def test_what_is_no_secret_is_shown():
    shown = {"ssl.keystore.location": "x", "max_tokens": 5, "topics": {"tokens": "chat.tokens"}, "key": "session_id"}
    assert masked(shown) == shown


def test_secrets_are_masked_whole():
    store = {"type": "redis", "connection_string": "redis://u:hunter@h:1", "password": "hunter,2'\"x"}
    assert "hunter" not in repr(FeatureSettings(online_store=store))
    assert masked("at redis://u:hun:ter@h:1/0 now") == "at redis://********@h:1/0 now"
    assert masked("host:6379,password=hunter,db=1") == "host:6379,password=********,db=1"
    assert masked("redis://:hun/ter@h:1/0") == "redis://********@h:1/0"
    assert masked("redis://u:hun@ter@h:1/x,mail=a@b.c") == "redis://********@h:1/x,mail=a@b.c"
    assert masked("http://h:8080/users/joe@b.c") == "http://h:8080/users/joe@b.c"
    assert (
        masked("api_key=hunter, aws_secret_access_key: hunter") == "api_key=********, aws_secret_access_key: ********"
    )
    assert masked("Authorization: Bearer hunter") == "Authorization: Bearer ********"
    with pytest.raises(ConfigError) as caught:
        parse({**GOOD, "kafka": {"bootstrap_servers": "kafka://bob:hunter@host:9092"}}, Path())
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ({"security.protocol": "SASLSSL"}, "did you mean 'SASL_SSL'?"),
        ({"group.id": "chat"}, "say kafka.group instead"),
        ({"max.request.size": "²"}, "max.request.size ²"),
    ],
)
def test_what_kafkas_client_would_not_take_is_refused_before_the_start(properties, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse({**GOOD, "kafka": {"properties": properties}}, Path())


def test_what_the_operator_lets_through_must_be_what_the_producer_takes():
    raw = {**GOOD, "operator": {"max_result_bytes": 5_000_000}}
    said = r"max_result_bytes is 5000000, kafka\.properties\.max\.request\.size 1048576"
    with pytest.raises(ConfigError, match=said):
        parse(raw, Path())
    raw["kafka"] = {"properties": {"max.request.size": 6_000_000}}
    assert parse(raw, Path()).operator.max_result_bytes == 5_000_000
