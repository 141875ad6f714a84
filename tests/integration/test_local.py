"""`flink-llm local`: one broker's life, from the command line."""

import socket
import sys

from click.testing import CliRunner
from kafka import KafkaConsumer, KafkaProducer

from flink_llm import cli
from flink_llm.local import processes
from flink_llm.local.broker import Broker


def test_a_brokers_life(tmp_path):
    state = tmp_path / ("jürgens state" if sys.getfilesystemencoding() == "utf-8" else "state")  # as Java reads it

    def local(*arguments):
        ran = CliRunner().invoke(cli.main, ["local", *arguments, "--state", str(state)])
        return ran.exit_code, " ".join(ran.output.split())

    try:
        assert local("status") == (1, f"down (state: {state})")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            refused = f"flink-llm: port {port} is in use: give another one with --port"
            assert local("up", "--port", str(port)) == (1, refused)
        status, address = local("up", "--topic", "notes")
        assert (status, local("up", "--topic", "notes")) == (0, (0, address)), "up twice is up"
        process = Broker(state).process
        assert local("status") == (0, f"up at {address}, process {process.pid}")
        other = str(processes.free_port())
        refused = (
            f"flink-llm: the broker is up at port {address.split(':')[1]} already: run `flink-llm local down` first"
        )
        assert local("up", "--port", other) == (1, refused)

        producer = KafkaProducer(bootstrap_servers=address)
        producer.send("notes", b"kept").get(timeout=10)
        producer.close()
        assert local("down") == (0, "stopped")
        assert local("down") == (0, "it was not running")
        assert local("up", "--topic", "notes") == (0, address), "the port is kept"
        consumer = KafkaConsumer(
            "notes", bootstrap_servers=address, auto_offset_reset="earliest", group_id=None, consumer_timeout_ms=10_000
        )
        assert next(consumer).value == b"kept"
        consumer.close()

        process = Broker(state).process
        assert local("down", "--wipe") == (0, f"stopped deleted what broker and demo had stored in {state}")
        assert process.process() is None
        assert not (state / "kafka").exists()
        assert local("status") == (1, f"down (state: {state})")
    finally:
        Broker(state).wipe()
