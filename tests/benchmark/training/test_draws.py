import torch

from pem_lightning.benchmark.training.draws import SharedDraws

CPU = torch.device("cpu")


def test_rows_are_the_same_in_whatever_order_and_shape_they_are_asked_for():
    by_image, at_once = SharedDraws(1), SharedDraws(1)
    parts = []
    for _ in range(2):  # layers
        points = [by_image((1, 8, 2), CPU) for _ in range(3)]
        parts.append((torch.cat(points), by_image((4, 24, 2), CPU)))
    matching = at_once((2, 3, 8, 2), CPU)
    candidates = at_once((8, 24, 2), CPU)
    assert torch.equal(matching, torch.stack([points for points, _ in parts]))
    assert torch.equal(candidates, torch.cat([rows for _, rows in parts]))
    assert 0 <= matching.min() < matching.max() < 1
    assert len(matching.unique()) == matching.numel()


def test_other_seeds_draw_others_and_no_rows_are_fine():
    assert not torch.equal(SharedDraws(1)((2, 8, 2), CPU), SharedDraws(2)((2, 8, 2), CPU))
    assert SharedDraws()((0, 8, 2), CPU).shape == (0, 8, 2)
