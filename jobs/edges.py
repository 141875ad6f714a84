"""What every job has in common: where its requests come from, where its outcomes go, how it starts."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

import msgspec
from py4j.protocol import Py4JJavaError
from pyflink.common import Encoder, Types, WatermarkStrategy
from pyflink.datastream import DataStream, StreamExecutionEnvironment
from pyflink.datastream.connectors.file_system import FileSink, FileSource, OutputFileConfig, StreamFormat
from pyflink.util.exceptions import JavaException

from flink_llm import config, environment, kafka, reporters, submission
from flink_llm.config import JobConfig
from flink_llm.errors import FlinkLlmError
from flink_llm.kafka_settings import DEFAULT_GROUP
from flink_llm.local import checks
from flink_llm.local.cluster import last_words
from flink_llm.local.failures import log_folder
from flink_llm.udfs.async_operator import Outputs

log = logging.getLogger(__name__)


def requests(env: StreamExecutionEnvironment, tables: Any, settings: JobConfig) -> DataStream:
    """The stream of requests: Kafka's, or the lines of a file."""
    if settings.files is None:
        own = msgspec.structs.replace(settings.kafka, group=settings.kafka.group or settings.name)
        return kafka.source(tables, own, settings.topics.requests, uid="requests")
    lines = FileSource.for_record_stream_format(StreamFormat.text_line_format(), settings.files.requests).build()
    strategy = WatermarkStrategy.for_monotonous_timestamps()
    return env.from_source(lines, strategy, "requests", Types.STRING()).uid("requests")


def write(tables: Any, outputs: Outputs, settings: JobConfig) -> None:
    """Results, partials and failures to their topics, or to files; partials nowhere without a topic of theirs."""
    topics = settings.topics
    named: dict[str, tuple[DataStream, list[str], kafka.Delivery]] = {
        "responses": (outputs.results, [topics.responses, *topics.reply_to], settings.flink.delivery),
        "failures": (outputs.failures, [topics.failures], settings.flink.delivery),
    }
    if topics.tokens is not None:
        named["tokens"] = outputs.partials, [topics.tokens], "at_least_once"
    for uid, (stream, names, delivery) in named.items():
        if settings.files is None:
            # Jobs may share a consumer group; transactions they must not. A name that changed would leave open ones.
            group = (settings.kafka.group or DEFAULT_GROUP).replace("%", "%25").replace("/", "%2F")
            own = f"{group}/{settings.name}"
            kafka.sink(tables, stream, settings.kafka, names, uid=uid, delivery=delivery, transactions=own)
        else:
            values = stream.map(_value, Types.STRING()).uid(f"{uid}-text")
            prefix = OutputFileConfig.builder().with_part_prefix(uid).build()
            encoder = Encoder.simple_string_encoder()
            sink = FileSink.for_row_format(settings.files.outcomes, encoder).with_output_file_config(prefix).build()
            values.sink_to(sink).uid(uid)


def run(build: Callable[[StreamExecutionEnvironment, JobConfig], None], arguments: list[str] | None = None) -> Any:
    """The `main` of a job: reads `--config`, builds, runs.

    Whatever ends it, before the start or after, is one line on stderr and exit status 1.
    """
    parser = argparse.ArgumentParser(description="A job of flink-llm.")
    parser.add_argument("--config", required=True, help="the job's YAML file")
    args = parser.parse_args(arguments)
    alone = None
    try:
        settings = config.load(args.config)
        if not environment.submitted():
            checks.before_start(settings)
            alone = checks.alone(settings)
        elif settings.files is None:  # a cluster may reach what this machine cannot: this asks where it can
            checks.sizes(settings)
        properties = {**reporters.options(settings.telemetry), **settings.flink.properties}
        env = environment.environment(properties, kafka=settings.files is None)
        build(env, settings)
        if environment.submitted():
            submission.check(env, settings.name)
    except FlinkLlmError as error:
        print(f"flink-llm: {error}", file=sys.stderr)
        sys.exit(1)
    except (Py4JJavaError, JavaException) as error:  # a property that Flink reads at once, and refuses
        log.info("the job %s", settings.name, exc_info=True)
        print(f"flink-llm: Flink refuses the job: {last_words(str(error))}", file=sys.stderr)
        sys.exit(1)
    if not environment.submitted():
        say = f"flink-llm: {settings.name} starts on a mini-cluster; Ctrl-C ends it; Flink's log: {log_folder()}"
        print(say, file=sys.stderr, flush=True)
        logging.getLogger().addFilter(_no_trace_of_an_interrupt)
    try:
        return env.execute(settings.name)
    except Exception as error:  # Py4J's and PyFlink's errors share no base class, and hold a trace of Java's
        log.info("the job %s", settings.name, exc_info=True)
        print(f"flink-llm: the job failed: {last_words(str(error))}", file=sys.stderr)
        sys.exit(1)
    finally:
        if alone is not None:
            alone.release()


def _no_trace_of_an_interrupt(record: logging.LogRecord) -> bool:
    """Py4J logs one for Ctrl-C, which is no error."""
    return not str(record.msg).startswith("KeyboardInterrupt")


def _value(row: Any) -> str:
    text: str = row.value.decode()
    return text
