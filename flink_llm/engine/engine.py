"""The engine: models on one device, stepped by one thread, behind the `Backend` interface.

The loop's side queues work and hears of events; the thread's side runs the steps. Each step's events
reach the loop together, in one wake-up, however many generations they belong to.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from flink_llm.engine.decoder import Decoder
from flink_llm.engine.encoder import Encoder
from flink_llm.engine.model import Manifest, ModelFolder, open_model_folder
from flink_llm.engine.prompts import Prompts
from flink_llm.engine.protocol import Done, Event, Fault, Loaded, Submit
from flink_llm.engine.sampling import sample
from flink_llm.engine.scheduler import Entry, Scheduler
from flink_llm.engine.sequence import Sequence
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import Overloaded, RecordError

log = logging.getLogger(__name__)
CHUNK = 256
ENCODER_BATCH = 64
Emit = Callable[[Event], None]


class _Job:
    """One piece of work in the engine."""

    __slots__ = ("cancelled", "emit", "entry", "sequence", "work")

    def __init__(self, work: Submit, emit: Emit) -> None:
        self.work = work
        self.emit = emit
        self.cancelled = False
        self.sequence: Sequence | None = None
        self.entry: Entry[_Job] | None = None


class OnnxBackend:
    """A `Backend` over ONNX Runtime."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._device = resolve_device(settings.device)
        self._models: dict[str, _Generator | _Encoder] = {}
        self._loading = asyncio.Lock()
        self._inbox: deque[tuple[_Job, str]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        """See `Backend.load`. Raises ModelFolderError, ConfigError."""
        async with self._loading:
            opened = await asyncio.to_thread(open_model_folder, folder, sha256)
            if opened.sha256 not in self._models:
                began = time.monotonic()
                make = _Generator if opened.manifest.kind == "decoder" else _Encoder
                self._models[opened.sha256] = await asyncio.to_thread(make, opened, self._settings, self._device)
                log.info("loaded %s on %s in %.1f s", folder, self._device, time.monotonic() - began)
        self._start_thread()
        manifest = opened.manifest
        return Loaded(
            call=0, name=manifest.name, sha256=opened.sha256, kind=manifest.kind,
            context_length=manifest.context_length, labels=manifest.labels,
        )  # fmt: skip

    def start(self, work: Submit, generation: str, emit: Emit) -> Callable[[], None]:
        """See `Backend.start`."""
        job = _Job(work, emit)
        if work.model not in self._models:
            message = f"no model {work.model[:12]!r} is loaded"
            emit(Fault(call=0, kind="record", code="unknown_model", message=message))
            return lambda: None
        self._inbox.append((job, generation))
        self._wake.set()

        def cancel() -> None:
            job.cancelled = True
            self._wake.set()

        return cancel

    async def close(self) -> None:
        """Stops the thread after its step."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10)

    def _start_thread(self) -> None:
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="flink-llm engine", daemon=True)
            self._thread.start()

    # The thread's side.

    def _run(self) -> None:
        while not self._stopping:
            events: list[tuple[Emit, Event]] = []
            while self._inbox:
                job, generation = self._inbox.popleft()
                self._models[job.work.model].add(job, generation, events)
            busy = False
            for model in list(self._models.values()):
                busy |= self._step(model, events)
            self._deliver(events)
            if not busy and not self._inbox:
                self._wake.wait(0.05)
                self._wake.clear()

    def _step(self, model: "_Generator | _Encoder", events: list[tuple[Emit, Event]]) -> bool:
        try:
            return model.step(events)
        except Exception as error:  # a run that fails takes its own work down, never the engine
            log.exception("a step of %s failed", model.name)
            message = f"the model failed: {type(error).__name__}: {error}"[:500]
            for job in model.drop():
                events.append((job.emit, Fault(call=0, kind="outage", code="outage", message=message)))
            return True

    def _deliver(self, events: list[tuple[Emit, Event]]) -> None:
        if not events or self._loop is None:
            return

        def emit_all() -> None:
            for emit, event in events:
                emit(event)

        self._loop.call_soon_threadsafe(emit_all)


class _Generator:
    """A decoder with its scheduler."""

    def __init__(self, folder: ModelFolder, settings: HostSettings, device: str) -> None:
        manifest = folder.manifest
        self.name = manifest.name
        self._tokenizer = Tokenizer(folder.files["tokenizer.json"], manifest.vocab_size)
        template = folder.files.get("chat_template.jinja", b"").decode()
        self._prompts = Prompts(template, self._tokenizer, manifest.special_tokens)
        self._ends = frozenset(manifest.eos_token_ids)
        self._context = manifest.context_length
        self._decoder = Decoder(folder, device=device, threads=settings.threads, slots=settings.slots)
        self._settings = settings
        self._scheduler = self._new_scheduler()
        self._jobs: dict[int, _Job] = {}

    def _new_scheduler(self) -> Scheduler[_Job]:
        return Scheduler(self._settings.slots, self._settings.queue, CHUNK)

    def add(self, job: _Job, generation: str, events: list[tuple[Emit, Event]]) -> None:
        """Queues a generation, or says why not."""
        try:
            prompt = self._prompt(job.work)
            job.sequence = Sequence(prompt, job.work.options, generation, self._tokenizer, self._ends)
            job.entry = self._scheduler.add(
                job, len(prompt), priority=job.work.priority, now=time.monotonic(), deadline=job.work.deadline
            )
            self._jobs[id(job)] = job
        except (RecordError, Overloaded) as error:
            events.append((job.emit, _fault(error)))

    def step(self, events: list[tuple[Emit, Event]]) -> bool:
        """One step; whether anything ran."""
        for job in [job for job in self._jobs.values() if job.cancelled]:
            self._leave(job)
        plan = self._scheduler.plan(time.monotonic())
        for entry in plan.expired:
            self._expire(entry.item, events)
        if plan.prefill is not None:
            self._prefill(*plan.prefill, events)
        if plan.decode:
            self._decode([entry.item for entry in plan.decode], events)
        return bool(plan.prefill or plan.decode)

    def drop(self) -> list[_Job]:
        """Forgets all work, after a run that failed."""
        jobs, self._jobs = list(self._jobs.values()), {}
        self._scheduler = self._new_scheduler()
        return jobs

    def _prompt(self, work: Submit) -> list[int]:
        if work.kind != "generate":
            raise RecordError("bad_option", f"{self.name} generates, it cannot {work.kind}")
        tokens = (
            self._prompts.chat(work.messages, work.features)
            if work.messages is not None
            else self._prompts.text(work.prompt or "")
        )
        if len(tokens) >= self._context:
            raise RecordError(
                "context_overflow", f"the prompt has {len(tokens)} tokens, the model's context {self._context}"
            )
        return tokens

    def _prefill(self, entry: Entry[_Job], start: int, count: int, events: list[tuple[Emit, Event]]) -> None:
        sequence = entry.item.sequence
        if sequence is None or entry.slot is None:
            return
        if start == 0:
            sequence.began = time.monotonic()
        logits = self._decoder.prefill(entry.slot, sequence.prompt[start : start + count], start)
        self._scheduler.advance(entry, count)
        if entry.filled == entry.prompt:
            self._take([entry.item], sample(logits[None], [0], [sequence.options], [0]), events)

    def _decode(self, jobs: list[_Job], events: list[tuple[Emit, Event]]) -> None:
        running = [(job, job.entry.slot, job.sequence) for job in jobs if job.entry and job.sequence]
        slots = [slot for _, slot, _ in running if slot is not None]
        logits = self._decoder.step(slots, [sequence.last for _, _, sequence in running])
        options = [sequence.options for _, _, sequence in running]
        tokens = sample(logits, slots, options, [sequence.count for _, _, sequence in running])
        self._take([job for job, _, _ in running], tokens, events)

    def _take(self, jobs: list[_Job], tokens: list[int | None], events: list[tuple[Emit, Event]]) -> None:
        for job, token in zip(jobs, tokens, strict=True):
            if job.sequence is None:
                continue
            if token is None:
                error = RecordError("model_error", "the model's logits are not finite")
                events.append((job.emit, _fault(error)))
                self._leave(job)
                continue
            said = job.sequence.take(token, self._context)
            if said is not None:
                events.append((job.emit, said))
            if job.sequence.finish is not None:
                events.append((job.emit, job.sequence.done()))
                self._leave(job)

    def _expire(self, job: _Job, events: list[tuple[Emit, Event]]) -> None:
        if job.sequence is not None:
            said = job.sequence.flush()
            if said is not None:
                events.append((job.emit, said))
            events.append((job.emit, job.sequence.done()))
        self._leave(job)

    def _leave(self, job: _Job) -> None:
        self._jobs.pop(id(job), None)
        entry = job.entry
        if entry is not None and not entry.gone:  # an expired one has left already, its slot may be another's
            self._scheduler.remove(entry)
            if entry.slot is not None:
                self._decoder.release(entry.slot)


class _Encoder:
    """An encoder with what waits for it."""

    def __init__(self, folder: ModelFolder, settings: HostSettings, device: str) -> None:
        manifest: Manifest = folder.manifest
        self.name = manifest.name
        self._kind = "classify" if manifest.kind == "classifier" else "embed"
        self._limit = manifest.context_length
        self._queue = settings.queue
        self._tokenizer = Tokenizer(folder.files["tokenizer.json"], manifest.vocab_size)
        self._encoder = Encoder(folder, device=device, threads=settings.threads)
        self._waiting: deque[tuple[_Job, str, list[int]]] = deque()
        self._batch: list[tuple[_Job, str, list[int]]] = []

    def add(self, job: _Job, generation: str, events: list[tuple[Emit, Event]]) -> None:
        """Queues a text, or says why not."""
        try:
            if job.work.kind != self._kind:
                raise RecordError("bad_option", f"{self.name} cannot {job.work.kind}")
            if not (job.work.text or "").strip():
                raise RecordError("empty_text", "there is no text")
            if len(self._waiting) >= self._queue:
                raise Overloaded(f"{self._queue} texts are waiting", retry_after=0.5)
        except (RecordError, Overloaded) as error:
            events.append((job.emit, _fault(error)))
            return
        tokens = self._tokenizer.encode_for_encoder(job.work.text or "", self._limit)
        self._waiting.append((job, generation, tokens))

    def step(self, events: list[tuple[Emit, Event]]) -> bool:
        """Runs what waits; whether anything did."""
        self._batch = []
        while self._waiting and len(self._batch) < ENCODER_BATCH:
            job, generation, tokens = self._waiting.popleft()
            if not job.cancelled:
                self._batch.append((job, generation, tokens))
        if not self._batch:
            return False
        for (job, generation, tokens), vector in zip(
            self._batch, self._encoder.run([tokens for _, _, tokens in self._batch]), strict=True
        ):
            done: dict[str, Any] = {"call": 0, "generation": generation, "prompt_tokens": len(tokens)}
            if self._kind == "embed":
                done["vector"] = vector.astype("<f4").tobytes()
            else:
                done["scores"] = [float(share) for share in vector]
            events.append((job.emit, Done(**done)))
        return True

    def drop(self) -> list[_Job]:
        """Forgets the batch whose run failed."""
        batch, self._batch = self._batch, []
        return [job for job, _, _ in batch]


def _fault(error: RecordError | Overloaded) -> Fault:
    if isinstance(error, Overloaded):
        return Fault(call=0, kind="overloaded", code="overloaded", message=str(error), retry_after=error.retry_after)
    return Fault(call=0, kind="record", code=error.code, message=error.message)
