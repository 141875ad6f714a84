"""An encoder at work: what waits at the same moment is run together."""

import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.encoder import Encoder
from flink_llm.engine.job import Job, Said
from flink_llm.engine.metrics import ModelMetrics
from flink_llm.engine.model import ModelFolder
from flink_llm.engine.protocol import Done
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import ModelFolderError, Overloaded, RecordError

ENCODER_BATCH = 64


class Encoding:
    """A `ServedModel` over an encoder."""

    def __init__(self, folder: ModelFolder, settings: HostSettings, device: str, metrics: ModelMetrics) -> None:
        manifest = folder.manifest
        self.name = manifest.name
        self.metrics = metrics
        self._kind = "classify" if manifest.kind == "classifier" else "embed"
        self._limit = manifest.context_length
        self._queue = settings.queue
        self._tokenizer = Tokenizer(folder.files["tokenizer.json"], manifest.vocab_size)
        if self._tokenizer.marks >= self._limit:
            raise ModelFolderError(f"{self.name}: a context of {self._limit} holds the tokenizer's marks and no text")
        self._encoder = Encoder(folder, device=device, threads=settings.threads)
        self._encoder.warm_up()
        self._waiting: deque[tuple[Job, list[int]]] = deque()

    def add(self, job: Job) -> None:
        """See `ServedModel.add`. Raises RecordError, Overloaded, and what a tokenizer raises."""
        if job.work.kind != self._kind:
            raise RecordError("bad_option", f"{self.name} cannot {job.work.kind}")
        if len(self._waiting) >= self._queue:
            raise Overloaded(f"{self._queue} texts are waiting", retry_after=0.5)
        text = job.work.text or ""
        tokens = self._tokenizer.encode_marked(text, self._limit) if text.strip() else []
        if not tokens:
            raise RecordError("empty_text", "there is no text")
        self._waiting.append((job, tokens))

    def step(self, said: Said) -> bool:
        """See `ServedModel.step`."""
        batch: list[tuple[Job, list[int]]] = []
        while self._waiting and len(batch) < ENCODER_BATCH:
            job, tokens = self._waiting.popleft()
            if job.cancelled:
                job.leave()
            else:
                batch.append((job, tokens))
        self._count(batch)
        answers = self._encoder.run([tokens for _, tokens in batch])
        for (job, tokens), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                job.fail(answer, said)
            elif not np.isfinite(answer).all():
                job.fail(RecordError("model_error", "the model's answer is not finite"), said)
            else:
                job.say(self._done(job, len(tokens), answer), said)
        return bool(batch)

    def _count(self, batch: list[tuple[Job, list[int]]]) -> None:
        now = time.monotonic()
        if batch:
            self.metrics.step(len(batch))
        for job, tokens in batch:
            job.metrics.began(now)
            job.metrics.read(len(tokens))

    def drop(self) -> list[Job]:
        """See `ServedModel.drop`."""
        waiting, self._waiting = self._waiting, deque()
        return [job for job, _ in waiting]

    def _done(self, job: Job, tokens: int, answer: NDArray[np.float32]) -> Done:
        if self._kind == "embed":
            vector = answer.astype("<f4").tobytes()
            return Done(call=0, generation=job.generation, prompt_tokens=tokens, vector=vector)
        return Done(call=0, generation=job.generation, prompt_tokens=tokens, scores=[float(share) for share in answer])
