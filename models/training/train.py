"""Trains the demo model: `python -m models.training.train --to FOLDER`; `make train-demo` has its runs.

A Llama of three and a half million parameters learns to answer a customer from the features of its
prompt. Every number, name and date is drawn anew for each dialogue, so the only way to a low loss is to
copy. The result is a Hugging Face folder with tokenizer and chat template, ready for `flink-llm export`.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from flink_llm.engine.prompts import Prompts
from flink_llm.engine.tokenizer import Tokenizer
from models.training.batches import CONTEXT, IGNORED, Batches
from models.training.dialogues import MIXES, Generator
from models.training.tokenizer import train_tokenizer

TEMPLATE = Path(__file__).parents[1] / "support-chat" / "chat_template.jinja"
CARD = Path(__file__).with_name("CARD.md")
WARM_UP = 50
DECAY_FROM = 0.6
"""The share of the training after which the learning rate falls, in a line, to nothing."""
ATTENTION, SHORT = "short_rows", 640
REPORT, SAVE = 25, 250
CHECKED, CHECKED_LONG = 64, 16
"""Dialogues, of another seed, on which progress is reported: how many answers come out right."""


@dataclass(frozen=True)
class Plan:
    """How to train. The same plan makes the same model on the same machine, unless `minutes` cuts it short.

    From `long_from` on, a share of the steps, `long_share` of the batches hold prompts that nearly fill the
    context. `resume` is the folder of an earlier run to go on from, with its tokenizer and without drills;
    `mix` is what its dialogues are about.
    """

    seed: int = 7
    steps: int = 4000
    tokens_per_step: int = 4096
    minutes: float = 600.0
    matrix_rate: float = 3e-3
    other_rate: float = 3e-3
    long_from: float = 0.7
    long_share: float = 0.2
    resume: Path | None = None
    mix: str = "usual"


def build_model(vocabulary: int, end: int) -> LlamaForCausalLM:
    """An untrained model of the demo's shape."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=end,
        pad_token_id=0,
        attn_implementation=ATTENTION,
    )
    return LlamaForCausalLM(config)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention; padding is at the end, so it needs no mask. Two to four times the speed, on a
    CPU in bfloat16, of PyTorch's own for short rows, which most are."""
    rows, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if length > SHORT:
        made = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
        scores = torch.baddbmm(
            future.expand(rows * heads, length, length),
            query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scaling,
        )  # fmt: skip
        made = torch.bmm(torch.softmax(scores, -1), value.flatten(0, 1)).view_as(query)
    return made.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


def train(to: Path, plan: Plan) -> None:
    """Trains and writes the folder `to`, now and then and at the end; prints a line every 25 steps."""
    torch.manual_seed(plan.seed)
    raw = (plan.resume / "tokenizer.json").read_text() if plan.resume else train_tokenizer(plan.seed).to_str()
    tokenizer = Tokenizer(raw.encode())
    model = build_model(-(-tokenizer.size // 64) * 64, tokenizer.token("<|end|>") or 2)
    if plan.resume is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(plan.resume).state_dict())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.size} tokens", flush=True)
    prompts = Prompts(TEMPLATE.read_text(), tokenizer, {})
    batches = Batches(
        plan.seed, prompts, tokenizer, plan.tokens_per_step,
        long_from=plan.long_from, long_share=plan.long_share, drills=plan.resume is None,
        mix=plan.mix,
    )  # fmt: skip
    optimizers = _optimizers(model, plan)
    began, seen, running = time.monotonic(), 0, 0.0
    for step in range(plan.steps):
        spent = time.monotonic() - began
        progress = max(step / plan.steps, spent / (60 * plan.minutes))
        if progress >= 1:
            break
        inputs, labels = batches.next(progress)
        _set_rate(optimizers, min(1.0, (step + 1) / WARM_UP, (1 - progress) / (1 - DECAY_FROM)))
        running += _step(model, optimizers, inputs, labels)
        seen += inputs.numel()
        if (step + 1) % REPORT == 0:
            speed = seen / (time.monotonic() - began)
            print(f"{progress:4.0%}  step {step + 1}  loss {running / REPORT:.4f}  {speed:,.0f} tokens/s", flush=True)
            running = 0.0
        if (step + 1) % SAVE == 0:
            short, long = (
                _right(model, batches, plan.seed, CHECKED),
                _right(model, batches, plan.seed, CHECKED_LONG, 500),
            )
            print(f"      right: {short} of {CHECKED} answers, {long} of {CHECKED_LONG} to long prompts", flush=True)
            _save(to, model, raw)
    print(f"{step + 1} steps, {seen:,} tokens, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    _save(to, model, raw)


def _optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def _set_rate(optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share


def _step(
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    inputs: torch.Tensor,
    labels: torch.Tensor,
) -> float:
    logits, wanted = _answers(model, inputs, labels)
    loss = functional.cross_entropy(logits, wanted)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _answers(model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the answers' tokens alone: most of a prompt needs neither."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
        counted = labels[:, 1:] != IGNORED
        return model.lm_head(hidden[counted]).float(), labels[:, 1:][counted]


@torch.no_grad()
def _right(model: LlamaForCausalLM, batches: Batches, seed: int, count: int, long: int = 0) -> int:
    """How many of `count` dialogues would be answered word for word."""
    generator, right = Generator(seed + 1), 0
    for _ in range(count):
        tokens, answers = batches.one(generator.dialogue("status" if long else None, long=long))
        inputs = torch.tensor([tokens])
        labels = torch.tensor([[t if a else IGNORED for t, a in zip(tokens, answers, strict=True)]])
        logits, wanted = _answers(model, inputs, labels)
        right += bool((logits.argmax(-1) == wanted).all())
    return right


def average(to: Path, one: Path, other: Path) -> None:
    """The mean of two models that went on from the same one: better than either (Wortsman 2022, "Model soups")."""
    model = LlamaForCausalLM.from_pretrained(one)
    weights, others = model.state_dict(), LlamaForCausalLM.from_pretrained(other).state_dict()
    model.load_state_dict({name: (weights[name] + others[name]) / 2 for name in weights})
    _save(to, model, (one / "tokenizer.json").read_text())


def _save(to: Path, model: LlamaForCausalLM, tokenizer: str) -> None:
    model.save_pretrained(to)
    (to / "tokenizer.json").write_text(tokenizer)
    (to / "chat_template.jinja").write_text(TEMPLATE.read_text())
    (to / "README.md").write_text(CARD.read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder for the trained model")
    plan = Plan()
    parser.add_argument("--seed", type=int, default=plan.seed, help="decides data, weights, order (%(default)s)")
    parser.add_argument("--steps", type=int, default=plan.steps, help="length of the training (%(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=plan.minutes,
        help="at most so long: shortens the plan (%(default)s)",
    )
    parser.add_argument(
        "--tokens-per-step", type=int, default=plan.tokens_per_step, help="batch size in tokens (%(default)s)"
    )
    parser.add_argument("--rate", type=float, default=plan.matrix_rate, help="peak learning rate (%(default)s)")
    parser.add_argument(
        "--long-from", type=float, default=plan.long_from, help="share of the steps before long prompts (%(default)s)"
    )
    parser.add_argument(
        "--long-share", type=float, default=plan.long_share, help="share of the batches with long prompts (%(default)s)"
    )
    parser.add_argument("--resume", type=Path, help="go on from this folder; give another --seed, for new data")
    parser.add_argument("--mix", choices=sorted(MIXES), default=plan.mix, help="of which dialogues (%(default)s)")
    parser.add_argument("--average", type=Path, nargs=2, help="no training: the mean of two runs' weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = Plan(
        args.seed, args.steps, args.tokens_per_step, args.minutes, args.rate, args.rate,
        args.long_from, args.long_share, args.resume, args.mix,
    )  # fmt: skip
    if args.average:
        average(args.to, *args.average)
    else:
        train(args.to, made)


if __name__ == "__main__":
    main()
