"""Speculation: what is guessed from the text changes how fast a reply comes, never what it says."""

import asyncio

import pytest

from flink_llm.engine.decoder import Decoder
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.export import export_decoder
from flink_llm.engine.generation import Model
from flink_llm.engine.lookup import Costs, Lookup, Payoff
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import WorkTable
from tests import tiny

SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}}}, "required": ["a"]}
OPTIONS = [
    {"regex": "[a-z]{3}[a-z ,]{90}", "max_tokens": 100},
    {},
    {"max_tokens": 3},
    {"max_tokens": 2000},
    {"temperature": 0.3, "seed": 3},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.05, "seed": 4},
    {"repetition_penalty": 1.05, "presence_penalty": 0.1},
    {"frequency_penalty": 0.02, "logprobs": 2},
    {"json_schema": SCHEMA, "max_tokens": 120},
    {"stop": ["\n", "e"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = tiny.llama(tmp_path_factory.mktemp("source") / "llama")
    to = tmp_path_factory.mktemp("models") / "tiny"
    export_decoder(source, to, name="tiny", precision="fp32")
    return to


def replies(folder, *, speculation, together):
    async def run():
        settings = HostSettings(device="cpu", slots=4, threads=1, speculation=speculation)
        backend = OnnxBackend(settings)
        table = WorkTable(backend)
        model = Model(table, "tiny", str(folder))
        await model.load()
        prompts = ["so it goes, " * 5 + str(i) for i in range(len(OPTIONS))]
        asked = [model.generate(p, **{"max_tokens": 60} | o) for p, o in zip(prompts, OPTIONS, strict=True)]
        done = await asyncio.gather(*asked) if together else [await one for one in asked]
        done.append(await model.generate(prompts[0] + done[0].text, max_tokens=30))  # which the cache holds already
        guessed = model_metrics(backend)
        await table.close()
        return guessed, [(one.text, one.finish_reason, one.usage.completion_tokens, one.logprobs) for one in done]

    return asyncio.run(run())


def model_metrics(backend):
    registry = backend._metrics.registry
    samples = [sample for family in registry.collect() for sample in family.samples]
    return {one.labels["outcome"]: one.value for one in samples if one.name == "flink_llm_guessed_tokens_total"}


@pytest.fixture
def always(monkeypatch):
    """Guesses whenever there is something to guess; how many tokens of each guess were right."""
    right = []
    monkeypatch.setattr(Payoff, "worth_it", lambda self: True)
    monkeypatch.setattr(Payoff, "record", lambda self, accepted, cost: right.append(accepted))
    monkeypatch.setattr(Costs, "allow", lambda self, size, guessed: True)
    return right


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_guesses_change_no_reply(folder, always, together):
    counted, guessed = replies(folder, speculation=True, together=together)
    assert counted["right"] == sum(always) and counted["wrong"] > 0
    assert sum(always) > 20, "hardly any guess was right: nothing was tried"
    assert 0 in always, "no guess was wrong: nothing was tried"
    right = len(always)
    counted, plain = replies(folder, speculation=False, together=together)
    assert counted == {"right": 0, "wrong": 0}
    assert len(always) == right, "guessed though it was turned off"
    assert [one[:3] for one in guessed] == [one[:3] for one in plain]
    for one, other in zip(guessed, plain, strict=True):
        assert [token.id for token in one[3]] == [token.id for token in other[3]]
        assert [token.logprob for token in one[3]] == pytest.approx([token.logprob for token in other[3]], abs=1e-3)


def test_costs_are_told_in_tokens_of_plain_steps():
    costs = Costs()
    assert not costs.allow(1, 12), "nothing is known of a step yet"
    costs.step(1, 0.010)
    assert costs.allow(1, 1), "nothing is known of a run yet: try"
    assert costs.run(1, 3, 0.030) == pytest.approx(3)
    assert costs.allow(1, 3)
    assert not costs.allow(1, 2), "two guessed and one more are what three steps bring"
    assert costs.allow(1, 8), "nothing is known of so long a run"
    costs.run(1, 12, 0.030)
    costs.step(8, 0.020)
    assert not costs.allow(8, 11), "eight texts make twelve tokens in the time of a run"
    assert costs.allow(8, 12)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 7}, {"repetition_penalty": 1.1}], ids=str)
@pytest.mark.parametrize("right", [0, 3, 40])
def test_a_guess_may_be_read_with_the_prompt(folder, monkeypatch, options, right):
    async def run():
        backend = OnnxBackend(HostSettings(device="cpu", slots=2, threads=1))
        table = WorkTable(backend)
        model = Model(table, "tiny", str(folder))
        await model.load()
        monkeypatch.setattr(Lookup, "guess", lambda self, limit=None, least=0: [])
        asked = dict(prompt="and so it goes", max_tokens=30, **options)
        plain = await model.generate(**asked, logprobs=0)
        said = [token.id for token in plain.logprobs]
        wrong = [(said[right] + 1) % 500] if right < len(said) else []
        monkeypatch.setattr(
            Lookup, "guess", lambda self, limit=None, least=0: [*said[:right], *wrong][:limit] if least else []
        )
        again = await model.generate(**asked)
        counted = model_metrics(backend)
        followed = await model.generate(asked["prompt"] + plain.text, max_tokens=5)  # over what the cache holds by now
        monkeypatch.setattr(Lookup, "guess", lambda self, limit=None, least=0: [])
        alone = await model.generate(asked["prompt"] + plain.text, max_tokens=5)
        await table.close()
        return plain, again, counted, followed, alone

    plain, again, counted, followed, alone = asyncio.run(run())
    assert counted["right"] == min(right, 29) and counted["wrong"] == (right < 30), "it was not read with the prompt"
    assert (again.text, again.finish_reason, again.usage) == (plain.text, plain.finish_reason, plain.usage)
    assert followed.text == alone.text


def test_a_run_that_fails_with_a_guess_is_made_without(folder, monkeypatch):
    read = Decoder.read
    failed = []

    def failing(self, slot, tokens, start, first=0):
        if len(tokens) > 20:
            failed.append(len(tokens))
            raise MemoryError("too long")
        return read(self, slot, tokens, start, first)

    async def run():
        table = WorkTable(OnnxBackend(HostSettings(device="cpu", slots=2, threads=1)))
        model = Model(table, "tiny", str(folder))
        await model.load()
        monkeypatch.setattr(Lookup, "guess", lambda self, limit=None, least=0: [])
        plain = await model.generate("and so it goes", max_tokens=9)
        monkeypatch.setattr(Decoder, "read", failing)
        monkeypatch.setattr(Lookup, "guess", lambda self, limit=None, least=0: [7] * 30 if least else [])
        again = await model.generate("and so it goes", max_tokens=9)
        await table.close()
        return plain.text, again.text

    plain, again = asyncio.run(run())
    assert again == plain and len(failed) == 1
