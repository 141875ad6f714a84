"""Makes every model that the engine's benchmarks need, ours and the peers', so that `--quick` need not."""

import importlib
import logging
from pathlib import Path

from benchmarks import encoder, shapes


def main() -> None:
    """Exports and converts; what was made by this code before is kept."""
    logging.disable(logging.WARNING)
    source = shapes.source(shapes.SMOLLM2)
    for precision in shapes.precisions():
        _tell(shapes.exported(source, precision))
    for precision in encoder.PRECISIONS:
        _tell(shapes.exported(encoder.minilm(), precision, name="minilm"))
    genai = importlib.import_module("benchmarks.peers.genai")
    for precision in genai.PRECISIONS:
        _tell(genai.build(source, precision))
    try:
        llama = importlib.import_module("benchmarks.peers.llamacpp")
    except ImportError as error:
        print(f"llama.cpp is left out: {error}")
        return
    for form in llama.FORMS:
        _tell(llama.convert(source, form))


def _tell(path: Path) -> None:
    print(path.name, flush=True)


if __name__ == "__main__":
    main()
