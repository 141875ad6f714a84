"""The doctor, without Flink, broker or GPU: what it says, and that one bad part hides no other."""

import importlib.metadata
import sys

import pytest
import yaml
from kafka.errors import KafkaError

from flink_llm.config import load, parse
from flink_llm.engine.settings import HostSettings
from flink_llm.errors import ConfigError, LocalError
from flink_llm.local import broker, checks, doctor, jars
from tests import tiny


@pytest.fixture
def job(tmp_path):
    """Writes a job's file: `job(chat=...)`."""

    def write(**changes):
        raw = {"job": "llm_inference", "name": "n", "models": {"support-chat": "nowhere"}, **changes}
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump(raw))
        return file

    return write


def lines(capsys):
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_a_broker_out_of_reach_hides_nothing_behind_it(job, tmp_path, capsys):
    repo = tmp_path / "repo"
    file = job(kafka={"bootstrap_servers": "127.0.0.1:1"}, features={"repo": str(repo)})
    assert not doctor.examine(file, tmp_path)
    said = lines(capsys)
    assert said["✗ Kafka"].startswith("kafka.bootstrap_servers: no broker answers at 127.0.0.1:1")
    assert said["– topics"] == "not checked without Kafka"
    assert "is not a model folder" in said["✗ model support-chat"]
    assert "feature_store.yaml" in said["✗ features"]


def test_a_foreign_error_is_a_line_like_others(job, tmp_path, capsys, monkeypatch):
    def fails(config):
        raise ZeroDivisionError("so\nit is, password=hush")

    monkeypatch.setattr(checks, "kafka", fails)
    assert not doctor.examine(job(), tmp_path)
    said = lines(capsys)
    assert said["✗ Kafka"] == "ZeroDivisionError: so it is, password=********"
    assert "✗ model support-chat" in said


def test_files_are_looked_for_instead_of_kafka(job, tmp_path, capsys):
    doctor.examine(job(files={"requests": "in.jsonl", "outcomes": "out"}), tmp_path)
    said = lines(capsys)
    assert said["✗ requests"] == f"files.requests: {tmp_path / 'in.jsonl'} does not exist"
    assert not [name for name in said if "Kafka" in name and "connector" not in name]


def test_a_wrong_configuration_leaves_the_machine_to_check(job, tmp_path, capsys):
    assert not doctor.examine(job(jobb=1), tmp_path)
    said = lines(capsys)
    assert said["✗ configuration"].endswith("did you mean 'job'?")
    assert "✓ Python" in said and "✓ GPU" in said


def test_an_unknown_job_is_named(job, tmp_path, capsys):
    doctor.examine(job(job="llm_inferense"), tmp_path)
    assert lines(capsys)["✗ job"] == "job: unknown name 'llm_inferense'; did you mean 'llm_inference'?"


def test_a_job_is_a_module_with_a_main(job, tmp_path, capsys, monkeypatch):
    class Point:
        name, value = "mine", "package.module:main"

        def load(self):
            return test_a_job_is_a_module_with_a_main

    monkeypatch.setattr(checks, "entry_points", lambda group: [Point()])
    doctor.examine(job(job="mine"), tmp_path)
    said = lines(capsys)["✗ job"]
    assert said == "job: mine is 'package.module:main': name a module that has main(arguments) there"


@pytest.mark.parametrize(
    ("flink", "jar", "good"),
    [
        ("2.2.0", "flink-sql-connector-kafka-5.0.0-2.2.jar", True),
        ("2.3.0", "flink-sql-connector-kafka-5.0.0-2.2.jar", True),
        ("2.1.1", "flink-sql-connector-kafka-5.0.0-2.2.jar", False),
        ("3.0.0", "flink-sql-connector-kafka-5.0.0-2.2.jar", False),
    ],
)
def test_the_connector_must_be_for_this_flink(flink, jar, good, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: flink)
    monkeypatch.setattr(jars, "connector_jar", lambda: tmp_path / jar)
    if good:
        assert checks.connector() == f"Flink {flink}, {jar}"
    else:
        with pytest.raises(ConfigError, match=rf"is for Flink 2.2 and later 2.x, this is Flink {flink}"):
            checks.connector()


def test_maven_may_be_absent_when_it_has_nothing_left_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("FLINK_LLM_CACHE", str(tmp_path))
    for group in ("connector", "broker"):
        with pytest.raises(LocalError, match=r"^mvn is not installed: run"):
            checks.maven()
        folder = jars._folder(group)
        folder.mkdir(parents=True)
        (folder / jars.COMPLETE).touch()
    assert checks.maven() == f"not installed, and not needed: the jars are in {tmp_path}"


def program(folder, name, text):
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def test_a_gpu_must_be_there_for_a_job_that_asks_for_one(tmp_path, monkeypatch):
    from flink_llm.engine import graphs

    monkeypatch.setattr(checks, "flavour", lambda: "onnxruntime-gpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=r"this ONNX Runtime has no CUDA: install flink-llm\[gpu\]"):
        checks.gpu(HostSettings(device="cuda"))
    monkeypatch.setattr(graphs, "providers", lambda device: [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^host.device is 'cuda', no NVIDIA GPU is seen here"):
        checks.gpu(HostSettings(device="cuda"))
    program(tmp_path, "nvidia-smi", "echo A GPU; echo Another")
    assert checks.gpu(HostSettings(device="cuda:1")) == "host.device cuda:1 is cuda:1 of A GPU, Another"
    with pytest.raises(ConfigError, match=r"^host.device is 'cuda:2', 2 are visible"):
        checks.gpu(HostSettings(device="cuda:2"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ConfigError, match=r"1 are visible \(CUDA_VISIBLE_DEVICES=1\)"):
        checks.gpu(HostSettings(device="cuda:1"))
    assert checks.gpu(HostSettings(device="cpu")).startswith("host.device cpu is the CPU here; not used: A GPU")


def test_an_old_java_is_refused_with_what_to_do(tmp_path, monkeypatch):
    program(tmp_path, "java", "echo 'openjdk version \"11.0.2\" 2019-01-15' >&2")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(LocalError, match=r"is Java 11, Java 17 or later is needed: run `apt-get install"):
        checks.java()


def test_a_missing_maven_is_said_where_jars_are_to_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FLINK_LLM_CACHE", str(tmp_path / "cache"))
    for fetch in (lambda: jars.program("mvn"), lambda: jars.jars("broker")):
        with pytest.raises(LocalError, match=r"^mvn is not installed: run `apt-get install -y maven` \(as root\)"):
            fetch()
    assert list(tmp_path.rglob(".complete")) == []


def test_maven_that_fails_is_told_with_where_a_mirror_goes(tmp_path, monkeypatch):
    program(tmp_path, "mvn", "echo '[ERROR] Unknown host repo'; exit 1")
    program(tmp_path, "java", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("FLINK_LLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        LocalError, match=r"fetch the connector jars: Unknown host repo; is there a network\? .*settings.xml"
    ):
        jars.jars("connector")


def test_a_broker_that_does_not_come_up_says_what_to_do(tmp_path, monkeypatch):
    program(tmp_path, "java", "echo 'log dir is damaged' >&2; exit 1")
    monkeypatch.setattr(jars, "jars", lambda group: [])
    monkeypatch.setattr(jars, "java", lambda: (str(tmp_path / "java"), 17))
    with pytest.raises(LocalError) as refused:
        broker.Broker(tmp_path).up()
    assert str(refused.value).startswith(
        f"the broker's folder {tmp_path / 'kafka'} cannot be set up: log dir is damaged; `flink-llm local down --wipe`"
    )


def test_a_broker_that_refuses_says_what_to_do(monkeypatch):
    def refuses(**options):
        raise KafkaError("no")

    monkeypatch.setattr("kafka.KafkaAdminClient", refuses)
    with pytest.raises(
        LocalError, match=r"^the broker at h:1 refuses: no; kafka/broker.log .*`flink-llm local down`, then"
    ):
        broker.create_topics("h:1", ["a"])


def test_transactions_are_looked_at_for_exactly_once_only(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checks, "check_reachable", lambda settings: None)
    monkeypatch.setattr(checks, "topics_there", lambda settings: set(broker.TOPICS))
    monkeypatch.setattr(checks, "topic_limits", lambda settings, topics: ({}, "no permission"))
    monkeypatch.setattr(checks, "check_transaction_timeout", lambda settings: "no permission")
    doctor.examine(job(), tmp_path)
    said = lines(capsys)
    assert said["✓ Kafka"] == "127.0.0.1:9092" and "✓ transactions" not in said
    assert said["✓ topics"].endswith("chat.failures (sizes not checked: no permission)")
    doctor.examine(job(flink={"delivery": "exactly_once"}), tmp_path)
    assert lines(capsys)["✓ transactions"] == "not checked: no permission"


def test_topics_that_only_flink_can_see_are_said_to_be_unchecked(tmp_path):
    properties = {"ssl.truststore.location": "a.jks"}
    config = parse({"job": "other", "name": "n", "kafka": {"properties": properties}}, tmp_path)
    assert checks.topics(config) == "not checked: a truststore of type JKS is read by Java only"


def test_what_is_missing_is_said_before_a_job_starts(tmp_path, monkeypatch):
    raw = {"job": "llm_inference", "name": "n", "models": {"support-chat": "m"}}
    files = {"requests": "in", "outcomes": "out"}
    with pytest.raises(ConfigError, match=r"^files.requests: .*in does not exist$"):
        checks.before_start(parse({**raw, "files": files}, tmp_path))
    (tmp_path / "in").touch()
    with pytest.raises(Exception, match="is not a model folder"):
        checks.before_start(parse({**raw, "files": files}, tmp_path))
    monkeypatch.setattr(checks, "check_reachable", lambda settings: None)
    there = {"chat.requests", "chat.responses", "chat.failures"}
    monkeypatch.setattr(checks, "topics_there", lambda settings: there)
    with pytest.raises(ConfigError, match=r"chat.tokens not there: .*local up --topic chat.tokens`$"):
        checks.before_start(parse(raw, tmp_path))
    there.add("chat.token")
    with pytest.raises(ConfigError, match=r"`; did you mean 'chat.token' for 'chat.tokens'\?$"):
        checks.before_start(parse(raw, tmp_path))


def test_a_deployment_file_is_looked_at_with_its_folders(job, tmp_path, capsys):
    tiny.encoder(tmp_path / "v1", "embedding")
    file = tmp_path / "chat.yaml"
    file.write_text("versions: [{folder: v1}]")
    doctor.examine(job(models={"support-chat": "chat.yaml", "other": "none.yaml"}), tmp_path)
    said = lines(capsys)
    assert said["✓ model support-chat"].endswith(f"in {tmp_path / 'v1'}")
    assert said["✗ model other"] == f"{tmp_path / 'none.yaml'}: No such file or directory; correct the path"


def test_an_adapter_that_the_model_has_not_is_named(job, tmp_path, capsys):
    tiny.encoder(tmp_path / "model", "embedding")
    doctor.examine(job(models={"support-chat": "model"}, chat={"adapter": "returns"}), tmp_path)
    found = lines(capsys)["✗ model support-chat"]
    assert found == f"chat.adapter: {tmp_path / 'model'}: unknown name 'returns'; known: none"


def test_traces_need_opentelemetry_here_too(job, tmp_path, capsys, monkeypatch):
    file = job(telemetry={"traces": "http://collector:4318/v1/traces"})
    doctor.examine(file, tmp_path)
    assert lines(capsys)["✓ traces"] == "sent to http://collector:4318/v1/traces"
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert not doctor.examine(file, tmp_path)
    assert lines(capsys)["✗ traces"] == "telemetry.traces needs OpenTelemetry: pip install 'flink-llm[otel]'"
    doctor.examine(job(), tmp_path)
    assert not [name for name in lines(capsys) if "traces" in name]


def test_lines_are_not_wrapped(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    doctor.examine(job(kafka={"bootstrap_servers": "127.0.0.1:1"}), tmp_path)
    assert "or correct the address" in lines(capsys)["✗ Kafka"]


def test_slots_of_the_mini_cluster_that_do_not_do_for_the_job(job, tmp_path, capsys):
    flink = {"parallelism": 4, "properties": {checks.SLOTS: "1", checks.MANAGERS: "3"}}
    few = load(job(flink=flink))
    with pytest.raises(ConfigError, match=rf"^flink.parallelism is 4, flink.properties.{checks.SLOTS} gives 3 slots:"):
        checks.slots(few)
    enough = load(job(flink={**flink, "parallelism": 3}))
    assert checks.slots(enough).startswith("3 of at most 16 subtasks (flink.shards), which run 768 calls at once; 16 ")


def test_a_second_job_of_one_name_is_refused_while_the_first_runs(job, tmp_path):
    settings = load(job(host={"socket_dir": "s"}))
    other = load(job(name="another", host={"socket_dir": "s"}))
    first, beside = checks.alone(settings), checks.alone(other)
    with pytest.raises(ConfigError, match=r"^name: a job 'n' runs on this machine already, .*: end it first"):
        checks.alone(settings)
    first.release()
    checks.alone(settings).release()
    beside.release()
