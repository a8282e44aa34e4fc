"""Metrics over two processes are those of one process, to the last bit."""

import socket

import numpy as np
import pytest
import torch

from pem_lightning.metrics import MeanIoU, PanopticQuality
from pem_lightning.types import Segment

CLASSES = 4


def images(count=11):
    """Random images: predicted and true id maps with their segments, and class maps; some classes in few of them."""
    rng = np.random.default_rng(0)
    for number in range(count):
        gt_map = rng.integers(0, 9, (6, 7)).repeat(5, 0).repeat(5, 1).astype(np.int32)
        pred_map = np.where(rng.random(gt_map.shape) < 0.85, gt_map, rng.integers(0, 9, gt_map.shape)).astype(np.int32)
        class_of = rng.integers(0, CLASSES if number == 4 else CLASSES - 1, 9)
        class_of[0] = 255
        pred_segments, gt_segments = (
            [Segment(i, int(class_of[i]), class_of[i] < 2) for i in np.unique(ids).tolist() if i]
            for ids in (pred_map, gt_map)
        )
        maps = torch.from_numpy(pred_map), torch.from_numpy(gt_map)
        yield (maps[0], pred_segments, maps[1], gt_segments), tuple(torch.from_numpy(class_of)[m.long()] for m in maps)


def measure(chosen):
    """All numbers of both metrics, as text that has every bit."""
    panoptic, semantic = PanopticQuality(CLASSES, {0, 1}), MeanIoU(CLASSES)
    for number, (segments, classes) in enumerate(images()):
        if number in chosen:
            panoptic.update(*segments)
            semantic.update(*classes)
    numbers = {**panoptic.compute()._asdict(), **semantic.compute()._asdict()}
    return {name: np.asarray(value, np.float64).tobytes().hex() for name, value in numbers.items()}


def _one_of_two(rank, port, share, answers):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    answers.put(measure(share))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one():
    shares = [10, 2, 0], [1, 3, 4, 5, 6, 7, 8, 9]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    workers = [
        context.Process(target=_one_of_two, args=(rank, port, share, answers)) for rank, share in enumerate(shares)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    alone = measure(range(11))
    for _ in workers:
        assert answers.get() == alone
