"""Resident memory of the model hosts with one client process and with four: a device's models are loaded once.

Each client is a process of its own that loads the model, generates, and stays. Counted is every process
that runs the host's module, whoever started it, by proportional set size (shared pages once).
"""

import argparse
import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import shapes
from benchmarks.machine import CORES, isa
from benchmarks.shapes import Shape, prompt

CLIENT = """
import asyncio, sys
from flink_llm.engine.client import open_engine
from flink_llm.engine.generation import Model
from flink_llm.engine.settings import HostSettings

async def main(folder, sockets, text, tokens):
    model = Model(open_engine(HostSettings(device="cpu", socket_dir=sockets, linger_s=1.0)), "model", folder)
    await model.load()
    await asyncio.gather(*(model.generate(text, max_tokens=int(tokens))._whole() for _ in range(4)))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(*sys.argv[1:]))
"""
START_S = 120.0


def hosts(sockets: str) -> list[psutil.Process]:
    """The hosts that serve sockets below a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(word.startswith(sockets) for word in process.cmdline()) and "--socket" in process.cmdline():
                found.append(process)
    return found


def resident_mib(folder: Path, shape: Shape, clients: int, tokens: int) -> tuple[float, int]:
    """Memory of all hosts once `clients` processes have generated, and how many hosts there are."""
    text = prompt(shape, "memory", 16)[1]
    with tempfile.TemporaryDirectory(prefix="flink-llm-") as sockets, contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", CLIENT, str(folder), sockets, text, str(tokens)]
        running = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for _ in range(clients)
        ]
        try:
            for client in running:
                if client.stdout is None or client.stdout.readline() != b"ready\n":
                    raise RuntimeError("a client has ended")
            found = hosts(sockets)
            return sum(host.memory_full_info().pss for host in found) / 2**20, len(found)
        finally:
            for client in running:
                client.kill()
            _wait_for_end(sockets)


def _wait_for_end(sockets: str) -> None:
    deadline = time.monotonic() + START_S
    while hosts(sockets) and time.monotonic() < deadline:
        time.sleep(0.1)


def measure(folder: Path, shape: Shape, tokens: int) -> dict[str, Any]:
    """One client against four."""
    one, _ = resident_mib(folder, shape, 1, tokens)
    four, count = resident_mib(folder, shape, 4, tokens)
    return {
        "ratio": round(four / one, 3),
        "one_client_mib": round(one, 1),
        "four_clients_mib": round(four, 1),
        "hosts_of_four": count,
        "isa": isa(),
        "cores": CORES,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short replies")
    parser.add_argument("--precision", default="int8", help="of the exported model (default: int8)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    folder = shapes.exported(shapes.source(shapes.SMOLLM2), args.precision)
    print(json.dumps(measure(folder, shapes.SMOLLM2, 8 if args.quick else 64)))


if __name__ == "__main__":
    main()
