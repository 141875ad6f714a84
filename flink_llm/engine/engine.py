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

from flink_llm.engine.answers import Answers
from flink_llm.engine.decoding import Decoding
from flink_llm.engine.encoding import Encoding
from flink_llm.engine.faults import fault_of, lacks_memory
from flink_llm.engine.graphs import providers
from flink_llm.engine.job import Emit, Job, Said, ServedModel
from flink_llm.engine.metrics import Metrics
from flink_llm.engine.model import Manifest, open_model_folder, read_manifest
from flink_llm.engine.protocol import Fault, Loaded, Submit
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.engine.stock import needed_bytes
from flink_llm.errors import FlinkLlmError, ModelFolderError, Outage

log = logging.getLogger(__name__)
TAKEN_PER_STEP = 256
TAKING_S = 0.02
"""How much new work is tokenised before the next step: what is running must not wait for it."""
FREEING_S = 0.005
_DEAD = "the engine's thread has died"


class OnnxBackend:
    """A `Backend` over ONNX Runtime. Raises ConfigError where that has no CUDA and a GPU is asked for.

    `when_dead` is called if the engine's thread ends of an error: nothing is computed any more, and all
    work is an outage.
    """

    def __init__(
        self, settings: HostSettings, when_dead: Callable[[], None] = lambda: None, metrics: Metrics | None = None
    ) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._when_dead = when_dead
        self._device = resolve_device(settings.device)
        providers(self._device)  # a host without its GPU ends at its start, not at a model's load
        self._models: dict[str, ServedModel] = {}
        self._answers = Answers(settings.cache_mb)
        self._loading = asyncio.Lock()
        self._turns = 0
        self._inbox: deque[Job] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._dead = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def load(self, folder: str, sha256: str | None) -> Loaded:
        """See `Backend.load`. A model that is loaded already is known by its manifest."""
        if self._dead:
            raise Outage(_DEAD)
        async with self._loading:
            manifest, found = await asyncio.to_thread(read_manifest, folder, sha256)
            if found not in self._models:
                began = time.monotonic()
                self._models[found] = await asyncio.to_thread(self._open, folder, found)
                log.info("loaded %s on %s in %.1f s", folder, self._device, time.monotonic() - began)
        self._start_thread()
        return _loaded(manifest, found)

    async def look(self, folder: str, sha256: str | None) -> tuple[Loaded, int]:
        """See `Shelf.look`."""
        manifest, found = await asyncio.to_thread(read_manifest, folder, sha256)
        return _loaded(manifest, found), needed_bytes(manifest, self._settings.slots, self._settings.mixed_mb)

    async def unload(self, sha256: str) -> None:
        """See `Shelf.unload`."""
        last = [self._models.pop(sha256, None)]
        self._metrics.forget(sha256)
        await asyncio.to_thread(self._free, last)

    def start(self, work: Submit, generation: str, emit: Emit) -> Callable[[], None]:
        """See `Backend.start`."""
        if self._dead:
            raise Outage(_DEAD)
        if work.model not in self._models:
            message = f"no model {work.model[:12]!r} is loaded"
            emit(Fault(call=0, kind="record", code="unknown_model", message=message))
            return lambda: None
        metrics = self._models[work.model].metrics.request(work.priority)
        job = Job(work, generation, emit, metrics, self._wake.set)
        self._inbox.append(job)
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

    def _open(self, folder: str, sha256: str) -> ServedModel:
        """Raises ModelFolderError for whatever will be wrong at the next try too, Outage for a lack of memory."""
        try:
            opened = open_model_folder(folder, sha256)
            metrics = self._metrics.model(opened.manifest.name, sha256)
            if opened.manifest.kind == "decoder":
                return Decoding(opened, self._settings, self._device, metrics)
            return Encoding(opened, self._settings, self._device, metrics, self._answers)
        except FlinkLlmError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if lacks_memory(error):
                raise Outage(f"{folder} does not fit into the memory: {reason}") from error
            raise ModelFolderError(f"{folder} cannot be served: {reason}") from error

    def _free(self, last: list[ServedModel | None]) -> None:
        """Lets go of a model's last reference once the turn that may be running it has ended: off the loop and
        off the engine's thread, since giving gigabytes back takes its time."""
        turn = self._turns
        while self._turns == turn and self._thread is not None and self._thread.is_alive():
            time.sleep(FREEING_S)
        last.clear()

    def _start_thread(self) -> None:
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="flink-llm engine", daemon=True)
            self._thread.start()

    def _bury(self, said: Said) -> None:
        """The thread has died: whoever waits for it is told, once they have what was said."""
        self._dead = True
        left = [*self._inbox, *(job for model in self._models.values() for job in model.drop())]
        self._inbox.clear()
        _emit([*said, *((job.emit, fault_of(Outage(_DEAD))) for job in left)])
        self._when_dead()

    # The thread's side.

    def _run(self) -> None:
        said: Said = []
        try:
            while not self._stopping:
                busy = self._turn(said)
                if said:
                    self._hand_over(_emit, said)
                said = []
                if not busy and not self._inbox:
                    self._wake.wait(0.05)
                    self._wake.clear()
        except BaseException:  # only what no request brings about comes here
            log.critical("%s, and its host ends with it", _DEAD, exc_info=True)
            self._hand_over(self._bury, said)

    def _turn(self, said: Said) -> bool:
        self._take_in(said)
        busy = [self._step(model, said) for model in list(self._models.values())]
        self._turns += 1
        return any(busy)

    def _take_in(self, said: Said) -> None:
        until = time.monotonic() + TAKING_S
        taken = 0
        while self._inbox and taken < TAKEN_PER_STEP:
            job = self._inbox.popleft()
            if job.cancelled:
                job.leave()
                continue
            taken += 1
            try:
                model = self._models.get(job.work.model)
                if model is None:
                    raise Outage("the model was let go of meanwhile")
                model.add(job)
            except BaseException as error:  # a panic of the tokenizer is no Exception
                if not job.cancelled:
                    job.fail(error, said)
            if time.monotonic() > until:
                return

    def _step(self, model: ServedModel, said: Said) -> bool:
        try:
            return model.step(said)
        except Exception as error:  # no request's: a model sees to those itself
            log.exception("a step of %s failed", model.name)
            for job in model.drop():
                job.say(fault_of(Outage(f"a step failed: {type(error).__name__}: {error}")), said)
            return True

    def _hand_over(self, call: Callable[[Said], None], said: Said) -> None:
        """Has the loop call `call`."""
        if self._loop is None or self._loop.is_closed():  # whoever listened has gone without `close`
            self._stopping = True
        else:
            self._loop.call_soon_threadsafe(call, said)


def _loaded(manifest: Manifest, sha256: str) -> Loaded:
    return Loaded(
        call=0, name=manifest.name, sha256=sha256, kind=manifest.kind,
        context_length=manifest.context_length, labels=manifest.labels,
    )  # fmt: skip


def _emit(said: Said) -> None:
    for emit, event in said:
        try:
            emit(event)
        except Exception:  # one listener's, the others have to hear theirs
            log.exception("an event could not be delivered")
