"""What `flink-llm try` makes of a job's outcomes."""

import json

import pytest

from flink_llm.errors import LocalError
from flink_llm.local import trial


def written(folder, *outcomes):
    (folder / "2026-11-25").mkdir()
    (folder / "2026-11-25" / "part").write_text("".join(f"{json.dumps(outcome)}\n" for outcome in outcomes))
    return folder


def test_the_reply_is_the_response_s_text(tmp_path):
    token = {"request_id": "1", "text": "Or"}
    assert trial.reply(written(tmp_path, token, {"finish_reason": "stop", "text": "Order"})) == "Order"


def test_a_failure_is_an_error(tmp_path):
    with pytest.raises(LocalError, match=r"^too_large: it is long$"):
        trial.reply(written(tmp_path, {"code": "too_large", "message": "it is long"}))


def test_no_outcome_is_an_error(tmp_path):
    with pytest.raises(LocalError, match=r"^the job ended without an outcome"):
        trial.reply(written(tmp_path, {"request_id": "1", "text": "Or"}))
