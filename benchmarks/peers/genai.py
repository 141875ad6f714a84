"""onnxruntime-genai over its own graph: Generator, one request at a time or in a static batch, and Engine.

Its Engine is paged on CUDA only; on a CPU it runs static batches of four, a number fixed in its source.
"""

import contextlib
import io
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from benchmarks.load import Request, rate, wait_until
from benchmarks.machine import CORES
from benchmarks.shapes import ROOT

PRECISIONS = ("fp32", "int8", "int4")
EVENTS = 64


def build(source: Path, precision: str, root: Path = ROOT) -> Path:
    """The folder that its own builder makes of a Hugging Face folder, made once."""
    to = root / f"{source.name}-genai-{precision}"
    if (to / "genai_config.json").exists():
        return to
    from onnxruntime_genai.models import builder

    logging.getLogger("onnxruntime.quantization").setLevel(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        names = (None, str(source), str(to), precision, "cpu", str(root / "cache"))
        builder.create_model(*names, **builder.parse_extra_options(*names, []))
    return to


class Genai:
    """One of its folders, loaded once for all three ways."""

    def __init__(self, folder: Path) -> None:
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": CORES}}}}))
        self._model = og.Model(config)
        self._engine: Any = None

    def one_by_one(self, requests: Sequence[Request]) -> float:
        """Tokens per second over the makespan: its Generator, first come, first served."""
        began = time.perf_counter()
        for request in requests:
            wait_until(began + request.at)
            self._generate([request])
        return rate(requests, began)

    def static(self, requests: Sequence[Request]) -> float:
        """Tokens per second over the makespan: its Generator over one batch of equal lengths."""
        began = time.perf_counter()
        self._generate(requests)
        return rate(requests, began)

    def engine(self, requests: Sequence[Request]) -> float:
        """Tokens per second over the makespan: its Engine, requests added as they arrive."""
        if self._engine is None:
            self._engine = og.Engine(self._model)
        events = self._engine.create_event_buffer(EVENTS)
        began = time.perf_counter()
        coming, open_, said = list(requests), 0, 0
        alive = []
        while coming or open_:
            while coming and coming[0].at <= time.perf_counter() - began:
                alive.append(self._begin(coming.pop(0)))
                open_ += 1
            if not open_:
                wait_until(began + coming[0].at)
                continue
            for event in self._engine.run(events):
                if event.flags & og.EngineEventFlags.FAILED:
                    raise RuntimeError(f"its engine fails a request: {event.error_code}")
                said += bool(event.flags & og.EngineEventFlags.TOKEN)
                open_ -= bool(event.flags & og.EngineEventFlags.TURN_FINISHED)
        for request in alive:
            request.close()
        if said != sum(request.reply for request in requests):
            raise RuntimeError(f"its engine said {said} tokens")
        return rate(requests, began)

    def _begin(self, request: Request) -> Any:
        begun = self._engine.create_request()
        turn = og.TurnOptions(begun)
        turn.set_do_sample(False)
        turn.set_max_generated_tokens(request.reply)
        begun.begin_turn(np.array(request.tokens, np.int32), turn)
        return begun

    def _generate(self, requests: Sequence[Request]) -> None:
        length, reply = len(requests[0].tokens), requests[0].reply
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=length + reply, batch_size=len(requests), do_sample=False)
        generator = og.Generator(self._model, params)
        tokens = np.array([request.tokens for request in requests], np.int32)
        generator.append_tokens(tokens if len(requests) > 1 else tokens[0])
        for _ in range(reply):
            generator.generate_next_token()
