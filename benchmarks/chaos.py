"""Is anything lost or doubled when parts are killed, stopped, cut off or run full? Exactly once, counted.

One job on a standalone cluster of two task managers with ZooKeeper, Python in processes of its own, a real
broker, Redis where `redis-server` is installed, and the real model host. Each scenario strikes while at least
100 calls are in flight; an independent read_committed consumer counts every id, and puts each reply together
from its tokens as a reader would. Recovery is from the blow to the first result of a call that ended after it,
beside the same job's own cold start.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.faults.checker import Checker, Sender, Tally
from benchmarks.faults.scenarios import REDIS, SCENARIOS, SHORT, Row, Run
from benchmarks.faults.stack import CHECKPOINT_MS, PARALLELISM, Stack
from flink_llm.local import processes

KEYS = 1000
RATE, QUICK_RATE = 300, 80
LONG_CHECKPOINT_MS = 1000
"""With a fifth of it two cores do a hundred requests a second, and a scenario takes a quarter of an hour."""
RECORDS, QUICK_RECORDS = 100_000, 1_000
_COLUMNS = ("blows", "in_flight", "recovery_s")
_COUNTS = Tally.__struct_fields__


def measure(
    folder: Path,
    names: Sequence[str],
    *,
    records: int,
    rate: float,
    parallelism: int = PARALLELISM,
    checkpoint_ms: int = CHECKPOINT_MS,
    tell: Any = print,
) -> Iterator[dict[str, Any]]:
    """Runs scenarios on one job; see the module. What was found so far, after each; `tell` is given each line."""
    rows: list[Row] = []
    with Stack(folder, parallelism, checkpoint_ms) as stack:
        servers = stack.broker.bootstrap_servers
        with (
            Checker(servers, stack.topics) as checker,
            Sender(servers, stack.topics["requests"], rate, KEYS, lambda: checker.answered) as sender,
        ):
            run = Run(stack, sender, checker, records)
            cold_start = run.cold_start()
            tell(f"cold start {cold_start:.1f} s" + ("" if stack.redis else "; no redis-server: features from sqlite"))
            tell(_line("scenario", *_COLUMNS, *_COUNTS, "fenced", "not_committed", "orphans", "revived"))
            for name in names:
                if name in REDIS and not stack.redis:
                    tell(f"{name} left out: redis-server is not installed")
                    continue
                rows.append(run.scenario(name))
                tell(_told(rows[-1]))
                yield {**_summary(rows, cold_start), "revived": stack.revived}


def _summary(rows: Sequence[Row], cold_start: float) -> dict[str, Any]:
    totals = {name: sum(getattr(row.tally, name) for row in rows) for name in _COUNTS}
    recovery = {row.scenario: round(row.recovery_s, 1) for row in rows}
    return {
        **totals,
        "worker_recovery_s": recovery.get("kill-worker"),
        "taskmanager_recovery_s": recovery.get("kill-taskmanager"),
        "cold_start_s": round(cold_start, 1),
        "in_flight_at_blow_min": min((row.in_flight for row in rows), default=0),
        "recovery_s": recovery,
        "blows": sum(row.blows for row in rows),
        "orphans": sum(row.orphans for row in rows),
    }


def _told(row: Row) -> str:
    counts = (*msgspec.structs.astuple(row.tally), row.fenced, row.not_committed, row.orphans, row.revived)
    return _line(row.scenario, row.blows, row.in_flight, f"{row.recovery_s:.1f}", *counts)


def _line(first: str, *others: object) -> str:
    return first.ljust(18) + "".join(str(other).rjust(14) for other in others)


def bars_met(found: dict[str, Any]) -> bool:
    """Whether nothing was lost or doubled, no worker is left over, and recovery took no longer than it may."""
    cold = found["cold_start_s"]
    return (
        not any(found[name] for name in (*_COUNTS, "orphans") if name != "requests")
        and found["in_flight_at_blow_min"] >= 100
        and (found["worker_recovery_s"] or 0) <= max(10, 2 * cold)
        and (found["taskmanager_recovery_s"] or 0) <= max(30, 3 * cold)
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    short = f"{QUICK_RECORDS:,} requests per scenario instead of {RECORDS:,}, {QUICK_RATE} a second instead of {RATE}"
    often = f"a checkpoint every {CHECKPOINT_MS} ms instead of {LONG_CHECKPOINT_MS:,}"
    parser.add_argument("--quick", action="store_true", help=f"{short}, {often}")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="only this one; may be repeated")
    parser.add_argument("--records", type=int, help="requests per scenario, at least")
    args = parser.parse_args()
    records = args.records or (QUICK_RECORDS if args.quick else RECORDS)
    names = args.scenario or [name for name in SCENARIOS if name != SHORT]
    rate, checkpoint_ms = (QUICK_RATE, CHECKPOINT_MS) if args.quick else (RATE, LONG_CHECKPOINT_MS)
    began, found = time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="flink-llm-chaos-") as folder, processes.cleaned_up(lambda: None):
        try:
            for found in measure(
                Path(folder), names, records=records, rate=rate, checkpoint_ms=checkpoint_ms,
                tell=lambda line: print(line, flush=True),
            ):  # fmt: skip
                found["minutes"] = round((time.monotonic() - began) / 60, 1)
        finally:  # all of it takes hours: what was found before an early end is told
            print(json.dumps(found))
    raise SystemExit(0 if found and bars_met(found) else 1)


if __name__ == "__main__":
    main()
