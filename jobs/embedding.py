"""Texts → vectors: the job of an embedding model, with the edges of the main job.

The model is `chat.model`; requests are `flink_llm.records.EmbedRequest`s keyed by `operator.key`.
"""

from typing import Any

from pyflink.datastream import StreamExecutionEnvironment

from flink_llm import environment
from flink_llm.config import JobConfig
from flink_llm.jobs import edges
from flink_llm.services import ServiceSettings
from flink_llm.udfs.async_operator import apply
from flink_llm.udfs.catalogue import Embed


def build(env: StreamExecutionEnvironment, config: JobConfig) -> None:
    """Adds the job to an environment. Raises ConfigError."""
    environment.configure(env, config.flink, capacity=config.operator.capacity)
    tables = environment.tables(env)
    outputs = apply(
        edges.requests(env, tables, config),
        Embed(config.chat.model),
        key=config.operator.key,
        uid="embed",
        settings=config.operator_settings(),
        services=ServiceSettings(models=config.models, host=config.host, breaker=config.breaker),
    )
    edges.write(tables, outputs, config)


def main(arguments: list[str] | None = None) -> Any:
    """Runs the job of the configuration file that `--config` names."""
    return edges.run(build, arguments)


if __name__ == "__main__":
    main()
