"""Metrics over two processes are those of one process, to the last bit."""

import socket
from datetime import timedelta

import numpy as np
import pytest
import torch

from pem_lightning.metrics import AveragePrecision, MeanIoU, PanopticQuality
from pem_lightning.types import Segment

CLASSES = 4


def images(count=11):
    """Arguments of the three metrics for random images; some classes are in few of them, and scores have ties."""
    rng = np.random.default_rng(0)
    for number in range(count):
        gt_map = rng.integers(0, 9, (6, 7)).repeat(5, 0).repeat(5, 1).astype(np.int32)
        pred_map = np.where(rng.random(gt_map.shape) < 0.85, gt_map, rng.integers(0, 9, gt_map.shape)).astype(np.int32)
        class_of = rng.integers(0, CLASSES if number == 4 else CLASSES - 1, 9)
        class_of[0] = 255
        pred_segments, gt_segments = (
            [Segment(i, int(class_of[i]), bool(class_of[i] < 2)) for i in np.unique(ids).tolist() if i]
            for ids in (pred_map, gt_map)
        )
        maps = torch.from_numpy(pred_map), torch.from_numpy(gt_map)
        objects = [(maps[0] == s.id, s.class_id, float(rng.integers(3))) for s in pred_segments if s.is_thing]
        classes = tuple(torch.from_numpy(class_of)[m.long()] for m in maps)
        yield (maps[0], pred_segments, maps[1], gt_segments), classes, (objects, maps[1], gt_segments, str(number))


def measure(chosen):
    """All numbers of the metrics, as text that has every bit."""
    metrics = PanopticQuality(CLASSES, {0, 1}), MeanIoU(CLASSES), AveragePrecision(CLASSES)
    for number, arguments in enumerate(images()):
        for metric, given in zip(metrics, arguments, strict=True):
            if number in chosen:
                metric.update(*given)
    numbers = [value for metric in metrics for value in metric.compute()]
    return [np.asarray(value, np.float64).tobytes().hex() for value in numbers]


SHARES = [10, 2, 0], [1, 3, 4, 5, 6, 7, 8, 9]


def one_of_two(rank, port, answers):
    limit = timedelta(seconds=100)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=limit)
    try:
        answers.put(measure(SHARES[rank]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one():
    alone = measure(range(11))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    other = context.Process(target=one_of_two, args=(1, port, answers))
    other.start()
    one_of_two(0, port, answers)
    other.join(120)
    assert other.exitcode == 0
    assert [answers.get(), answers.get()] == [alone, alone]
