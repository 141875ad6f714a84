"""Deployment files, who gets which version, and when a canary may not stay: no model, no clock."""

import random
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flink_llm.engine.canary import LATELY, Canary, Sample
from flink_llm.engine.deployment import CanaryBounds, Version, chosen, deployment_id, place_of, read_deployment
from flink_llm.engine.routing import Routes
from flink_llm.errors import ConfigError

BOUNDS = CanaryBounds(max_failure_rate=0.05, max_latency_ratio=2.0, window=100)
OK = Sample(first_ms=10.0, per_token_ms=2.0)
FAILED = Sample(failed=True)


def written(folder: Path, text: str) -> Path:
    file = folder / "chat.yaml"
    file.write_text(text)
    return file


def test_a_file_is_read_with_its_folders_made_absolute(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "versions:\n"
        "  - {folder: v1, weight: 90}\n"
        "  - {folder: ../v2, weight: 10, canary: {max_failure_rate: 0.1}}\n"
        "  - {folder: /models/v3, weight: 0}\n",
    )
    assert read_deployment(file).versions == [
        Version(folder=str(tmp_path / "v1"), weight=90),
        Version(folder=str(tmp_path.parent / "v2"), weight=10, canary=CanaryBounds(max_failure_rate=0.1)),
        Version(folder="/models/v3", weight=0),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("versions: [{folder: a, wieght: 3}]", "versions[0]: unknown name 'wieght'; did you mean 'weight'?"),
        ("version: []", "deployment: unknown name 'version'; did you mean 'versions'?"),
        ("versions: []", "versions: Expected `array` of length >= 1"),
        ("versions: [{weight: 3}]", "versions[0]: the key `folder` is missing: add it"),
        ("{}", "deployment: the key `versions` is missing: add it"),
        ("versions: [{folder: a, weight: -1}]", "versions[0].weight: Expected `int` >= 0"),
        ("versions: [{folder: a, weight: .nan}]", "versions[0].weight: nan is no number to work with"),
        ("versions: [{folder: a, canary: {window: 3}}]", "versions[0].canary.window: Expected `int` >= 10"),
        ("versions: [{folder: a, canary: {}}]", "versions: one that is no canary must have a weight: it takes over"),
        ("versions: [{folder: a, weight: 0}]", "versions: one that is no canary must have a weight: it takes over"),
        ("versions: [{folder: a}, {folder: ./a}]", "/a is versions[0] already"),
        ("versions: [{folder: a}]\nversions: []", ", line 2: the key 'versions' stands there twice"),
        ("a list", "a deployment is a mapping with `versions`"),
        ("versions: [", "is not YAML"),
    ],
)
def test_a_broken_file_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_deployment(file)
    assert str(caught.value).startswith(str(file))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^/.*/none.yaml: No such file or directory; correct the path$"):
        read_deployment(tmp_path / "none.yaml")


def test_the_id_is_frozen() -> None:
    """Work of a job that is restored by a later release is found by it."""
    expect = "3b6115ec01aef42440f277ede15a24008a744ab6581c93b702a3c1355dad65be"
    assert deployment_id("/models/chat.yaml") == deployment_id("/models/../models/chat.yaml") == expect


weights = st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any)


@given(st.text(), st.text())
def test_a_place_is_one_for_good(request_id: str, salt: str) -> None:
    place = place_of(request_id, salt)
    assert 0 <= place < 1
    assert place == place_of(request_id, salt)


@given(st.floats(0, 1, exclude_max=True), weights)
def test_no_version_without_a_weight_is_chosen(place: float, weights: list[int]) -> None:
    assert weights[chosen(place, weights)] > 0


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 100), st.integers(0, 100))
def test_none_of_a_growing_versions_requests_change_over(place: float, share: int, more: int) -> None:
    low, high = sorted((share, more))
    if chosen(place, [100 - low, low]) == 1 and high:
        assert chosen(place, [100 - high, high]) == 1


def test_shares_are_the_weights_and_independent_of_another_deployments() -> None:
    versions = [Version(folder="a", weight=70), Version(folder="b", weight=30)]
    one, other = Routes("one", versions), Routes("other", versions)
    ids = [f"request-{number}" for number in range(5000)]
    pairs = Counter((one.choose(each), other.choose(each)) for each in ids)
    assert sum(count for (first, _), count in pairs.items() if first == 1) / 5000 == pytest.approx(0.3, abs=0.03)
    assert pairs[1, 1] / 5000 == pytest.approx(0.09, abs=0.02)


def test_a_canary_that_fails_is_gone_before_its_window_is_full() -> None:
    canary = Canary(BOUNDS)
    for _ in range(50):
        canary.note(OK, canary=False)
    for _ in range(6):
        assert canary.verdict is None
        canary.note(FAILED, canary=True)
    canary.note(OK, canary=False)
    expect = "6 of its last 6 requests failed where the others' did not, more than 5% of 100; of the others' last 51, 0"
    assert canary.verdict == expect


def test_a_canary_does_not_answer_for_what_fails_everywhere() -> None:
    canary = Canary(BOUNDS)
    for _ in range(200):
        canary.note(FAILED, canary=False)
        canary.note(FAILED, canary=True)
    assert canary.verdict is None


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(20))
def test_an_outage_of_the_host_is_not_held_against_a_canary(share: float, seed: int) -> None:
    """Before it, in it and behind it the canary is as good as the others."""
    drawn = random.Random(seed)
    canary = Canary(BOUNDS)
    for number in range(900):
        failed = any(start <= number < start + length for start, length in ((300, 30), (600, 100)))
        canary.note(FAILED if failed else OK, canary=drawn.random() < share)
    assert canary.verdict is None


@given(st.lists(st.floats(0.2, 50.0), min_size=30, max_size=300), st.integers(2, 12))
def test_load_that_rises_and_falls_is_not_held_against_a_canary(load: list[float], share: int) -> None:
    """One request in `share` is the canary's, which is as fast as the others at every moment."""
    canary = Canary(BOUNDS)
    level = 1.0
    for number, aim in enumerate(load):
        level += (aim - level) / 40  # a load of that many requests does not jump between two of them
        canary.note(Sample(first_ms=100 * level, per_token_ms=10 * level), canary=number % share == 0)
    assert canary.verdict is None


def test_a_burst_is_not_held_against_a_canary() -> None:
    canary = Canary(BOUNDS)
    for number in range(300):
        waited = 10.0 + 30.0 * number  # who came last waits longest
        canary.note(Sample(first_ms=waited, per_token_ms=5.0 if number > 150 else 30.0), canary=number % 10 == 5)
    assert canary.verdict is None


@pytest.mark.parametrize(
    ("slow", "what"),
    [
        (Sample(first_ms=30.0, per_token_ms=2.0), "to the first token"),
        (Sample(first_ms=10.0, per_token_ms=5.0), "for each further"),
    ],
)
def test_a_canary_that_is_slow_is_gone(slow: Sample, what: str) -> None:
    canary = Canary(BOUNDS)
    for _ in range(canary.least - 1):
        canary.note(OK, canary=False)
        canary.note(slow, canary=True)
    assert canary.verdict is None
    canary.note(OK, canary=False)
    canary.note(slow, canary=True)
    assert canary.verdict is not None
    assert what in canary.verdict


def test_requests_that_were_given_up_late_count_as_slow_and_early_ones_do_not() -> None:
    canary = Canary(BOUNDS)
    for _ in range(canary.least):
        canary.note(OK, canary=False)
        canary.abandoned(19.0)
    for _ in range(canary.least - 1):
        canary.abandoned(21.0)
    assert canary.verdict is None
    canary.abandoned(21.0)
    assert canary.verdict is not None


times = st.one_of(st.none(), st.floats(0.0, 1000.0))
samples = st.builds(Sample, failed=st.booleans(), first_ms=times, per_token_ms=times)
events = st.lists(st.tuples(samples, st.booleans()), max_size=80)
bounds = st.builds(
    CanaryBounds,
    max_failure_rate=st.floats(0, 0.9),
    max_latency_ratio=st.floats(1.01, 10),
    window=st.integers(10, 30),
)


@given(events, bounds)
def test_a_canary_stays_exactly_while_it_keeps_its_bounds(
    events: list[tuple[Sample, bool]], bounds: CanaryBounds
) -> None:
    """Against the rules as the documentation states them, computed from all that went before."""
    from statistics import median

    canary = Canary(bounds)
    own: list[bool] = []
    unjudged = 0
    others: list[Sample] = []
    pairs: dict[str, list[tuple[float, float]]] = {"first_ms": [], "per_token_ms": []}
    for sample, of_canary in events:
        if not of_canary:
            others.append(sample)
            own += [not sample.failed] * min(unjudged, bounds.window)
            unjudged = 0
        elif sample.failed and not any(each.failed for each in others[-LATELY:]):
            unjudged += 1
        else:
            own.append(False)
        for name, found in pairs.items():
            took = getattr(sample, name)
            lately = [t for each in others[-LATELY:] if (t := getattr(each, name)) is not None]
            if of_canary and took is not None and lately:
                found.append((took, median(lately)))
        bad = sum(own[-bounds.window :]) > bounds.max_failure_rate * bounds.window
        for found in (found[-bounds.window :] for found in pairs.values()):
            if len(found) >= canary.least:
                times_slower = median(took / max(usual, 1.0) for took, usual in found)
                bad |= times_slower > bounds.max_latency_ratio and median(took for took, _ in found) > 1.0
        before = canary.verdict
        canary.note(sample, canary=of_canary)
        assert (canary.verdict is not None) == (bad or before is not None)
        assert before in (None, canary.verdict)


def test_others_that_take_no_time_at_all_make_no_canary_slow() -> None:
    canary = Canary(CanaryBounds(max_failure_rate=0.0, max_latency_ratio=2.0, window=10))
    for _ in range(20):
        canary.note(Sample(per_token_ms=0.0), canary=False)  # their tokens are read together
        canary.note(Sample(per_token_ms=1.9), canary=True)
    assert canary.verdict is None


alike = st.floats(10.0, 19.0)


@given(st.lists(st.tuples(st.builds(Sample, st.just(False), alike, alike), st.booleans()), max_size=120))
def test_a_canary_as_good_as_the_others_stays(samples: list[tuple[Sample, bool]]) -> None:
    canary = Canary(CanaryBounds(max_failure_rate=0.0, max_latency_ratio=2.0, window=10))
    for sample, of_canary in samples:
        canary.note(sample, canary=of_canary)
    assert canary.verdict is None


def test_requests_of_a_canary_that_was_rolled_back_go_to_the_steady_ones_and_no_others_move() -> None:
    versions = [
        Version(folder="a", weight=60),
        Version(folder="b", weight=20),
        Version(folder="c", weight=20, canary=msgspec.structs.replace(BOUNDS, max_failure_rate=0.0)),
    ]
    routes = Routes("deployment", versions)
    ids = [f"request-{number}" for number in range(3000)]
    before = {each: routes.choose(each) for each in ids}
    assert routes.ended(2, FAILED) == []  # it may be the host that fails
    [(number, why)] = routes.ended(0, OK)
    assert (number, routes.rolled_back) == (2, {2})
    assert why.startswith("1 of its last 1 requests failed")
    after = {each: routes.choose(each) for each in ids}
    assert all(after[each] == before[each] for each in ids if before[each] != 2)
    moved = Counter(after[each] for each in ids if before[each] == 2)
    assert set(moved) == {0, 1}
    assert moved[0] / sum(moved.values()) == pytest.approx(0.75, abs=0.08)
    assert routes.ended(2, FAILED) == []
