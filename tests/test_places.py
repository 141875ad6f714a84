"""Places: who waits, for how long, and who lends."""

import threading
import time

import pytest

from flink_llm import places as module
from flink_llm.places import Places

PATIENCE_S = 0.5


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Long enough to be told from none on a busy machine."""
    monkeypatch.setattr(module, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(module, "PATIENCE_MOST_S", 3 * PATIENCE_S)


def taken_in(places, **options):
    began = time.monotonic()
    places.take(**options)
    return time.monotonic() - began


def test_a_place_that_is_given_back_ends_the_wait():
    places = Places(1)
    places.take()
    threading.Timer(0.05, places.give, [1]).start()
    assert taken_in(places) < PATIENCE_S / 2


def test_one_bundle_waits_no_longer_than_one_record():
    places = Places(1)
    places.take()
    first = taken_in(places)
    others = [taken_in(places) for _ in range(20)]
    assert 0.9 * PATIENCE_S < first < 2 * PATIENCE_S
    assert sum(others) < PATIENCE_S / 2
    places.let_go()
    assert taken_in(places) > 0.9 * PATIENCE_S


def test_who_has_overdrawn_much_waits_longer():
    places = Places(8)
    for _ in range(8):
        places.take()
    places.let_go()
    assert 0.9 * PATIENCE_S < taken_in(places) < 2 * PATIENCE_S
    assert taken_in(places) < PATIENCE_S / 2  # the patience of this bundle is spent
    places.let_go()
    assert taken_in(places) > 2.9 * PATIENCE_S
    places.give(1)
    places.let_go()
    assert taken_in(places) > 0.9 * PATIENCE_S


def test_who_has_overdrawn_much_goes_on_with_each_place_that_is_given_back():
    places = Places(8)
    for _ in range(8):
        places.take()
    for _ in range(2):
        places.let_go()
        places.take()
    places.let_go()
    threading.Timer(0.05, places.give, [1]).start()
    assert taken_in(places) < PATIENCE_S / 2
    places.give(9)
    places.let_go()
    assert taken_in(places) < PATIENCE_S / 2


def test_a_call_that_waits_for_the_mailbox_lends_one_place_and_no_more():
    places = Places(2)
    places.take()
    places.take()
    places.lend(+1)
    assert taken_in(places) < PATIENCE_S / 2
    assert taken_in(places) > 0.9 * PATIENCE_S


def test_restored_records_never_wait():
    places = Places(1)
    assert sum(taken_in(places, wait=False) for _ in range(10)) < PATIENCE_S / 2
