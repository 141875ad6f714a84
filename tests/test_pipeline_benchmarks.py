"""How the pipeline's benchmarks judge what they saw: pure parts, without Flink and Kafka."""

import time

import pytest

from benchmarks import burst, forms, operator, samples, soak
from benchmarks.operator import Turn


def test_only_whole_seconds_after_settling_count():
    turn = Turn("ours", 1000.2, 1006.7)

    seconds = [second % 60 for second in operator.seconds_of(turn)]

    assert seconds == [time.localtime(at).tm_sec for at in (1002, 1003, 1004, 1005)]


def test_a_rate_is_of_the_seconds_that_count_and_empty_ones_count_too():
    turn = Turn("ours", 1000.0, 1004.0)
    first, second = operator.seconds_of(turn)

    assert operator.rates([turn], {first: {5: 30, 7: 10}, first - 1: {1: 999}}) == [20.0]
    assert operator.late([turn], {second: {5: 2, 7: 1}}) == [5.0, 5.0, 7.0]


def test_what_the_jobs_print_is_read():
    found = operator._COUNTS.findall("noise\nours_1000> +I[23:59:01, -1, 12]\nstock> +I[00:00:00, 740, 3] x\n")

    assert found == [("ours_1000", "23", "59", "01", "-1", "12")]


def test_the_best_stock_is_compared():
    found = {
        "ours_1000": 8000.0, "ours_1000_full": 5000.0, "ours_100": 950.0, "ours_zero": 9000.0,
        "stock_1000": 500.0, "stock_1000_10000": 1000.0, "stock_zero": 6000.0, "late": [1.0], "checkpoints": [],
    }  # fmt: skip

    figures = operator.summary(found)

    assert figures["x_stock_1000"] == 8.0
    assert figures["of_ideal_1000_full"] == 0.5
    assert figures["x_stock_zero_work"] == 1.5
    assert figures["checkpoint_p99_ms"] is None


def test_forms_are_compared_with_stock():
    one = {"p50_ms": 60.04, "p99_ms": 200.0, "per_s": 900.0}

    figures = forms.summary({"stream": one, "stock": {**one, "per_s": 300.0}})

    assert figures["x_stock_stream"] == 3.0
    assert figures["stream_p50_ms"] == 60.0
    assert "x_stock_stock" not in figures


def seen(sent, took, code=None):
    return burst.Seen(sent, sent + took, code, sent + 0.02 if code else 0.0)


def test_a_burst_is_over_when_p99_is_within_twice_of_before():
    calm = [seen(at / 10, 0.1) for at in range(100)]
    during = [seen(10 + at / 10, 1.0) for at in range(100)] + [seen(12.0, 0.05, "shed")]
    after = [seen(20 + at / 10, 0.5 if at < 20 else 0.15) for at in range(60)]

    figures = burst.judge(calm + during + after, 10.0, 20.0)

    assert figures["recovery_s"] == 2.0
    assert figures["accepted_in_deadline"] == 1.0
    assert figures["refusal_p99_ms"] == 20.0
    assert figures["refused"] == 1


def test_late_answers_and_other_failures_were_accepted_and_not_in_time():
    calm = [seen(at / 10, 0.1) for at in range(98)]

    figures = burst.judge([*calm, seen(5.0, 3.0), seen(5.1, 0.1, "deadline")], 9.0, 9.5)

    assert figures["accepted_in_deadline"] == 0.98
    assert figures["others_failed"] == ["deadline"]


def test_growth_is_of_the_windows_medians_after_the_warm_up():
    samples = [(float(at), {"threads": 1.0 if at < 10 else 100.0 + at / 10, "state": 0.0}) for at in range(101)]

    grown = soak.growth(samples, 20.0, 10.0)

    assert grown["threads"] == pytest.approx(109.5 / 102.5 - 1)
    assert grown["state"] == 0.0


@pytest.mark.parametrize(
    ("told", "kilobytes"),
    [
        (
            " def new generation   total 9792K, used 1000K [0x1, 0x2)\n  eden space 8704K,  11% used [0x1\n"
            " tenured generation   total 21888K, used 2000K [0x3\n Metaspace       used 500K, committed 768K",
            3000,
        ),
        (" garbage-first heap   total 262144K, used 5120K [0x1\n  region size 1024K, 3 young", 5120),
    ],
)
def test_javas_heap_is_read(told, kilobytes):
    assert soak.used_kb(told) == kilobytes


def test_samples_are_counted_by_thread_and_function():
    first = "thread (1): a;run (x/y/z.py:3);work (y/z.py:5) 30\nthread (1): a;run (x/y/z.py:9) 10\n"
    text = first + "thread (2): b;run (q.py:1) 5\n"
    found = samples.shares(text)
    assert list(found) == ["thread (1): a", "thread (2): b"]
    assert found["thread (1): a"] == {
        "samples": 40,
        "own": {"work (y/z.py)": 0.75, "run (y/z.py)": 0.25},
        "with_calls": {"run (y/z.py)": 1.0, "work (y/z.py)": 0.75},
    }
