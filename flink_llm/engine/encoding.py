"""An encoder at work: what waits at the same moment is run together."""

import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.encoder import Encoder
from flink_llm.engine.job import Job, Said
from flink_llm.engine.metrics import ModelMetrics
from flink_llm.engine.model import ModelFolder
from flink_llm.engine.pace import Pace
from flink_llm.engine.protocol import Done
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.tokenizer import Tokenizer
from flink_llm.errors import ModelFolderError, RecordError

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
        self._pace = Pace(1)

    def add(self, job: Job) -> None:
        """See `ServedModel.add`. Raises RecordError, Overloaded, and what a tokenizer raises."""
        if job.work.kind != self._kind:
            raise RecordError("bad_option", f"{self.name} cannot {job.work.kind}")
        self._pace.admit(len(self._waiting), job.left(), full=len(self._waiting) >= self._queue)
        text = job.work.text or ""
        tokens = self._tokenizer.encode_marked(text, self._limit) if text.strip() else []
        if not tokens:
            raise RecordError("empty_text", "there is no text")
        self._waiting.append((job, tokens))

    def step(self, said: Said) -> bool:
        """See `ServedModel.step`."""
        self._let_go()
        batch = [self._waiting.popleft() for _ in range(min(ENCODER_BATCH, len(self._waiting)))]
        if not batch:
            return False
        began = time.monotonic()
        self._count(batch, began)
        answers = self._encoder.run([tokens for _, tokens in batch])
        self._pace.took((time.monotonic() - began) / len(batch))
        for (job, tokens), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                job.fail(answer, said)
            elif not np.isfinite(answer).all():
                job.fail(RecordError("model_error", "the model's answer is not finite"), said)
            else:
                job.say(self._done(job, len(tokens), answer), said)
        return True

    def _let_go(self) -> None:
        """Whose client has gone leaves at once, wherever it waits: it takes the place of another."""
        waiting, self._waiting = self._waiting, deque()
        for job, tokens in waiting:
            if job.cancelled:
                job.leave()
            else:
                self._waiting.append((job, tokens))

    def _count(self, batch: list[tuple[Job, list[int]]], now: float) -> None:
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
