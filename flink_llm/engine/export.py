"""From a Hugging Face model to a model folder: built, measured against the original, or refused.

Needs the `export` extra (torch, transformers, onnxruntime-genai); nothing else of the library does.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flink_llm.engine import export_decoder as decoders
from flink_llm.engine import export_encoder as encoders
from flink_llm.engine.export_auto import Rate, measure_rates
from flink_llm.engine.export_encoder import Task
from flink_llm.engine.export_peft import merged, read_peft
from flink_llm.engine.export_prompts import check_prompts, open_prompts
from flink_llm.engine.export_source import (
    NEEDS,
    PrecisionError,
    Source,
    first_line,
    open_source,
    read_by_transformers,
)
from flink_llm.engine.model import MIXED, MIXED_MB, Manifest, ModelFolder, held_twice, open_model_folder, write_manifest
from flink_llm.engine.parity import (
    LARGEST_DIFFERENCE,
    LARGEST_MIXED_DIFFERENCE,
    MOST,
    TEXTS,
    Reference,
    faults,
    measure_decoder,
    measure_encoder,
    measure_mixed,
    refer,
)
from flink_llm.engine.quantize import EightBits, Form
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import ExportError, FlinkLlmError

log = logging.getLogger(__name__)
__all__ = ["LARGEST_DIFFERENCE", "Order", "Precision", "Task", "export_decoder", "export_model"]

COARSE = 0.05
"""A gain of perplexity beyond which int4 is tried in shorter blocks."""
Precision = Literal["auto", "fp32", "fp16", "int8", "int4"]
_Measure = Callable[[ModelFolder], dict[str, Any]]
"""What `parity` a folder has in its manifest."""


@dataclass(frozen=True)
class Order:
    """What is wanted. `task` is an encoder's, None for what its architecture says; `texts` are compared
    instead of the built-in ones, at most 64 of them; `adapters` are PEFT's folders by the names that requests
    choose them by, decoders only."""

    name: str
    precision: Precision = "auto"
    task: Task | None = None
    texts: Sequence[str] = ()
    license_name: str = ""
    adapters: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class _Made:
    """A folder that was measured; `faults` says where it is not the original."""

    folder: Path
    manifest: Manifest
    faults: list[str]

    @property
    def refusal(self) -> str:
        """One line for a person."""
        return f"refused: {self.manifest.precision} is not the original: {', '.join(self.faults)}"


def export_model(
    source: str | Path, to: Path, order: Order, tell: Callable[[str], None] = lambda line: None
) -> Manifest:
    """Exports a local Hugging Face folder or a hub id, with its tokenizer; `to` must not exist.

    With precision `auto` every candidate is built, those that are not the original or cannot be run are left out,
    and the fastest on this machine is taken; `tell` hears of each, and of a context that is cut. Raises
    ExportError: architecture not served, tools missing, disk full, or below the bar. No half folder is left behind.
    """
    if to.exists():
        raise ExportError(f"{to} exists already: choose another folder, or remove it")
    opened = open_source(source)
    served = (*decoders.SERVED, *encoders.SERVED)
    if opened.architecture not in served:
        raise ExportError(f"{opened.architecture} cannot be served; these can: {', '.join(served)}")
    opened.need_tokenizer()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
            exporter = _exporter(opened, order, Path(scratch))
            if exporter.note:
                tell(exporter.note)
            made = _fastest(exporter, tell) if order.precision == "auto" else exporter.make(order.precision)
            if made.faults:
                raise ExportError(made.refusal)
            made.folder.rename(to)
    except OSError as error:
        raise ExportError(f"{to} cannot be written: {error.strerror or error}") from error
    return made.manifest


def _fastest(exporter: "_Exporter", tell: Callable[[str], None]) -> _Made:
    made, left_out = _candidates(exporter, tell)
    candidates = [each for each in made if not each.faults]
    if made and not candidates:
        return made[-1]
    timed: list[tuple[_Made, Rate]] = []
    for each, rate in zip(candidates, measure_rates([each.folder for each in candidates]), strict=True):
        if isinstance(rate, Rate):
            timed.append((each, rate))
        else:
            left_out = f"{each.manifest.precision} cannot be timed: {first_line(rate)}"
            tell(left_out)
    if not timed:
        raise ExportError(left_out)
    best, _ = max(timed, key=lambda pair: pair[1].mean)
    tell(f"{'':5}  {'MB':>8}  {'1 alone':>9}  {'of 16':>9}  {exporter.unit}/s")
    for each, rate in timed:
        manifest = each.manifest
        size = sum(file.bytes for file in manifest.files.values()) / 1e6
        chosen = "  chosen" if each is best else ""
        tell(f"{manifest.precision:5}  {size:8.1f}  {rate.alone:9.1f}  {rate.together:9.1f}{chosen}")
    return best


def _candidates(exporter: "_Exporter", tell: Callable[[str], None]) -> tuple[list[_Made], str]:
    """Those that can be made and run, and why the last of the others cannot."""
    made: list[_Made] = []
    left_out = ""
    for precision in exporter.candidates:
        try:
            made.append(exporter.make(precision))
        except PrecisionError as error:
            left_out = f"{precision} is left out: {error}"
            tell(left_out)
        else:
            if made[-1].faults:
                tell(made[-1].refusal)
    return made, left_out


class _Exporter:
    """Makes measured folders of one source in several precisions, what they share only once."""

    unit = "texts"
    candidates: tuple[str, ...] = ("int8", "fp32")
    """What `auto` tries. Not fp16: the CPU computes it in fp32 anyway, with casts."""
    note = ""
    """What a person should know of every precision."""

    def __init__(self, source: Source, order: Order, scratch: Path) -> None:
        self._source = source
        self._order = order
        self._scratch = scratch
        self._texts = list(order.texts[:MOST]) or list(TEXTS)

    def make(self, precision: str) -> _Made:
        """A measured folder, of the precision's first form that is near enough, else of the last that could be made.

        Raises ExportError for what cannot be built or opened, PrecisionError where that is the precision's fault.
        """
        made: _Made | None = None
        failed: list[PrecisionError] = []
        for form in self._forms(precision):
            if made is not None and not made.faults and not _is_coarse(made):
                break
            try:
                other = self._make(precision, form)
            except PrecisionError as error:
                failed.append(error)
                continue
            made = made if made is not None and other.faults and not made.faults else other
        if made is None:
            raise failed[0]
        return made

    def _forms(self, precision: str) -> Sequence[Form]:
        return (EightBits(), EightBits("unsigned")) if precision == "int8" else (None,)

    def _make(self, precision: str, form: Form) -> _Made:
        folder = self._folder(precision)
        try:
            fields, measure = self._build(folder, precision, form)
        except (FlinkLlmError, OSError):
            raise
        except Exception as error:  # a graph that our own passes do not understand
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise PrecisionError(f"{self._source.name} could not be built: {reason}") from error
        return self._finish(folder, {**fields, "precision": precision}, form, measure)

    def _build(self, folder: Path, precision: str, form: Form) -> tuple[dict[str, Any], _Measure]:
        """Fills a folder; what its manifest says, and how it is measured."""
        raise NotImplementedError

    def _read(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The tokens of the texts that have some. Raises ExportError where none has."""
        tokens = [tokens for text in self._texts if (tokens := tokenizer.encode_marked(text))]
        if not tokens:
            raise ExportError(f"no text to compare: none of {len(self._texts)} has a token of {self._source.name}")
        return tokens

    def _folder(self, precision: str) -> Path:
        folder = self._scratch / f"{precision}-{sum(1 for _ in self._scratch.iterdir())}"
        folder.mkdir()
        return folder

    def _finish(self, folder: Path, fields: dict[str, Any], form: Form, measure: _Measure) -> _Made:
        """Opens what was built as users will, measures it, and writes down how it came out."""
        fields |= {
            "name": self._order.name,
            "architecture": self._source.architecture,
            "source": self._source.name,
            "license": self._order.license_name,
        }
        write_manifest(folder, **fields)
        try:
            parity = measure(open_model_folder(folder))
            parity |= form.said() if form else {}
            return _Made(folder, write_manifest(folder, **fields, parity=parity), _faults(fields["precision"], parity))
        except (ExportError, OSError):
            raise
        except FlinkLlmError as error:
            raise PrecisionError(str(error)) from error
        except Exception as error:  # ONNX Runtime's errors share no base class, and torch's come from anywhere
            reason = first_line(error)
            raise PrecisionError(f"{self._source.name} was built, and cannot be run: {reason}") from error


def _is_coarse(made: _Made) -> bool:
    """Whether four bits in long blocks lose what those in short ones might not."""
    parity = made.manifest.parity
    every = [parity, *parity.get("adapters", {}).values()]
    return "block" in parity and max(each.get("perplexity_change", 0.0) for each in every) > COARSE


def _faults(precision: str, parity: Mapping[str, Any]) -> list[str]:
    """Of the model alone, and of each adapter."""
    of_adapters = [
        f"with adapter {name} {fault}"
        for name, measured in parity.get("adapters", {}).items()
        for fault in faults(precision, measured)
    ]
    return [*faults(precision, parity), *of_adapters]


class _DecoderExporter(_Exporter):
    unit = "tokens"
    candidates = ("int8", "int4", "fp32")

    def __init__(self, source: Source, order: Order, scratch: Path) -> None:
        super().__init__(source, order, scratch)
        length, positions = decoders.sizes(source)["context_length"], source.number("max_position_embeddings")
        if length < positions:
            self.note = f"{source.name} has {positions} positions, {length} are served: LongRoPE's short factors"
        self._adapters = [read_peft(name, folder) for name, folder in order.adapters.items()]
        self._references: dict[str, Reference] = {}

    def _forms(self, precision: str) -> Sequence[Form]:
        if precision == "int4":
            return decoders.int4_forms(self._source)
        last = (EightBits("unsigned", head=False),) if precision == "int8" else ()
        return (*super()._forms(precision), *last)

    def _build(self, folder: Path, precision: str, form: Form) -> tuple[dict[str, Any], _Measure]:
        fields = decoders.build_decoder(self._source, folder, self._scratch, precision, form, self._adapters)

        def measure(opened: ModelFolder) -> dict[str, Any]:
            references = self._refer(opened)
            measured = {name: measure_decoder(opened, each, precision, name) for name, each in references.items()}
            alone = measured.pop("")
            if held_twice(opened.manifest, MIXED_MB):
                found = measure_mixed(opened, references[""])
                if found <= LARGEST_MIXED_DIFFERENCE:
                    alone["mixed_difference"] = found
                else:  # it is faster, no more
                    log.warning("%s is served without mixed runs: theirs differ by %g", self._order.name, found)
                    (folder / MIXED).unlink()
            return {**alone, "adapters": measured} if measured else alone

        return {**fields, "kind": "decoder"}, measure

    def _refer(self, opened: ModelFolder) -> dict[str, Reference]:
        """The original alone, by "", and with each adapter in its weights, by that one's name."""
        if not self._references:
            try:
                # All or none: an adapter that was not compared is not shipped.
                self._references = self._referred(opened)
            except (FlinkLlmError, OSError):
                raise
            except Exception as error:  # torch's and transformers' come from anywhere
                raise ExportError(f"{self._source.name} could not be compared with: {first_line(error)}") from error
        return self._references

    def _referred(self, opened: ModelFolder) -> dict[str, Reference]:
        import torch
        from transformers import AutoModelForCausalLM

        check_prompts(self._source.folder, opened)
        tokenizer, prompts = open_prompts(opened)
        plain = self._read(tokenizer)
        asked = list(plain)
        if "chat_template.jinja" in opened.files:
            asked += [prompts.chat([{"role": "user", "content": text}], None) for text in self._texts]
        with encoders.hushed(), read_by_transformers(self._source.name):
            original = AutoModelForCausalLM.from_pretrained(self._source.folder, dtype=torch.float32).eval()
        asked = [tokens for tokens in asked if tokens]
        references = {"": refer(original, asked, plain)}
        for adapter in self._adapters:
            with merged(original, adapter):
                references[adapter.name] = refer(original, asked, plain)
        return references


class _EncoderExporter(_Exporter):
    def __init__(self, source: Source, order: Order, scratch: Path) -> None:
        super().__init__(source, order, scratch)
        self._task = encoders.task_of(source, order.task)
        self._fields = {**encoders.fields_of(source, self._task), "kind": self._task}
        self._original: Any = None

    def _build(self, folder: Path, precision: str, form: Form) -> tuple[dict[str, Any], _Measure]:
        encoders.build_encoder(self._source, folder, self._scratch, precision, self._task, form)

        def measure(opened: ModelFolder) -> dict[str, Any]:
            if self._original is None:
                check_prompts(self._source.folder, opened)
                self._original = encoders.load_original(self._source, self._task)
            tokenizer, _ = open_prompts(opened)
            return measure_encoder(opened, self._original, self._read(tokenizer), self._task)

        return self._fields, measure


def _exporter(source: Source, order: Order, scratch: Path) -> _Exporter:
    is_decoder = source.architecture in decoders.SERVED
    if is_decoder and order.task is not None:
        raise ExportError(f"{source.architecture} is a decoder: it has no task {order.task!r}")
    if not is_decoder and order.adapters:
        raise ExportError(f"{source.architecture} is an encoder: it cannot have adapters")
    kinds = decoders.PRECISIONS if is_decoder else encoders.PRECISIONS
    if order.precision not in ("auto", *kinds):
        raise ExportError(f"{source.architecture} is exported in {', '.join(kinds)}, not in {order.precision}")
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ExportError(NEEDS) from error
    return (_DecoderExporter if is_decoder else _EncoderExporter)(source, order, scratch)


def export_decoder(source: Path, to: Path, *, name: str, precision: Precision, license_name: str = "") -> Manifest:
    """`export_model` in its earlier form."""
    return export_model(source, to, Order(name, precision, license_name=license_name))
