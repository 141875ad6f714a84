"""The engine's benchmarks on a tiny shape, without peers: they must not rot between measurements."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime_genai")

import torch
from transformers import LlamaForCausalLM

from benchmarks import decoder, demo_source, encoder, host_memory, machine, scheduling, shapes
from benchmarks.peers import flags
from flink_llm.engine import scheduler
from flink_llm.engine.decoder import Decoder
from flink_llm.engine.model import open_model_folder
from tests import tiny

SIZE = decoder.Size(rounds=1, mixed=16, static=(8, 8), one=(8, 8), dialogues=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def folder(root):
    return shapes.exported(shapes.source(shapes.TINY, root), "fp32", root)


def test_a_prompt_is_exactly_its_tokens(root):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shapes.source(shapes.TINY, root) / "tokenizer.json"))

    tokens, text = shapes.prompt(shapes.TINY, "any", 40)

    assert tokenizer.encode(text).ids == tokens


def test_decoder(root, folder, monkeypatch):
    monkeypatch.setattr(shapes, "precisions", lambda: ["fp32"])

    found = decoder.measure(shapes.TINY, SIZE, root=root, peers=False)

    assert found["x_bare_16"] > 0
    assert found["host_cost"] < 1
    assert found["x_genai_16"] is None
    assert found["x_speculation"] > 0
    assert found["speculation_quoted"] > 0.5
    assert found["missing"] == {"peers": "left out"}
    assert set(found["rates"]["one"]) == {"ours fp32"}


def test_encoder(tmp_path):
    folders = {"fp32": tiny.encoder(tmp_path / "encoder", "embedding")}

    found = encoder.measure(folders, None, count=8, rounds=1)

    assert found["x_bare"] > 0
    assert found["x_sentence_transformers"] is None
    assert found["cosine"]["bare-fp32 8"] > 0.9999


def test_host_memory(folder):
    found = host_memory.measure(folder, shapes.TINY, 4)

    assert found["hosts_of_four"] == 1
    assert 0 < found["ratio"] < 2


def test_what_fails_is_named_and_the_others_go_on():
    figures, failed = machine.interleave({"a 1": lambda number: 2.0 + number, "b 1": lambda number: 1 / 0}, 3)

    assert machine.medians(figures) == {"a 1": 3.0}
    assert failed == {"b 1": "ZeroDivisionError: division by zero"}


def test_what_is_far_behind_its_family_is_not_run_again():
    figures, _ = machine.interleave(
        {"a 1": lambda number: 10.0, "a 2": lambda number: 1.0, "b 1": lambda number: 1.0}, 3
    )

    assert {name: len(found) for name, found in figures.items()} == {"a 1": 3, "a 2": 1, "b 1": 3}


def test_llama_cpp_is_compiled_for_what_the_machine_has():
    args = flags.cmake_args(frozenset({"avx", "avx2", "fma"}))

    assert "-DGGML_AVX2=ON" in args
    assert "-DGGML_AVX512=OFF" in args
    assert "AMX" not in args


def test_the_demo_models_weights_taken_back_say_what_it_says(tmp_path):
    source = demo_source.demo_source(root=tmp_path)
    original = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    shipped = Decoder(open_model_folder(demo_source.SHIPPED), device="cpu", threads=1, slots=1)
    prompt = list(range(300, 340))
    theirs = original(torch.tensor([prompt])).logits[0].detach().numpy()
    ours = shipped.read(0, prompt, 0)
    likeness = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert likeness.min() > 0.99  # int8 rounds the activations as well


def test_what_a_reply_may_be_delayed_by_is_what_prompts_wait_for(monkeypatch):
    costs = scheduling.Costs(steps={1: 5.0, 4: 6.0, 16: 12.0}, token=0.35, run=2.0, around=0.5)
    found = []
    for least, most in ((0.2, 0.4), (6.0, 6.0)):
        monkeypatch.setattr(scheduler, "DELAY_LEAST", least)
        monkeypatch.setattr(scheduler, "DELAY_MOST", most)
        found.append(scheduling.measure(costs, within=1.0, seeds=1))
    careful, eager = found
    assert careful["tpot_p99_ratio"] < 1.5 < eager["tpot_p99_ratio"]
    assert careful["ttft_p50_ms"] > eager["ttft_p50_ms"]
    assert careful["tokens_per_s_16"] < eager["tokens_per_s_16"]
