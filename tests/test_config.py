from pathlib import Path

import pytest

from flink_llm.config import load, parse
from flink_llm.errors import ConfigError

ROOT = Path(__file__).parents[1]
GOOD = {"job": "llm_inference", "name": "n", "models": {"support-chat": "m"}}


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
        ({"operator": {"capacity": -1}}, "operator.capacity: Expected `int` >= 1"),
        ({"flink": {"delivery": "twice"}}, "flink.delivery: Invalid enum value 'twice'"),
        ({"chat": {"features": "x"}}, "chat.features is 'x': name the Feast repository in features.repo"),
        ({"chat": {"entities": {"order": "("}}}, "chat.entities.order is not a regular expression"),
        ({"chat": {"entities": {"order": "x"}}}, "chat.entities.order must have one group, it has 0"),
        ({"name": None}, "name: Expected `str`, got `null`"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(change, text):
    with pytest.raises(ConfigError) as caught:
        parse({**GOOD, **change}, Path())
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_values_come_from_the_environment_and_from_files(tmp_path):
    (tmp_path / "secret").write_text("s3cret\n")
    file = tmp_path / "job.yaml"
    file.write_text(
        f"job: embedding\nname: ${{NAME}}\nkafka:\n  properties:\n    sasl.jaas.config: ${{file:{tmp_path}/secret}}\n"
    )
    config = load(file, {"NAME": "mine"})
    assert config.name == "mine"
    assert config.kafka.properties["sasl.jaas.config"] == "s3cret"
    assert "s3cret" not in repr(config)
    with pytest.raises(ConfigError, match=r"^name: the environment variable NAME is not set$"):
        load(file, {})


@pytest.mark.parametrize("text", ["- a", "a: [", "\tx: 1", ""])
def test_what_is_no_configuration_is_one_line(tmp_path, text):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert "\n" not in str(caught.value)
