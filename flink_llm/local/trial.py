"""The first look: the real job over one request in a file, without Kafka."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console

from flink_llm.errors import LocalError
from flink_llm.local import demo_job


def ask(question: str, user: str, state: Path) -> None:
    """Runs the main job over one request, and prints the reply. Raises LocalError."""
    console = Console(stderr=True)
    demo_job.demo_model()
    with console.status("preparing features ..."):
        demo_job.prepare(state)
    with tempfile.TemporaryDirectory(prefix="flink-llm-try-") as folder:
        requests, outcomes = Path(folder) / "requests.jsonl", Path(folder) / "outcomes"
        requests.write_text(json.dumps(demo_job.request(question, user, "try")) + "\n")
        raw = demo_job.configuration(state, files={"requests": str(requests), "outcomes": str(outcomes)})
        config = Path(folder) / "try.yaml"
        config.write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "flink_llm", "run", str(config)]
        with console.status("running the job on a mini-cluster ..."):
            ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if ran.returncode:
            words = [line for line in ran.stderr.splitlines() if line.strip()]
            raise LocalError(f"the job failed: {words[-1] if words else 'no reason given'}")
        Console().print(reply(outcomes), highlight=False, markup=False)


def reply(outcomes: Path) -> str:
    """The text of the one response. Raises LocalError: a failure, or no outcome at all."""
    for file in sorted(outcomes.rglob("*")):
        if not file.is_file():
            continue
        for line in file.read_text().splitlines():
            outcome = json.loads(line)
            if "code" in outcome:
                raise LocalError(f"{outcome['code']}: {outcome['message']}")
            if "finish_reason" in outcome:
                text: str = outcome["text"]
                return text
    raise LocalError("the job ended without an outcome; run it with `flink-llm demo` to see its log")
