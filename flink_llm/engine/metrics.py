"""What a host counts, for Prometheus: requests, waiting, tokens, latencies and cache of each model and lane.

`Metrics` has the families and their registry, one for each host; `ModelMetrics` is a model's part of them,
`RequestMetrics` follows one request from its arrival to its end. Children are looked up once for each lane,
so that a step of the engine adds to numbers and builds no label: under a microsecond for a step, a third of
one for a token. Every metric stands in docs/metrics.md.
"""

import time
import weakref
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from flink_llm.priorities import lane_of

HASH_DIGITS = 12
"""Of a model's hash, as many as tell its versions apart: the label has one value for each that is loaded."""
LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_MODEL = ("model", "model_hash")
_LANE = (*_MODEL, "lane")


class Metrics:
    """The families of one host, in a registry of their own. Safe to read while the engine adds to them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, labels: tuple[str, ...]) -> Gauge:
            return Gauge(f"flink_llm_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"flink_llm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"flink_llm_{name}", text, labels, buckets=buckets, registry=registry)

        self.queue_length = gauge("queue_length", "Requests that wait", _LANE)
        self.running = gauge("requests_running", "Requests that a model works on", _LANE)
        self.slots = gauge("slots", "Generations that can run at once", _MODEL)
        self.cache_capacity = gauge("cache_capacity_tokens", "Tokens that the KV cache has room for", _MODEL)
        self.cache = gauge("cache_tokens", "Tokens in the KV cache, in use or kept for reuse", (*_MODEL, "state"))
        self.requests = counter("requests_total", "Requests that have ended", (*_LANE, "outcome"))
        self.prompt_read = counter("prompt_tokens_read_total", "Tokens of prompts that were computed", _LANE)
        self.prompt_reused = counter("prompt_tokens_reused_total", "Tokens of prompts found in the cache", _LANE)
        self.completion = counter("completion_tokens_total", "Tokens that were generated", _LANE)
        self.queue = histogram("queue_seconds", "From a request's arrival until it runs", _LANE, LATENCY_S)
        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", _LANE, LATENCY_S
        )
        self.per_token = histogram(
            "time_per_output_token_seconds", "Between two tokens, a reply's mean", _LANE, TOKEN_S
        )
        self.whole = histogram("request_seconds", "From arrival to end, of what was answered", _LANE, LATENCY_S)
        self.batch = histogram("batch_size", "Requests that share a step, or a run of an encoder", _MODEL, ROWS)
        self.guessed = counter("guessed_tokens_total", "Tokens of speculation", (*_MODEL, "outcome"))
        self._models: dict[str, ModelMetrics] = {}

    def model(self, name: str, sha256: str) -> "ModelMetrics":
        """The part of the model with this hash, made at the first call."""
        if sha256 not in self._models:
            self._models[sha256] = ModelMetrics(self, name, sha256[:HASH_DIGITS])
        return self._models[sha256]

    def forget(self, sha256: str) -> None:
        """Removes every series of a model that is not served any more."""
        gone = self._models.pop(sha256, None)
        if gone is None:
            return
        for family in vars(self).values():
            if isinstance(family, (Gauge, Counter, Histogram)):
                family.remove_by_labels({"model": gone.name, "model_hash": gone.hash})


class ModelMetrics:
    """One model's metrics."""

    def __init__(self, of: Metrics, name: str, digits: str) -> None:
        self.name = name
        self.hash = digits
        self._of = of
        self._batch = of.batch.labels(name, digits)
        self._right, self._wrong = (of.guessed.labels(name, digits, outcome) for outcome in ("right", "wrong"))
        self._lanes: dict[int, LaneMetrics] = {}

    def request(self, priority: int, now: float | None = None) -> "RequestMetrics":
        """A request that has arrived, at the monotonic second `now`."""
        lane = lane_of(priority)
        if lane not in self._lanes:
            self._lanes[lane] = LaneMetrics(self._of, (self.name, self.hash, str(lane)))
        return RequestMetrics(self._lanes[lane], time.monotonic() if now is None else now)

    def step(self, rows: int) -> None:
        """A step, or a run of an encoder, that `rows` requests share."""
        self._batch.observe(rows)

    def guess(self, right: int, wrong: int) -> None:
        """What became of the tokens of a guess."""
        self._right.inc(right)
        self._wrong.inc(wrong)

    def watch_cache(self, slots: int, context: int, held: Callable[[bool], int]) -> None:
        """A cache of `slots` times `context` tokens. `held`: how many are in slots that are busy, or free.

        `held`, a method, is called whenever somebody reads the metrics, on a thread of its own. Its model is
        not kept alive for it: a gauge with a function is a cycle, which would outlive the model's unloading.
        """
        found = weakref.WeakMethod(held)

        def tokens(busy: bool) -> int:
            method = found()
            return 0 if method is None else method(busy)

        labels = (self.name, self.hash)
        self._of.slots.labels(*labels).set(slots)
        self._of.cache_capacity.labels(*labels).set(slots * context)
        self._of.cache.labels(*labels, "used").set_function(lambda: tokens(True))
        self._of.cache.labels(*labels, "kept").set_function(lambda: tokens(False))


class LaneMetrics:
    """One lane of one model."""

    def __init__(self, of: Metrics, labels: tuple[str, str, str]) -> None:
        self._requests = of.requests
        self._labels = labels
        self.waiting = of.queue_length.labels(*labels)
        self.running = of.running.labels(*labels)
        self.read = of.prompt_read.labels(*labels)
        self.reused = of.prompt_reused.labels(*labels)
        self.completion = of.completion.labels(*labels)
        self.queue = of.queue.labels(*labels)
        self.first_token = of.first_token.labels(*labels)
        self.per_token = of.per_token.labels(*labels)
        self.whole = of.whole.labels(*labels)

    def ended(self, outcome: str) -> None:
        """One more request has ended so."""
        self._requests.labels(*self._labels, outcome).inc()


class RequestMetrics:
    """One request: waits from its making on, runs once it has `began`, and ends once.

    Made on any thread, told of the rest by one. Times are monotonic seconds.
    """

    __slots__ = ("_ended", "_first", "_lane", "_latest", "_runs", "_tokens", "arrived")

    def __init__(self, lane: LaneMetrics, arrived: float) -> None:
        self.arrived = arrived
        self._lane = lane
        self._runs = self._ended = False
        self._first = self._latest = 0.0
        self._tokens = 0
        lane.waiting.inc()

    def began(self, now: float, *, reused: int = 0) -> None:
        """It runs; `reused` tokens of its prompt are in the cache already."""
        if self._runs or self._ended:
            return
        self._runs = True
        self._lane.waiting.dec()
        self._lane.running.inc()
        self._lane.queue.observe(now - self.arrived)
        if reused:
            self._lane.reused.inc(reused)

    def read(self, tokens: int) -> None:
        """So many tokens of the prompt were computed."""
        self._lane.read.inc(tokens)

    def token(self, now: float) -> None:
        """One more token was generated."""
        self._lane.completion.inc()
        if not self._tokens:
            self._first = now
            self._lane.first_token.observe(now - self.arrived)
        self._tokens += 1
        self._latest = now

    def ended(self, outcome: str, now: float | None = None) -> None:
        """It is over, once: stop, length, cancelled, refused_full, refused_deadline, invalid, failed, outage."""
        if self._ended:
            return
        self._ended = True
        (self._lane.running if self._runs else self._lane.waiting).dec()
        self._lane.ended(outcome)
        if outcome in ("stop", "length"):
            self._lane.whole.observe((time.monotonic() if now is None else now) - self.arrived)
            if self._tokens > 1:
                self._lane.per_token.observe((self._latest - self._first) / (self._tokens - 1))
