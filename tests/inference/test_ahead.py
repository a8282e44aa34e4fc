import threading
import time

import pytest

from pem_lightning.inference.sources import prefetch


def test_all_items_in_order():
    with prefetch(iter(range(100))) as items:
        assert list(items) == list(range(100))


def test_a_few_are_made_before_they_are_used():
    made = []

    def numbers():
        for i in range(100):
            made.append(i)
            yield i

    with prefetch(numbers(), depth=3) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3, 4]  # one used, three waiting, one that has no room yet


def test_steps_run_side_by_side():
    def slow(items):
        for item in items:
            time.sleep(0.05)
            yield item

    start = time.perf_counter()
    with prefetch(slow(range(10))) as first, prefetch(slow(first)) as second:
        assert list(slow(second)) == list(range(10))
    assert time.perf_counter() - start < 0.8 * 3 * 10 * 0.05


def test_errors_appear_where_the_items_are_used():
    def fail():
        yield 1
        raise ValueError("broken")

    with prefetch(fail()) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="broken"):
            next(items)


def test_nothing_runs_on_when_it_is_left():
    alive = threading.active_count()

    def leave():
        with prefetch(iter(range(10**9))) as first, prefetch(first) as second:
            assert next(second) == 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert threading.active_count() == alive
