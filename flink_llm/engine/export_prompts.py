"""Whether prompts come out here as they do in transformers: the same texts, the same tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flink_llm.engine.export_source import read_by_transformers
from flink_llm.engine.model import ModelFolder
from flink_llm.engine.parity import TEXTS
from flink_llm.engine.prompts import Prompts
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import ExportError, FlinkLlmError, RecordError


def check_prompts(source: Path, folder: ModelFolder) -> int:
    """Compares plain texts and, where the source has a chat template, conversations; how many were compared.

    Conversations that the original's template refuses are left out. Raises ExportError at the first
    difference, and for a template that refuses here what the original takes.
    """
    from transformers import AutoTokenizer

    with read_by_transformers(str(source)):
        original = AutoTokenizer.from_pretrained(source)
    tokenizer, prompts = open_prompts(folder)
    name = folder.manifest.name
    for text in TEXTS:
        ours = tokenizer.encode_marked(text)
        _same(f"{name}'s tokenizer", text, ours, original(text)["input_ids"])
    if "chat_template.jinja" not in folder.files:
        return len(TEXTS)
    compared = 0
    for messages in _conversations():
        theirs = _chat(original, messages)
        if theirs is None:
            continue
        try:
            ours = prompts.chat(messages, None)
        except RecordError as error:
            raise ExportError(f"refused: {name}'s chat template cannot be used here: {error}") from error
        if ours != theirs:  # a template may tell the date, and midnight may have gone by in between
            theirs = _chat(original, messages) or []
        _same(f"{name}'s chat template", messages[-1]["content"], ours, theirs)
        compared += 1
    if not compared:
        raise ExportError(f"refused: {name}'s chat template takes none of {len(_conversations())} conversations")
    return len(TEXTS) + compared


def open_prompts(folder: ModelFolder) -> tuple[Tokenizer, Prompts]:
    """The folder's tokenizer and template, as the engine opens them. Raises ExportError."""
    manifest = folder.manifest
    template = folder.files.get("chat_template.jinja")
    try:
        tokenizer = Tokenizer(folder.files["tokenizer.json"], manifest.vocab_size)
        return tokenizer, Prompts(None if template is None else template.decode(), tokenizer, manifest.special_tokens)
    except FlinkLlmError as error:
        raise ExportError(str(error)) from error


def _chat(original: Any, messages: list[dict[str, str]]) -> list[int] | None:
    """The original's tokens of a conversation, None for one that it refuses."""
    try:
        return list(original.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception:  # a template is a program: it may raise anything
        return None


def _conversations() -> list[list[dict[str, str]]]:
    system = {"role": "system", "content": "Answer in one sentence."}
    asked = [{"role": "user", "content": text} for text in TEXTS]
    told = [{"role": "assistant", "content": "It is on its way."}, {"role": "user", "content": "And when?"}]
    return [*([each] for each in asked), [asked[0], *told], [system, asked[0]], [system, asked[0], *told]]


def _same(what: str, text: str, ours: Sequence[int], theirs: Any) -> None:
    theirs = list(theirs)
    if list(ours) == theirs:
        return
    at = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
    where = f"{len(ours)} tokens instead of {len(theirs)}"
    if at is not None:
        where = f"token {at} is {ours[at]} instead of {theirs[at]}"
    raise ExportError(f"refused: {what} says something else here than in transformers: {where}, for {text[:40]!r}")
