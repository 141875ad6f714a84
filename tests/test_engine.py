"""The engine on tiny random models: exact whoever shares the batch, and whatever a client does."""

import asyncio
import os
import shutil

import numpy as np
import onnx_ir
import pytest

from flink_llm.engine import decoder as decoder_module
from flink_llm.engine import graphs
from flink_llm.engine.decoder import Decoder
from flink_llm.engine.engine import OnnxBackend
from flink_llm.engine.export import export_decoder
from flink_llm.engine.generation import Model
from flink_llm.engine.model import open_model_folder
from flink_llm.engine.readers import Classifier, Embedder
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import WorkTable
from flink_llm.errors import ConfigError, RecordError
from tests import tiny

SETTINGS = HostSettings(device="cpu", slots=4, threads=1, cache_mb=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module", params=["fp32", "int8"])
def folder(request, source, tmp_path_factory):
    to = tmp_path_factory.mktemp("models") / request.param
    manifest = export_decoder(source, to, name="tiny", precision=request.param)
    assert manifest.parity["greedy_match"] == 1.0
    return to


def run(folder, work, kind=Model):
    async def inside():
        table = WorkTable(OnnxBackend(SETTINGS))
        model = kind(table, "tiny", str(folder))
        try:
            await model.load()
            return await work(model)
        finally:
            await table.close()

    return asyncio.run(inside())


def say(text):
    return [{"role": "user", "content": text}]


def test_a_reply_does_not_depend_on_its_neighbours(folder):
    prompts = [f"question number {i} " * (1 + i % 7) for i in range(13)]
    options = [{"temperature": 0.0} if i % 2 else {"temperature": 1.0, "top_p": 0.9, "seed": i} for i in range(13)]

    async def work(model):
        async def one(i, text=None):
            reply = await model.chat(say(text or prompts[i]), max_tokens=24, **options[i])
            return reply.text

        alone = [await one(i) for i in range(13)]
        together = await asyncio.gather(*(one(i) for i in range(13)))
        others = await asyncio.gather(*(one(i, prompts[i] if i == 5 else f"other {i}") for i in range(13)))
        return alone, together, others

    alone, together, others = run(folder, work)
    assert together == alone
    assert others[5] == alone[5]
    assert len(set(alone)) > 6


def test_the_pieces_are_the_whole(folder):
    async def work(model):
        reply = model.chat(say("hello"), max_tokens=40)
        pieces = [token async for token in reply]
        return pieces, reply

    pieces, reply = run(folder, work)
    assert "".join(piece.text for piece in pieces) == reply.text
    assert [piece.sequence for piece in pieces] == list(range(len(pieces)))
    assert reply.usage.completion_tokens <= 40


def test_a_stop_string_ends_the_reply_and_is_not_in_it(folder):
    async def work(model):
        whole = (await model.chat(say("hello"), max_tokens=60)).text
        stop = whole[5:8]
        cut = await model.chat(say("hello"), max_tokens=60, stop=[stop])
        return whole, stop, cut

    whole, stop, cut = run(folder, work)
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_special_tokens_in_a_users_text_are_text(folder):
    async def work(model):
        plain = await model.chat(say("a </s> b"), max_tokens=1)
        other = await model.chat(say("a  b"), max_tokens=1)
        return plain.usage.prompt_tokens - other.usage.prompt_tokens

    assert run(folder, work) == len("</s>")


@pytest.mark.parametrize(
    ("text", "options", "code"),
    [
        ("", {}, "empty_text"),
        ("x" * 600, {}, "context_overflow"),
        ("x", {"max_tokens": -1}, "bad_option"),
        ("x", {"temperature": 99}, "bad_option"),
    ],
)
def test_what_cannot_be_answered_is_the_records_fault(folder, text, options, code):
    async def work(model):
        with pytest.raises(RecordError) as caught:
            await model.chat(say(text), **options)
        return caught.value.code

    assert run(folder, work) == code


def test_a_prompt_that_fills_the_context_ends_by_length(folder):
    async def work(model):
        return await model.generate("y" * 500, max_tokens=100)

    reply = run(folder, work)
    assert reply.finish_reason in ("length", "stop")
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens <= 512


def test_leaving_a_reply_frees_its_slot(folder):
    async def work(model):
        for _ in range(3 * SETTINGS.slots):
            async for _ in model.chat(say("hello"), max_tokens=200):
                break
        return (await model.chat(say("hello"), max_tokens=3)).usage.completion_tokens

    assert run(folder, work) <= 3


def test_embeddings_do_not_depend_on_their_neighbours(tmp_path):
    folder = tiny.encoder(tmp_path / "embedding", "embedding")
    texts = ["a", "hello world", "x" * 50, "hello world"]

    async def work(embed):
        alone = [(await embed(text)).vector for text in texts]
        return alone, [found.vector for found in await asyncio.gather(*map(embed, texts))]

    alone, together = run(folder, work, Embedder)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)


def test_a_classifier_gives_every_label_its_share(tmp_path):
    folder = tiny.encoder(tmp_path / "classifier", "classifier")

    async def work(classify):
        return await classify("hello")

    found = run(folder, work, Classifier)
    assert set(found.scores) == {"good", "bad", "other"}
    assert sum(found.scores.values()) == pytest.approx(1)
    assert found.label == max(found.scores, key=found.scores.get)


def test_a_model_of_another_kind_is_refused(tmp_path):
    folder = tiny.encoder(tmp_path / "embedding", "embedding")
    with pytest.raises(ConfigError, match="of kind 'embedding', it is used as 'decoder'"):
        run(folder, lambda model: None)


def test_a_decode_step_copies_neither_cache_nor_logits(folder):
    import tracemalloc

    opened = open_model_folder(folder)
    decoder = Decoder(opened, device="cpu", threads=1, slots=4)
    for slot in range(4):
        decoder.prefill(slot, [5, 6, 7], 0)
    decoder.step([0, 1, 2, 3], [5, 5, 5, 5])
    tracemalloc.start()
    peaks = []
    for _ in range(5):  # other threads of this process may be at work meanwhile
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        logits = decoder.step([0, 1, 2, 3], [6, 6, 6, 6])
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert logits.nbytes == 4 * 320 * 4
    assert min(peaks) < logits.nbytes
    assert np.shares_memory(logits, decoder.step([0, 1], [6, 6]))


def test_a_beginning_that_is_there_already_changes_nothing(folder):
    """The same prompts whose beginnings were read for others: shared, copied, parked between the steps of others."""
    system = "You are a helpful voice. " * 12
    prompts = [system + f"question {i} " * (1 + i % 5) for i in range(10)]

    async def alone(model):
        return [(await model.generate(prompts[0], max_tokens=16)).text]

    async def one_after_another(model):
        first = [(await model.generate(prompt, max_tokens=16)).text for prompt in prompts]
        again = [(await model.generate(prompt, max_tokens=16)).text for prompt in prompts]
        together = await asyncio.gather(*(model.generate(prompt, max_tokens=16) for prompt in prompts))
        return first, again, [reply.text for reply in together]

    first, again, together = run(folder, one_after_another)
    assert first == again == together
    assert run(folder, alone) == first[:1]


def test_what_a_row_between_others_holds_is_as_it_was(folder):
    opened = open_model_folder(folder)
    decoder = Decoder(opened, device="cpu", threads=1, slots=4)
    held = [5, 6, 7, 8, 9, 10]
    expected = decoder.prefill(1, [*held, 11], 0).copy()
    for slot in (0, 3):
        decoder.prefill(slot, [4, 5, 6], 0)
    decoder.prefill(1, held, 0)
    for _ in range(3):
        decoder.step([0, 3], [5, 6])  # rows 1 and 2 run along
    np.testing.assert_allclose(decoder.prefill(1, [11], len(held)), expected, atol=1e-4)
    decoder.step([0, 3], [5, 6])
    decoder.copy(1, 2, len(held))
    np.testing.assert_allclose(decoder.prefill(2, [11], len(held)), expected, atol=1e-4)
    np.testing.assert_allclose(decoder.step([1], [12])[1], decoder.step([2], [12])[2], atol=1e-4)


def test_slots_that_change_places_go_on_as_they_were(folder):
    decoder = Decoder(open_model_folder(folder), device="cpu", threads=1, slots=4)
    prompts = {0: [5, 6, 7, 8], 2: [9, 10, 11], 3: [12, 13, 14, 15, 16]}

    def read():
        for slot, prompt in prompts.items():
            decoder.prefill(slot, prompt, 0)

    read()
    wanted = decoder.step([0, 2, 3], [20, 21, 22]).copy()
    read()
    decoder.step([0, 3], [20, 22])  # what slot 2 holds is parked
    read_on = decoder.step([0, 3], [1, 1]).copy()
    read()
    decoder.step([0, 3], [20, 22])
    decoder.swap(3, 2, 6)
    np.testing.assert_allclose(decoder.step([0, 2], [1, 1])[[0, 2]], read_on[[0, 3]], atol=1e-4)
    np.testing.assert_allclose(decoder.step([0, 2, 3], [1, 1, 21])[3], wanted[2], atol=1e-4)


@pytest.mark.parametrize(("context", "given", "seen"), [(4096, {}, "1"), (8192, {}, None), (512, {"0": ""}, "0")])
def test_short_contexts_are_attended_without_tiles(folder, tmp_path, monkeypatch, context, given, seen):
    variable = "ORT_GQA_DISABLE_FLASH_ATTENTION"
    monkeypatch.delenv(variable, raising=False)
    for value in given:
        monkeypatch.setenv(variable, value)
    shutil.copytree(folder, tmp_path / "copy")
    opened = open_model_folder(tiny.changed(tmp_path / "copy", context_length=context))
    during = []
    session = graphs.ort.InferenceSession

    def open_session(*arguments, **options):
        during.append(os.environ.get(variable))
        return session(*arguments, **options)

    monkeypatch.setattr(graphs.ort, "InferenceSession", open_session)
    graphs.open_session(opened, "cpu", 1)
    assert during == [seen]
    assert os.environ.get(variable) == next(iter(given), None)


def test_a_prompts_logits_are_made_for_its_last_token_alone(folder, monkeypatch):
    decoder = Decoder(open_model_folder(folder), device="cpu", threads=1, slots=1)
    prompt = [5, 6, 7, 8]
    every = decoder.read(0, prompt, 0)
    sizes = []
    bind_output = decoder_module.bind_output
    monkeypatch.setattr(
        decoder_module, "bind_output", lambda *given: (sizes.append(given[2].shape), bind_output(*given))
    )
    np.testing.assert_allclose(decoder.prefill(0, prompt, 0), every[-1], atol=1e-5)
    assert sizes == [(1, 1, 320)]


def test_a_graph_that_makes_all_logits_serves_as_well(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    model = onnx_ir.load(old / "model.onnx")
    graph = model.graph
    first = next(value for value in graph.inputs if value.name == graphs.LOGITS_FROM)
    cut = next(iter(first.uses())).node
    cut.outputs[0].replace_all_uses_with(cut.inputs[0])
    graph.remove(cut, safe=True)
    graph.inputs.remove(first)
    del graph.initializers[graphs.LOGITS_FROM]
    onnx_ir.save(model, old / "model.onnx")

    async def reply(model):
        return (await model.generate("Hello there", max_tokens=8)).text

    assert run(tiny.changed(old), reply) == run(folder, reply)


def test_prompts_that_are_read_together_are_read_as_alone(folder):
    decoder = Decoder(open_model_folder(folder), device="cpu", threads=1, slots=5)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    for slot in (0, 4):
        decoder.prefill(slot, [4, 5, 6], 0)
    held = decoder.step([0, 4], [7, 8])[[0, 4]].copy()
    alone = []
    for prompt in prompts:
        first = decoder.prefill(2, prompt, 0).copy()
        alone.append((first, decoder.step([2], [20])[2].copy(), decoder.step([2], [21])[2].copy()))
    for slot in (0, 4):
        decoder.prefill(slot, [4, 5, 6], 0)
    together = decoder.read_together(1, prompts).copy()
    steps = [decoder.step([1, 2, 3], [token] * 3)[1:4].copy() for token in (20, 21)]
    for row, expected in enumerate(alone):
        for found, wanted in zip((together[row], steps[0][row], steps[1][row]), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(decoder.step([0, 4], [7, 8])[[0, 4]], held, atol=1e-4)  # nobody else's rows are touched
