"""An encoder at work: texts are answered from memory, or run together with others of their length."""

import time
from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from flink_llm.engine.answers import Answer, Answers, Numbers, content_key
from flink_llm.engine.batching import LIMITS, next_run
from flink_llm.engine.encoder import Encoder
from flink_llm.engine.job import Job, Said
from flink_llm.engine.metrics import ModelMetrics
from flink_llm.engine.model import ModelFolder
from flink_llm.engine.pace import Pace
from flink_llm.engine.protocol import Done, Submit, WorkKind
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.tagging import entities
from flink_llm.engine.tokenizer import Spans, Tokenizer
from flink_llm.errors import ModelFolderError, RecordError
from flink_llm.priorities import rank_of

DOCUMENTS = 256
"""Of one ranking: they are tokenised at once, and whatever runs meanwhile waits for that."""
KINDS: dict[str, WorkKind] = {
    "embedding": "embed",
    "classifier": "classify",
    "token_classifier": "tag",
    "reranker": "rerank",
}
"""What a model of a kind can be asked."""


class _Asked:
    """A piece of work and its answers as they come: one, or one for each document."""

    __slots__ = ("answers", "job", "missing", "over")

    def __init__(self, job: Job, answers: list[Answer | None]) -> None:
        self.job = job
        self.answers = answers
        self.missing = answers.count(None)
        self.over = False


class _Row:
    """One text or pair that waits for the model, since monotonic seconds; `rank` is that, later for lower priority."""

    __slots__ = ("asked", "key", "place", "rank", "since", "spans", "text", "tokens", "types")

    def __init__(self, asked: _Asked, place: int, text: str, key: bytes) -> None:
        self.asked = asked
        self.place = place
        self.text = text
        self.key = key
        self.since = time.monotonic()
        self.rank = rank_of(self.since, asked.job.work.priority)
        self.tokens: list[int] = []
        self.types: list[int] = []
        self.spans: Spans | None = None


class Encoding:
    """A `ServedModel` over an encoder. `answers` are what all models of the engine have said."""

    def __init__(
        self, folder: ModelFolder, settings: HostSettings, device: str, metrics: ModelMetrics, answers: Answers
    ) -> None:
        manifest = folder.manifest
        self.name = manifest.name
        self.metrics = metrics
        self._sha256 = folder.sha256
        self._kind = KINDS[manifest.kind]
        self._labels = manifest.labels
        self._normalize = manifest.normalize
        self._limit = manifest.context_length
        self._queue = settings.queue
        self._answers = answers
        self._limits = LIMITS[device.partition(":")[0]]
        self._tokenizer = Tokenizer(folder.files["tokenizer.json"], manifest.vocab_size)
        marks = self._tokenizer.pair_marks + 1 if self._kind == "rerank" else self._tokenizer.marks
        if marks >= self._limit:
            raise ModelFolderError(f"{self.name}: a context of {self._limit} holds the tokenizer's marks and no text")
        self._encoder = Encoder(folder, device=device, threads=settings.threads)
        self._encoder.warm_up()
        self._waiting: list[_Row] = []
        self._ready: list[_Asked] = []
        self._in_step: list[_Asked] = []
        self._pace = Pace(1)

    def add(self, job: Job) -> None:
        """See `ServedModel.add`. Raises RecordError, Overloaded, and what a tokenizer raises."""
        work = job.work
        if work.kind != self._kind:
            raise RecordError("bad_option", f"{self.name} cannot {work.kind}")
        if work.adapter:
            raise RecordError("unknown_adapter", f"{self.name} is an encoder: it has no adapters")
        self._check(work)
        query = [work.text or ""] if self._kind == "rerank" else []
        texts = work.documents if self._kind == "rerank" else [work.text or ""]
        keys = [content_key(self._sha256, self._kind, *query, text) for text in texts]
        asked = _Asked(job, [self._answers.get(key) for key in keys])
        rows = [_Row(asked, i, texts[i], keys[i]) for i, answer in enumerate(asked.answers) if answer is None]
        if not rows:
            self._ready.append(asked)
            return
        place = bisect_right(self._waiting, rows[-1].rank, key=attrgetter("rank"))
        self._pace.admit(place, job.left(), full=place >= self._queue)
        for row in rows:
            self._tokenise(row, *query)
        self._waiting[place:place] = rows

    def step(self, said: Said) -> bool:
        """See `ServedModel.step`. One run, after which those it answers are told."""
        ready, self._ready = self._ready, []
        self._in_step = list(ready)
        for asked in ready:
            asked.job.metrics.began(time.monotonic())
            self._finish(asked, said)
        self._let_go()
        rows = list(self._take())
        self._in_step += [row.asked for row in rows]
        if rows:
            began = time.monotonic()
            self._count(rows, began)
            found = self._encoder.run([row.tokens for row in rows], [row.types for row in rows])
            self._pace.took((time.monotonic() - began) / len(rows))
            for row, answer in zip(rows, found, strict=True):
                self._answer(row, answer, said)
        self._in_step = []
        return bool(ready or rows)

    def _let_go(self) -> None:
        """Whose client has gone leaves at once, wherever it waits: it takes the place of another."""
        for asked in {row.asked for row in self._waiting if row.asked.job.cancelled and not row.asked.over}:
            asked.over = True
            asked.job.leave()
        self._waiting = [row for row in self._waiting if not row.asked.over]

    def _count(self, rows: list[_Row], now: float) -> None:
        self.metrics.step(len(rows))
        for row in rows:
            row.asked.job.metrics.began(now)
            row.asked.job.metrics.read(len(row.tokens))

    def drop(self) -> list[Job]:
        """See `ServedModel.drop`."""
        asked = [*self._in_step, *self._ready, *(row.asked for row in self._waiting)]
        self._in_step, self._ready, self._waiting = [], [], []
        return [each.job for each in dict.fromkeys(asked) if not each.over]

    def _check(self, work: Submit) -> None:
        """Raises RecordError for what can be seen before anything is tokenised."""
        size = self._encoder.dimension
        if work.dimensions is not None and not (self._kind == "embed" and 1 <= work.dimensions <= size):
            has = f"has 1 to {size}" if self._kind == "embed" else "makes no embeddings"
            raise RecordError("bad_option", f"dimensions is {work.dimensions}, {self.name} {has}")
        if not (work.text or "").strip():
            raise RecordError("empty_text", "there is no text")
        if self._kind != "rerank":
            return
        if not work.documents:
            raise RecordError("empty_text", "there are no documents")
        if len(work.documents) > DOCUMENTS:
            raise RecordError("too_large", f"there are {len(work.documents)} documents, {DOCUMENTS} are ranked at once")
        for i, document in enumerate(work.documents):
            if not document.strip():
                raise RecordError("empty_text", f"there is no text in document {i}")

    def _tokenise(self, row: _Row, query: str = "") -> None:
        text = row.text
        if self._kind == "rerank":
            row.tokens, row.types = self._tokenizer.encode_pair(query, text, self._limit)
        elif self._kind == "tag":
            # Of a text that is cut, what is in the rest would be missing without a word.
            most = self._limit * self._tokenizer.longest
            if len(text) > most:
                raise RecordError("context_overflow", f"the text has {len(text)} characters, {most} may fit")
            row.spans = self._tokenizer.encode_spans(text)
            row.tokens = row.spans.ids
            if len(row.tokens) > self._limit:
                message = f"the text has {len(row.tokens)} tokens, {self.name} reads {self._limit}"
                raise RecordError("context_overflow", message)
        else:
            row.tokens = self._tokenizer.encode_marked(text, self._limit)
        if not row.tokens:
            raise RecordError("empty_text", "there is no text")

    def _take(self) -> Iterator[_Row]:
        if not self._waiting:
            return
        waited = time.monotonic() - self._waiting[0].since  # by rank: of one lane it is the oldest
        chosen = set(next_run([len(row.tokens) for row in self._waiting], waited, self._limits))
        yield from (row for i, row in enumerate(self._waiting) if i in chosen)
        self._waiting = [row for i, row in enumerate(self._waiting) if i not in chosen]

    def _answer(self, row: _Row, found: Numbers | Exception, said: Said) -> None:
        asked = row.asked
        if asked.over:
            return
        if isinstance(found, Exception):
            asked.over = True
            asked.job.fail(found, said)
        elif not np.isfinite(found).all():
            asked.over = True
            asked.job.fail(RecordError("model_error", "the model's answer is not finite"), said)
        else:
            answer = self._read(row, found)
            self._answers.put(row.key, answer)
            asked.answers[row.place] = answer
            asked.missing -= 1
            if not asked.missing:
                self._finish(asked, said)

    def _read(self, row: _Row, found: Numbers) -> Answer:
        if row.spans is None:
            return Answer(len(row.tokens), found.copy())  # a row of a run would keep all of the run alive
        tagged = entities(row.text, row.spans, found, self._labels)
        return Answer(len(row.tokens), np.empty(0, dtype=np.float32), tuple(tagged))

    def _finish(self, asked: _Asked, said: Said) -> None:
        answers = [answer for answer in asked.answers if answer is not None]
        scores: list[float] = []
        vector = b""
        if self._kind == "embed":
            vector = cut(answers[0].numbers, asked.job.work.dimensions, normalize=self._normalize).tobytes()
        elif self._kind != "tag":
            scores = [float(number) for answer in answers for number in answer.numbers]
        done = Done(
            call=0, generation=asked.job.generation, prompt_tokens=sum(answer.tokens for answer in answers),
            vector=vector, scores=scores, entities=[each for answer in answers for each in answer.entities],
        )  # fmt: skip
        asked.over = True
        asked.job.say(done, said)


def cut(vector: Numbers, dimensions: int | None, *, normalize: bool) -> NDArray[np.float32]:
    """The first `dimensions` of an embedding [dimension], of length 1 again where `normalize`; as "<f4".

    Models that are trained for it say most with their first dimensions (Kusupati et al., 2022, "Matryoshka
    Representation Learning", arXiv:2205.13147).
    """
    kept = vector[:dimensions].astype("<f4")
    if normalize and dimensions is not None:
        kept /= max(float(np.linalg.norm(kept)), 1e-12)
    return kept
