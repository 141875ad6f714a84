"""The demo end to end: a real broker, a mini-cluster, Feast and the shipped model."""

import re

import pytest

from flink_llm.config import load
from flink_llm.local import demo_job, processes, talk
from flink_llm.local.demo import FIRST, Demo

MODEL = demo_job.shipped("models") / "support-chat"


class Asked(Demo):
    """Its job is asked once more, as `flink-llm ask` does."""

    def _sample(self):
        good = super()._sample()
        print("asked:")
        talk.ask(load(self._state / "demo.yaml"), FIRST, "user-1", None, 60.0)
        return good


@pytest.mark.timeout(400)
@pytest.mark.skipif(not (MODEL / "manifest.json").exists(), reason="the demo's model is not trained")
def test_every_event_is_answered_and_a_reply_is_streamed(tmp_path, capsys):
    assert Asked(tmp_path, 5).run()
    said = capsys.readouterr().out
    # A reply of some ten milliseconds may overtake its tokens, which are another topic.
    kinds = r"^first (?:streamed reply|reply \(its tokens came behind it\)) after ([\d.]+) s$"
    [after] = re.findall(kinds, said, re.MULTILINE)
    assert 0 < float(after) < 180
    assert re.search(r"^> Where is order 1042\?\n+.*1042", said, re.MULTILINE)
    assert re.search(r"answered .* 5 of 5", said)
    assert re.search(r"to the first token, 5 at once, p50 .* [1-9]\d* ms", said)
    assert "1042" in said.partition("asked:\n")[2].splitlines()[0]
    assert processes.recall(tmp_path / "demo.json") is None
