import gc
import time

import pytest
import torch

from pem_lightning.benchmark.timing import Clock, Spread, measure_interleaved, paired_ratio


def test_spread_is_quartiles_and_extremes():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(1, 2, 3, 4, 5)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 7)


def test_contestants_take_turns_and_none_is_always_first():
    order = []
    tasks = {name: lambda clock, name=name: order.append(name) for name in "abc"}
    timings = measure_interleaved(tasks, rounds=2, warmup=1)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert {name: len(t.total) for name, t in timings.items()} == {"a": 2, "b": 2, "c": 2}  # the warm-up is left out


def test_stages_add_up_and_repeated_ones_are_joined():
    def task(clock):
        time.sleep(0.01)
        clock.lap("first")
        for _ in range(2):
            time.sleep(0.002)
            clock.lap("second")

    timing = measure_interleaved({"task": task}, rounds=1, warmup=0)["task"]
    assert list(timing.stages) == ["first", "second"]
    assert timing.stages["first"][0] >= 0.01
    assert timing.stages["second"][0] >= 0.004
    assert timing.total[0] == pytest.approx(timing.stages["first"][0] + timing.stages["second"][0], abs=1e-3)


def test_time_between_start_and_first_lap_belongs_to_it():
    clock = Clock()
    clock.start()
    time.sleep(0.005)
    clock.lap("only")
    total, stages = clock.stop()
    assert 0.005 <= stages["only"] <= total


def test_ratios_are_taken_within_a_round():
    slow_then_fast, twice_that = [4.0, 1.0, 2.0], [8.0, 2.0, 4.0]
    assert paired_ratio(twice_that, slow_then_fast) == Spread(2, 2, 2, 2, 2)


def test_garbage_is_not_collected_meanwhile():
    seen = []
    measure_interleaved({"task": lambda clock: seen.append(gc.isenabled())}, rounds=1, warmup=0)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_see_the_work_that_the_host_does_not_wait_for():
    a = torch.randn(4096, 4096, device="cuda")

    def task(clock):
        for _ in range(20):
            a @ a
        clock.lap("products")

    timing = measure_interleaved({"task": task}, rounds=3, device="cuda")["task"]
    assert min(timing.stages["products"]) > 20 * 2 * 4096**3 / 2e15  # no GPU does two petaflops in float32
