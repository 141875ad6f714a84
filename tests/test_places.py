"""Places: who waits, for how long, and who lends."""

import threading
import time

from flink_llm.places import PATIENCE_S, Places


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
