"""The main job: chat requests → features → language model → responses, tokens, failures.

On a cluster: `flink run -py llm_inference.py ... --config chat.yaml`; here: `flink-llm run chat.yaml`.
"""

from typing import Any

from pyflink.datastream import StreamExecutionEnvironment

from flink_llm import environment
from flink_llm.config import JobConfig
from flink_llm.jobs import edges
from flink_llm.services import ServiceSettings
from flink_llm.udfs.async_operator import apply
from flink_llm.udfs.catalogue import Generate


def build(env: StreamExecutionEnvironment, config: JobConfig) -> None:
    """Adds the job to an environment. Raises ConfigError."""
    environment.configure(env, config.flink, capacity=config.operator.capacity)
    tables = environment.tables(env)
    services = ServiceSettings(models=config.models, host=config.host, features=config.features, breaker=config.breaker)
    others = [name for name in config.models if name != config.chat.model]
    outputs = apply(
        edges.requests(env, tables, config),
        Generate(config.chat, others),
        key=config.operator.key,
        uid="generate",
        settings=config.operator_settings(),
        services=services,
    )
    edges.write(tables, outputs, config)


def main(arguments: list[str] | None = None) -> Any:
    """Runs the job of the configuration file that `--config` names."""
    return edges.run(build, arguments)


if __name__ == "__main__":
    main()
