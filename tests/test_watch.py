"""How processes of one command part: nobody takes the store away from those that still need it, and last words are not overwritten."""

import signal
import threading
import time

import pytest
from torch.distributed import HashStore
from waiting import wait_until

from features import watch


@pytest.fixture
def pair(monkeypatch):
    """Function of a store: two Watches of one command, which have met."""
    monkeypatch.setattr(watch, "BEAT", 0.02)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # what a Watch sends to its process when another has failed
    made = []

    def meet(store):
        watches = [watch.Watch(store, number, 2) for number in range(2)]
        made.extend(watches)
        others = threading.Thread(target=watches[1].start)
        others.start()
        watches[0].start()
        others.join()
        return watches

    yield meet
    for one in made:
        one.end(0)
    for one in reversed(made):
        one.close()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("code", [0, 2, watch.INTERRUPTED])
def test_the_first_process_stays_until_the_others_have_learned_how_it_ended(pair, code):
    first, second = pair(HashStore())
    second.end(code)
    first.end(code)
    leaving = threading.Thread(target=first.close, daemon=True)
    leaving.start()
    time.sleep(0.3)
    assert leaving.is_alive()
    second.settle(seconds=5)
    second.close()
    wait_until(lambda: not leaving.is_alive())


def test_the_first_process_does_not_wait_for_one_that_has_fallen_silent(pair, monkeypatch):
    monkeypatch.setattr(watch, "SILENCE", 0.2)
    first, second = pair(HashStore())
    monkeypatch.setattr(second, "_say", lambda: None)
    wait_until(first._find_fault)
    first.end(2)
    monkeypatch.setattr(watch, "GRACE", 10_000)
    leaving = threading.Thread(target=first.close, daemon=True)
    leaving.start()
    wait_until(lambda: not leaving.is_alive())


class SlowStore(HashStore):
    """A store that takes its time over signs of life, and none over last words."""

    def __init__(self):
        super().__init__()
        self.on_its_way = threading.Event()

    def set(self, key, value):
        if '"ended": null' in value:
            self.on_its_way.set()
            time.sleep(0.2)
        super().set(key, value)


def test_a_sign_of_life_on_its_way_does_not_hide_the_last_words(pair):
    store = SlowStore()
    _, second = pair(store)
    store.on_its_way.clear()
    wait_until(store.on_its_way.is_set)
    second.end(0)
    second.close()
    time.sleep(0.5)
    assert b'"code": 0' in store.get("process/1")
