"""The demo model's benchmark asks as the job does."""

import pytest

from benchmarks import demo_model
from models.training.dialogues import Dialogue


def asked(question):
    features = {"first_name": "Ada", "order_id": "1042", "order_status": "shipped", "delivery_date": "2026-12-01"}
    return Dialogue("status", features, [{"role": "user", "content": question}], "", quotes=["1042", "shipped"])


@pytest.mark.parametrize(
    ("question", "found"),
    [("Where is order 1042?", True), ("I live in 10115, where is order 1042?", False), ("Where is it?", False)],
)
def test_an_order_is_found_by_the_number_that_the_job_finds(question, found):
    assert demo_model.finds_order(asked(question)) is found


@pytest.mark.skipif(not (demo_model.MODEL / "manifest.json").exists(), reason="the demo's model is not trained")
def test_the_prompt_holds_what_the_job_looked_up():
    right, wrong = demo_model.answers(demo_model.MODEL, [asked("Where is order 1042?"), asked("Where is order 2042?")])
    assert right["features"]["order_status"] == "shipped" and "shipped" in right["text"]
    assert wrong["features"]["order_status"] is None and wrong["features"]["first_name"] == "Ada"
    assert "shipped" not in wrong["text"]
