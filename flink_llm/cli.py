"""The command line: `flink-llm`. Each command imports what it needs when it runs."""

import logging
import sqlite3
import sys
from pathlib import Path
from typing import Any

import click

from flink_llm import __version__
from flink_llm.errors import ConfigError, FlinkLlmError
from flink_llm.local.broker import TOPICS, Broker, state_folder
from flink_llm.secrets import masked

STATE = click.option(
    "--state", type=click.Path(path_type=Path), help="State folder; $FLINK_LLM_HOME, else .flink-llm here."
)
_JAVA_TRACE = "\n\tat "
log = logging.getLogger(__name__)


class _Group(click.Group):
    """Every error is one line and exit status 1; `-v` shows where an unexpected one came from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            ctx.exit(130)
        except Exception as error:
            log.info("the trace", exc_info=True)
            click.echo(f"flink-llm: {_line(error)}", err=True)
            ctx.exit(1)


def _line(error: Exception) -> str:
    """Our own words as they are; in those of others secrets are masked, and Java's trace is left out."""
    said = str(error)
    if isinstance(error, FlinkLlmError):
        return " ".join(said.split())
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else said
    elif isinstance(error, sqlite3.Error):
        text = f"sqlite: {said}"
    else:
        from flink_llm.local.cluster import last_words

        said = last_words(said) if _JAVA_TRACE in said else said
        text = f"unexpected {type(error).__name__}: {said}; run again with -v for the trace"
    return masked(" ".join(text.split()))


@click.group(cls=_Group)
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say what goes on, and the trace of an error.")
def main(verbose: bool) -> None:
    """Language and embedding models inside Apache Flink jobs.

    A first look:      flink-llm demo

    One question:      flink-llm try "Where is order 1042?"

    A job of your own: flink-llm local up, then flink-llm doctor --config job.yaml,
    then flink-llm run job.yaml
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s")
    if not verbose:
        logging.getLogger("kafka").setLevel(logging.CRITICAL)  # it reports every lost socket as an error


@main.group()
def local() -> None:
    """A real Kafka broker on this machine, for developing.

    For example: flink-llm local up --topic orders:4 --topic replies
    """


@local.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Where to listen; chosen free at the first start.")
@click.option("--topic", "topics", multiple=True, metavar="NAME[:PARTITIONS]", help="Topics to make.")
@STATE
def up(port: int | None, topics: tuple[str, ...], state: Path | None) -> None:
    """Start the broker, make the topics, print its address.

    Without --topic the topics of jobs/llm_inference.yaml are made. It keeps its port and data until
    `flink-llm local down --wipe`.
    """
    broker = Broker(state or state_folder(), port)
    broker.up(topics or TOPICS)
    click.echo(broker.bootstrap_servers)


@local.command()
@click.option("--wipe", is_flag=True, help="Delete all that it has stored, and the demo's features.")
@STATE
def down(wipe: bool, state: Path | None) -> None:
    """Stop the broker."""
    from flink_llm.local.demo_job import forget

    folder = state or state_folder()
    broker = Broker(folder)
    was_up = broker.wipe() if wipe else broker.down()
    click.echo("stopped" if was_up else "it was not running")
    if wipe:
        forget(folder)
        click.echo(f"deleted what broker and demo had stored in {folder}")


@local.command()
@STATE
def status(state: Path | None) -> None:
    """Say whether the broker runs, and where. Exit status 1 when it does not."""
    folder = state or state_folder()
    broker = Broker(folder)
    process = broker.process
    click.echo(f"up at {broker.bootstrap_servers}, process {process.pid}" if process else f"down (state: {folder})")
    sys.exit(process is None)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
def run(config: Path) -> None:
    """Run the job of a YAML file on a mini-cluster here.

    CONFIG names the job, Kafka's topics, model folders and features; jobs/llm_inference.yaml is an
    example to copy. `flink-llm doctor --config CONFIG` checks it without running it. Ctrl-C ends the job.
    A pipeline with a handler of your own is a program of yours: docs/pipelines.md.
    """
    from flink_llm.config import load
    from flink_llm.local import checks

    checks.job(load(config).job).main(["--config", str(config)])


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("question", required=False)
@click.option("--user", default="user-1", show_default=True, help="Whose features the reply may use.")
@click.option("--session", help="The conversation; a new one if absent.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds of silence to wait for.")
def ask(config: Path, question: str | None, user: str, session: str | None, timeout: float) -> None:
    """Ask a running job a question through Kafka.

    Without QUESTION the terminal is asked for questions, until a line is empty.
    CONFIG is what the job was started with. The reply is printed as its tokens come.
    For example: flink-llm ask jobs/llm_inference.yaml "Where is order 1042?"
    """
    from flink_llm.config import load
    from flink_llm.local import talk

    talk.ask(load(config), question, user, session, timeout)


@main.command(name="try")
@click.argument("question")
@click.option("--user", default="user-1", show_default=True, help="Whose features the reply may use.")
@STATE
def try_(question: str, user: str, state: Path | None) -> None:
    """Ask the demo model one question, without Kafka.

    For example: flink-llm try "Where is order 1042?"
    """
    from flink_llm.local.trial import ask

    ask(question, user, state or state_folder())


@main.command()
@click.option("--events", default=200, show_default=True, type=click.IntRange(1), help="Sample events to send.")
@STATE
def demo(events: int, state: Path | None) -> None:
    """Run the main job here, from Kafka to Kafka.

    Broker, features, model and job start, a first reply is streamed, sample events are sent, then you may ask.
    Exit status 1 when a sample event got no reply.
    """
    from flink_llm.local.demo import Demo
    from flink_llm.local.processes import own_start

    sys.exit(not Demo(state or state_folder(), events, own_start()).run())


@main.command()
@click.option("--config", type=click.Path(path_type=Path), help="Check this job's configuration as well.")
@STATE
def doctor(config: Path | None, state: Path | None) -> None:
    """Check everything a job needs, and say what to do.

    Exit status 1 when something is missing. Without --config it looks at this machine,
    the local broker and the demo's model.
    """
    from flink_llm.local.doctor import examine

    sys.exit(not examine(config, state or state_folder()))


@main.group()
def features() -> None:
    """Set up the Feast repository of a job."""


@features.command(name="apply")
@click.argument("config", type=click.Path(path_type=Path))
def features_apply(config: Path) -> None:
    """Register the definitions of the repository that CONFIG names in `features.repo`."""
    from flink_llm.config import load
    from flink_llm.feature_admin import apply_repo

    settings = load(config).features
    if settings is None:
        raise ConfigError(f"{config} names no features.repo: add `features: {{repo: FOLDER}}`")
    apply_repo(settings)
    click.echo(f"applied {settings.repo}")


@features.command(name="fill")
@click.argument("config", type=click.Path(path_type=Path))
def features_fill(config: Path) -> None:
    """Apply the repository of CONFIG and write the demo's rows into it."""
    from flink_llm.config import load
    from flink_llm.feature_admin import apply_repo, fill_demo

    settings = load(config).features
    if settings is None:
        raise ConfigError(f"{config} names no features.repo: add `features: {{repo: FOLDER}}`")
    apply_repo(settings)
    for view, count in fill_demo(settings).items():
        click.echo(f"{view}: {count} rows")


@main.group()
def failures() -> None:
    """Read what a job could not answer, and send it again."""


def _which(command: Any) -> Any:
    for option in (
        click.option("--request", "requests", multiple=True, metavar="ID", help="Of these requests only."),
        click.option("--until", metavar="WHEN", help="Failed before then."),
        click.option("--since", metavar="WHEN", help="Failed then or later: 30m, 2h, 3d ago, or 2026-01-31T12:00."),
        click.option("--code", "codes", multiple=True, help="With this code (docs/records.md); may be repeated."),
        click.argument("config", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@failures.command(name="list")
@_which
@click.option("--limit", default=50, show_default=True, type=click.IntRange(0), help="Lines; the latest ones.")
def failures_list(config: Path, limit: int, **which: Any) -> None:
    """List the dead letters of the job CONFIG, and count them by code.

    For example: flink-llm failures list job.yaml --since 2h --code deadline
    """
    from flink_llm.local.replay import listed

    for line in listed(config, limit, **which):
        click.echo(line)


@failures.command(name="replay")
@_which
@click.option("--send", is_flag=True, help="Send them; without it, say only what would be sent.")
def failures_replay(config: Path, send: bool, **which: Any) -> None:
    """Send the originals of dead letters to their topics again.

    Each request once, with its id: one answered within operator.remember_s is not answered twice.
    What has expired is said and counted. Mend first what made them fail.

    For example: flink-llm failures replay job.yaml --code outage --since 3h --send
    """
    from flink_llm.local.replay import replayed

    for line in replayed(config, send, tell=lambda line: click.echo(line, err=True), **which):
        click.echo(line)


@main.command()
@click.argument("source")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--name", help="The model's name; the folder's by default.")
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "fp16", "int8", "int4"]), default="auto", show_default=True
)
@click.option(
    "--task",
    type=click.Choice(["embedding", "classifier", "token_classifier", "reranker"]),
    help="What an encoder is for; its architecture says it by default.",
)
@click.option("--texts", type=click.File(encoding="utf-8"), help="Texts to compare on, one a line, instead of ours.")
@click.option("--license", "license_name", default="", help="Licence to write down, an SPDX name.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A LoRA adapter of PEFT that requests may choose by NAME; may be given again.",
)
def export(
    source: str,
    to: Path,
    name: str | None,
    precision: Any,
    task: Any,
    texts: Any,
    license_name: str,
    adapters: tuple[str, ...],
) -> None:
    """Make a model folder of a Hugging Face model.

    SOURCE is a folder on this disk, or the id of a model on the hub. What is made is measured against it,
    or refused; `auto` takes the precision that is the fastest here.

    For example: flink-llm export ./Llama-3.2-1B-Instruct --to models/llama
    """
    from flink_llm.engine.export import Order, export_model
    from flink_llm.local.processes import cleaned_up

    lines = [line.strip() for line in texts or ()]
    folders: dict[str, Path] = {}
    for given in adapters:
        adapter, separator, folder = given.partition("=")
        if not separator or not folder or adapter in folders:
            raise click.BadParameter(f"{given!r}: say NAME=FOLDER, each name once", param_hint="--adapter")
        folders[adapter] = Path(folder)
    order = Order(name or to.name, precision, task, [line for line in lines if line], license_name, folders)
    with cleaned_up(lambda: None):  # a signal ends it as an error does: what is half made goes
        made = export_model(source, to, order, click.echo)
    click.echo(f"{to}: {made.precision}, {sum(file.bytes for file in made.files.values()):,} bytes, {made.parity}")


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--slots", default=16, show_default=True, type=click.IntRange(1), help="Generations at once.")
def models(path: Path, slots: int) -> None:
    """Check a model folder or a deployment file, and print what it holds.

    Every file is compared with its manifest. MB is what a host reckons against `host.memory_mb`.
    """
    from flink_llm.local.models import table

    for line in table(path, slots):
        click.echo(line)


@main.command()
@click.option("--config", required=True, type=click.Path(path_type=Path), help="The job's YAML file.")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--flavour",
    type=click.Choice(["cpu", "gpu"]),
    help="What the task managers have; by default what is installed here.",
)
def package(config: Path, to: Path, flavour: str | None) -> None:
    """Gather a submission, and print its `flink run` line.

    The line alone goes to standard output; what the cluster needs besides is said beside it.
    """
    from flink_llm.local.package import pack

    packed = pack(config, to, flavour=flavour)
    for note in packed.notes:
        click.echo(f"- {note}", err=True)
    click.echo(packed.line)


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def host(arguments: tuple[str, ...]) -> None:
    """Serve models on this machine; jobs start it themselves."""
    from flink_llm.engine.host import main as serve

    logging.getLogger("flink_llm").setLevel(logging.INFO)  # where it listens, and who comes and goes
    serve(list(arguments), prog_name="flink-llm host")
