"""What became of the demo's sample events: their times, and the table that says them."""

import time
from typing import Any

from rich.table import Table


class Tally:
    """Events that were sent at once, and what has come of them. `sent` holds when, by request id."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}
        self.replies: list[dict[str, Any]] = []
        self._first: dict[str, float] = {}
        self._latency: dict[str, float] = {}

    @property
    def ended(self) -> int:
        """Events with a reply or a failure."""
        return len(self._latency)

    def note(self, topic: str, value: dict[str, Any]) -> bool:
        """Takes in what arrived; whether it is an event's reply, and its first: they come at least once."""
        now, identifier = time.monotonic(), value["request_id"]
        if identifier not in self.sent:
            return False
        if topic == "chat.tokens":
            self._first.setdefault(identifier, now - self.sent[identifier])
            return False
        if identifier in self._latency:
            return False
        self._latency[identifier] = now - self.sent[identifier]
        if topic == "chat.responses":
            self.replies.append(value)
        return topic == "chat.responses"

    def table(self, seconds: float, first_reply: str) -> Table:
        """The summary, of `seconds` from the first event to the last outcome."""
        tokens = sum(reply["usage"]["completion_tokens"] for reply in self.replies)
        each = [reply["timings"]["per_token_ms"] for reply in self.replies]
        first, latency = list(self._first.values()), list(self._latency.values())
        together = f"{len(self.sent)} at once"
        rows = {
            "first streamed reply": first_reply,
            "answered": f"{len(self.replies)} of {len(self.sent)}",
            "failures": str(self.ended - len(self.replies)),
            "throughput": f"{len(self.replies) / seconds:.0f} replies/s, {tokens / seconds:.0f} tokens/s",
            f"to the first token, {together}, p50": f"{_quantile(first, 0.5) * 1000:.0f} ms",
            f"per further token, {together}, p50": f"{_quantile(each, 0.5):.1f} ms",
            f"end to end, {together}, p50 / p99": (
                f"{_quantile(latency, 0.5) * 1000:.0f} / {_quantile(latency, 0.99) * 1000:.0f} ms"
            ),
        }
        table = Table(title="Kafka to Kafka", show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        return table


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
