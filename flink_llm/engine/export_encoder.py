"""Encoders: torch's own exporter over a thin wrapper, and our own eight bits over what it exports."""

import contextlib
import inspect
import io
import logging
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from flink_llm.engine.export_source import NEEDS, Source, first_line, read_by_transformers
from flink_llm.engine.quantize import EightBits, Form, quantize_rows
from flink_llm.errors import ExportError

Task = Literal["embedding", "classifier", "token_classifier", "reranker"]
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "ModernBert", "DistilBert", "Electra", "MPNet", "Camembert")
PRECISIONS = ("fp32", "fp16", "int8")
OPSET = 20
"""The first with a Gelu of its own."""
_HEADS: dict[str, Task] = {
    "Model": "embedding",
    "ForMaskedLM": "embedding",
    "ForSequenceClassification": "classifier",
    "ForTokenClassification": "token_classifier",
}
SERVED = tuple(family + head for family in FAMILIES for head in _HEADS)
_POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last"}
"""By the names of sentence-transformers, before and since its release 6."""
_BEHIND_PADDING = ("Roberta", "MPNet", "Camembert")
"""Families whose positions begin behind the padding token's id."""
_exporting = threading.Lock()


def task_of(source: Source, asked: Task | None) -> Task:
    """What the encoder is for: `asked`, or what its architecture says; one label makes a reranker.

    Raises ExportError for a task that its head cannot do.
    """
    head = next(head for head in _HEADS if source.architecture.endswith(head))
    task = _HEADS[head]
    if task == "classifier" and len(_labels(source)) == 1:
        task = "reranker"
    if asked is not None and asked != task:
        if asked != "embedding":
            raise ExportError(f"{source.name} is a {source.architecture}: its task is {task}, not {asked}")
        task = asked
    return task


def fields_of(source: Source, task: Task) -> dict[str, Any]:
    """What a manifest says of it. Raises ExportError for what is missing, or cannot be served."""
    pooling, normalize = _pooling(source)
    labels = _labels(source) if task in ("classifier", "token_classifier") else []
    problem = source.config.get("problem_type") if task == "classifier" else None
    if problem == "regression":
        raise ExportError(f"{source.name} is a regression of {len(labels)} numbers, which cannot be served")
    return {
        "context_length": _context(source),
        "vocab_size": source.number("vocab_size"),
        "labels": labels,
        "scores": "sigmoid" if problem == "multi_label_classification" else "softmax",
        "pooling": pooling,
        "normalize": normalize,
    }


def build_encoder(source: Source, made: Path, scratch: Path, precision: str, task: Task, form: Form) -> None:
    """Fills the folder `made` with graph and tokenizer.

    `scratch` keeps what other precisions may use again, `form` is that of int8. Raises ExportError for what
    cannot be built.
    """
    base = "fp32" if precision == "int8" else precision
    built = scratch / f"built-{base}"
    if not built.exists():
        built.mkdir()
        _export(source, built, task, half=base == "fp16")
    if isinstance(form, EightBits):
        quantize_rows(built / "model.onnx", made, form)
    else:
        shutil.copytree(built, made, dirs_exist_ok=True)
    for name in ("tokenizer.json", "README.md"):
        if (source.folder / name).exists():
            shutil.copyfile(source.folder / name, made / name)


def load_original(source: Source, task: Task) -> Any:
    """The original in torch, fp32, with the attention that can be exported. Raises ExportError."""
    import torch
    import transformers

    kind = {
        "embedding": transformers.AutoModel,
        "token_classifier": transformers.AutoModelForTokenClassification,
    }.get(task, transformers.AutoModelForSequenceClassification)
    with hushed(), read_by_transformers(source.name):
        model = kind.from_pretrained(source.folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keeps progress bars, warnings and notes of torch and transformers off the terminal."""
    told = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _export(source: Source, to: Path, task: Task, *, half: bool) -> None:
    try:
        import onnxscript  # noqa: F401
        import torch
    except ImportError as error:
        raise ExportError(NEEDS) from error
    model = load_original(source, task)
    if half:
        model = model.half()
    output = "last_hidden_state" if task == "embedding" else "logits"
    typed = "token_type_ids" in inspect.signature(model.forward).parameters
    typed = typed and int(source.config.get("type_vocab_size") or 0) > 1
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if typed else [])]

    class Thin(torch.nn.Module):  # type: ignore[misc]
        """Tensors in by position, one tensor out: all that the graph shall have."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return getattr(self.model(**dict(zip(names, inputs, strict=True))), output)

    example = torch.ones(2, 7, dtype=torch.long)
    example[1, 5:] = 0
    either = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = (torch.full_like(example, 5), example, torch.zeros_like(example))[: len(names)]
    with _exporting, hushed():
        try:
            program = torch.onnx.export(
                Thin(), inputs, dynamo=True, input_names=names, output_names=[output], opset_version=OPSET,
                dynamic_shapes=((either,) * len(names),), verbose=False,
            )  # fmt: skip
            program.save(to / "model.onnx", external_data=True)
        except OSError:
            raise
        except Exception as error:  # torch's exporter raises whatever the model's code raises
            raise ExportError(
                f"{source.name} could not be built: {type(error).__name__}: {first_line(error)}"
            ) from error


def _pooling(source: Source) -> tuple[str, bool]:
    """As sentence-transformers' modules say, else the mean, normalised."""
    modules: Any = source.optional("modules.json")
    if not modules:
        return "mean", True
    said = source.optional("1_Pooling/config.json")
    chosen = [name.removeprefix("pooling_mode_") for name in said if name.startswith("pooling_mode_") and said[name]]
    chosen += [str(said["pooling_mode"])] if "pooling_mode" in said else []
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise ExportError(f"{source.name} pools by {', '.join(chosen) or 'nothing'}: mean, cls and last are served")
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ExportError(f"{source.name} has a module {unknown[0]} behind its encoder, which is not served")
    return _POOLINGS[chosen[0]], "Normalize" in kinds


def _labels(source: Source) -> list[str]:
    names = source.config.get("id2label")
    if names:
        return [names[key] for key in sorted(names, key=int)]
    return [f"LABEL_{i}" for i in range(int(source.config.get("num_labels", 2)))]


def _context(source: Source) -> int:
    """The longest text: what the positions reach, or less where the original cuts earlier."""
    positions = source.number("max_position_embeddings")
    if any(family in source.architecture for family in _BEHIND_PADDING):
        positions -= int(source.config.get("pad_token_id") or 0) + 1
    said = (
        source.optional("sentence_bert_config.json").get("max_seq_length"),
        source.optional("tokenizer_config.json").get("model_max_length"),
    )
    return min([positions, *(int(limit) for limit in said if limit)])
