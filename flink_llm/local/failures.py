"""What a job on the mini-cluster fails of, told on stderr: Flink says it in its log only, restarts, and goes on so."""

import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flink_llm.local.cluster import flink_home, last_words

POLL_S = 1.0
AGAIN_S = 60.0
"""The same failure is told again after so long."""


def log_folder() -> Path:
    """Where Flink writes its log in this process."""
    chosen = os.environ.get("FLINK_LOG_DIR")
    return Path(chosen) if chosen else flink_home() / "log"


def watch(port: int) -> None:
    """Tells the failures of whatever jobs run behind Flink's REST port, as long as this process lives."""
    seen = Failures()

    def run() -> None:
        while True:
            time.sleep(POLL_S)
            for line in seen.new(lambda path: _rest(port, path), time.monotonic()):
                print(f"flink-llm: {line} (Flink's log: {log_folder()})", file=sys.stderr, flush=True)

    threading.Thread(target=run, name="flink-llm failures", daemon=True).start()


class Failures:
    """The failures that have been told."""

    def __init__(self) -> None:
        self._latest: dict[str, int] = {}
        self._told: dict[tuple[str, str], float] = {}

    def new(self, rest: Callable[[str], Any], now: float) -> Iterator[str]:
        """Those that have not been told, one line each; none while Flink does not answer."""
        try:
            for job in rest("/jobs/overview")["jobs"]:
                for entry in reversed(rest(f"/jobs/{job['jid']}/exceptions")["exceptionHistory"]["entries"]):
                    yield from self._line(job, entry, now)
        except (OSError, ValueError, KeyError):  # it starts, or has ended
            return

    def _line(self, job: dict[str, Any], entry: dict[str, Any], now: float) -> Iterator[str]:
        if entry["timestamp"] <= self._latest.get(job["jid"], 0):
            return
        self._latest[job["jid"]] = entry["timestamp"]
        why = job["jid"], last_words(entry["stacktrace"])
        if job["state"] != "FAILED" and now >= self._told.get(why, -AGAIN_S) + AGAIN_S:
            self._told[why] = now
            yield f"the job {job['name']} has failed and is restarted: {why[1]}"


def _rest(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return json.load(answer)
