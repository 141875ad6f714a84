"""Crashes at any point: each request has one result, and its tokens, read by the rule, are that result's text."""

import random
import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm import codec
from flink_llm.handler import AsyncUdf
from flink_llm.records import ChatRequest, TokenRecord, reply_text
from flink_llm.testing import FakeServices, Harness, Script, copy_state


class Streamed(AsyncUdf):
    async def open(self, ctx):
        self.model = ctx.model("m")

    async def call(self, request: ChatRequest, ctx):
        reply = self.model.chat(request.messages)
        async for token in reply:
            await ctx.emit(token)
        return {"request_id": request.request_id, "text": reply.text, "generation_id": reply.generation_id}


class Job:
    """A job over one partition, as Flink and Kafka run it: rewound by a crash to its last checkpoint.

    No two generations of a request say the same, so that a reader who mixes them up is found out.
    """

    def __init__(self) -> None:
        self.source: list[dict[str, Any]] = []
        self.results: list[Any] = []
        self.tokens: list[TokenRecord] = []
        self._lives = 0
        self._saved: tuple[Any, int] = (None, 0)
        self._start()

    def _start(self) -> None:
        self._lives += 1
        said = Script(text=f"{{last}}, as was said in life {self._lives}", tokens=4, first_ms=1, gap_ms=1)
        saved, self._read = self._saved
        state = copy_state(saved) if saved is not None else None  # a checkpoint may be restored again
        self._harness = Harness(Streamed(), FakeServices({"m": said}), state=state)
        self._harness.__enter__()
        self._taken = 0
        self._unflushed: list[TokenRecord] = []

    def send(self, number: int) -> None:
        self.source.append(
            {"request_id": f"r{number}", "session_id": f"s{number % 2}",
             "messages": [{"role": "user", "content": f"question {number}"}]}
        )  # fmt: skip
        self._go_on()

    def wait(self) -> None:
        time.sleep(0.003)
        self._go_on()

    def _go_on(self) -> None:
        for request in self.source[self._read :]:
            self._harness.send(request)
        self._read = len(self.source)
        self._harness.outputs += self._harness.shard.drain()

    def checkpoint(self) -> None:
        self._go_on()
        new = self._harness.outputs[self._taken :]
        self._taken += len(new)
        self.results += [codec.decode(output.value) for output in new if output.kind == "result"]
        self.tokens += self._pieces(new)
        self._saved = (self._harness.checkpoint(), self._read)

    def crash(self, flushed: float) -> None:
        """Of the tokens since the checkpoint, the first ones had reached the broker."""
        pieces = self._pieces(self._harness.outputs[self._taken :])
        self.tokens += pieces[: int(flushed * len(pieces))]
        self._harness.__exit__()
        self._start()
        self._go_on()

    def end(self) -> None:
        self._harness.finish()
        self.checkpoint()
        self._harness.__exit__()

    @staticmethod
    def _pieces(outputs: list[Any]) -> list[TokenRecord]:
        return [codec.decode(output.value, TokenRecord) for output in outputs if output.kind == "partial"]


ACTIONS = st.lists(
    st.one_of(
        st.just(("send",)), st.just(("send",)), st.just(("wait",)), st.just(("wait",)), st.just(("checkpoint",)),
        st.tuples(st.just("crash"), st.floats(0, 1)),
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(ACTIONS, st.randoms())
def test_a_reader_who_follows_the_rule_has_exactly_the_final_text(actions: list[Any], chance: random.Random) -> None:
    job = Job()
    for number, (action, *arguments) in enumerate(actions):
        getattr(job, action)(*([number] if action == "send" else arguments))
    job.end()
    chance.shuffle(job.tokens)
    assert sorted(result["request_id"] for result in job.results) == sorted(
        request["request_id"] for request in job.source
    )
    for result in job.results:
        mine = [piece for piece in job.tokens if piece.request_id == result["request_id"]]
        assert reply_text(mine, result["generation_id"]) == result["text"]
