import pytest

from pem_lightning.callbacks import progress as stopwatch
from pem_lightning.callbacks.progress import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """Time as a list of one number of seconds."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now[0])
    return now


def test_validation_is_kept_apart(clock):
    watch = Stopwatch()
    assert watch.seconds_per_step is watch.images_per_second is watch.to_go(5, 1) is None
    for _ in range(4):
        clock[0] += 2
        watch.step(6)
    assert (watch.training, watch.seconds_per_step, watch.images_per_second) == (8, 2, 3)
    assert watch.to_go(5, 1) == 10  # no validation is known yet
    watch.pause()
    clock[0] += 30
    assert watch.paused
    assert watch.training == 8
    watch.resume()
    watch.resume()  # there is none
    assert (watch.training, watch.validating, watch.validations, watch.paused) == (8, 30, 1, False)
    assert watch.to_go(5, 2) == 10 + 2 * 30


def test_the_pace_is_that_of_the_last_hundred_steps(clock):
    watch = Stopwatch()
    for seconds in [50] * 10 + [1] * 100:
        clock[0] += seconds
        watch.step(4)
    assert (watch.seconds_per_step, watch.images_per_second) == (1, 4)
    assert (watch.steps, watch.images, watch.training) == (110, 440, 600)
