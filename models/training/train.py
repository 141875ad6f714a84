"""Trains the demo model: `python -m models.training.train --to FOLDER`.

A Llama of about five million parameters learns to answer a customer from the features of its prompt.
Every number, name and date is drawn anew for each dialogue, so the only way to a low loss is to copy.
The result is a Hugging Face folder with a tokenizer and a chat template, ready for `flink-llm export`.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flink_llm.engine.prompts import Prompts
from flink_llm.engine.tokenizer import Tokenizer
from models.training.dialogues import Dialogue, Generator
from models.training.tokenizer import train_tokenizer

TEMPLATE = Path(__file__).parents[1] / "support-chat" / "chat_template.jinja"
CONTEXT = 2048
IGNORED = -100
WARM_UP = 100
DRILL = 0.55
"""The first share of the time, in which two of three steps are drills in copying."""
LONG_SHARE = 0.15
"""Share of the steps, in the last fifth of the time, whose prompts fill the context."""


def build_model(vocabulary: int, end: int) -> LlamaForCausalLM:
    """An untrained model of the demo's shape."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=end,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Batches:
    """Batches of generated dialogues, of about `tokens` tokens each, all of a similar length."""

    def __init__(self, seed: int, prompts: Prompts, tokenizer: Tokenizer, tokens: int) -> None:
        self._generator = Generator(seed)
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._end = tokenizer.token("<|end|>")
        self._pool: list[tuple[list[int], int]] = []

    def short(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels [batch, length] of ordinary dialogues."""
        while len(self._pool) < 400:
            self._pool.append(self._example(self._generator.dialogue()))
        self._pool.sort(key=lambda example: len(example[0]))
        size = max(1, self._tokens // 180)
        start = int(torch.randint(0, len(self._pool) - size, (1,)))
        batch, self._pool[start : start + size] = self._pool[start : start + size], []
        return _padded(batch)

    def drill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of drills: every feature asked for by its name, or several questions at once.

        Dialogues alone hold some fifteen tokens to copy each; a model this small takes very long to find
        out from those that copying, digit by digit, is what is asked for.
        """
        examples, used = [], 0
        while used < self._tokens:
            kind = float(torch.rand(1))
            example = self._lookup(digits=kind < 0.4) if kind < 0.65 else self._questions()
            examples.append(example)
            used += len(example[0])
        return _padded(examples)

    def _lookup(self, *, digits: bool) -> tuple[list[int], int]:
        features = self._generator.dialogue("status", missing=False).features
        if digits:
            features = {name: self._generator.number() for name in features}
        prompt = self._prompts.chat([{"role": "user", "content": "all"}], features)
        names = list(features)
        answer: list[int] = []
        for i in torch.randperm(len(names)).tolist():
            answer += self._tokenizer.encode_text(f"{names[i]}: {features[names[i]]}\n")
        return [*prompt, *answer], len(prompt)

    def _questions(self) -> tuple[list[int], int]:
        first, *others = self._generator.about_one_order(4)
        tokens, prompt = self._example(first)
        for dialogue in others:
            question = self._prompts.chat(dialogue.messages[-1:], None)[1:]
            tokens += [*question, *self._tokenizer.encode_text(dialogue.answer), self._end or 0]
        return tokens, prompt

    def long(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of dialogues that nearly fill the context."""
        words = int(torch.randint(200, 580, (1,)))
        examples = []
        while len(examples) * 1500 < self._tokens:
            example = self._example(self._generator.dialogue("status", long=words))
            if len(example[0]) <= CONTEXT:
                examples.append(example)
        return _padded(examples)

    def _example(self, dialogue: Dialogue) -> tuple[list[int], int]:
        prompt = self._prompts.chat(dialogue.messages, dialogue.features)
        return [*prompt, *self._tokenizer.encode_text(dialogue.answer), self._end or 0], len(prompt)


def _padded(examples: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(tokens) for tokens, _ in examples)
    inputs = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED)
    for row, (tokens, prompt) in enumerate(examples):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = inputs[row, prompt : len(tokens)]
    return inputs, labels


def train(
    to: Path, *, seed: int, minutes: float, tokens_per_step: int, rate: float, resume: Path | None = None
) -> None:
    """Trains for `minutes` and writes the folder `to`; a line of progress every 25 steps."""
    torch.manual_seed(seed)
    raw = train_tokenizer(seed)
    tokenizer = Tokenizer(raw.to_str().encode())
    vocabulary = -(-tokenizer.size // 64) * 64
    model = build_model(vocabulary, tokenizer.token("<|end|>") or 2)
    if resume is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(resume).state_dict())
        seed += 1
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocabulary} tokens", flush=True)
    batches = Batches(seed, Prompts(TEMPLATE.read_text(), tokenizer, {}), tokenizer, tokens_per_step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    began, step, seen, running = time.monotonic(), 0, 0, 0.0
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        long = done > 0.8 and float(torch.rand(1)) < LONG_SHARE
        if done < DRILL and step % 3:
            inputs, labels = batches.drill()
        else:
            inputs, labels = batches.long() if long else batches.short()
        warm = min(1.0, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen, running = step + 1, seen + inputs.numel(), running + float(loss.detach())
        if step % 25 == 0:
            speed = seen / (time.monotonic() - began)
            print(f"{done:4.0%}  step {step}  loss {running / 25:.4f}  {speed:,.0f} tokens/s", flush=True)
            running = 0.0
        if step % 500 == 0:
            _save(to, model, raw.to_str())
    _save(to, model, raw.to_str())


def _save(to: Path, model: LlamaForCausalLM, tokenizer: str) -> None:
    model.save_pretrained(to)
    (to / "tokenizer.json").write_text(tokenizer)
    (to / "chat_template.jinja").write_text(TEMPLATE.read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--seed", type=int, default=7, help="decides data, weights and order (default 7)")
    parser.add_argument("--minutes", type=float, default=40.0, help="how long to train (default 40)")
    parser.add_argument("--tokens-per-step", type=int, default=3000, help="batch size in tokens (default 3000)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)")
    parser.add_argument("--resume", type=Path, help="go on from this folder, with the next seed's data")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.to, seed=args.seed, minutes=args.minutes, tokens_per_step=args.tokens_per_step,
        rate=args.rate, resume=args.resume)


if __name__ == "__main__":
    main()
