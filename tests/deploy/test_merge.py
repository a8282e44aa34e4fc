"""Maps merged in the graph equal those of `postprocess`, before anything is exported."""

import pytest
import torch
from torch import nn

from pem_lightning.deploy.merge import merge
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.types import Predictions, UserError

RULES = {"object_mask_threshold": 0.3, "overlap_threshold": 0.2}
THINGS = {3, 4}
NUM_CLASSES = 5


class Given(nn.Module):
    """Logits that do not depend on the image."""

    def __init__(self, class_logits, mask_logits):
        super().__init__()
        self.logits = class_logits, mask_logits

    def forward(self, images):
        return self.logits


def draw(batch, seed, certain=True):
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(batch, 12, NUM_CLASSES + 1, generator=generator) * (6 if certain else 0.1)
    coarse = torch.randn(batch, 12, 4, 6, generator=generator) * 5
    return class_logits, nn.functional.interpolate(coarse, size=(16, 24), mode="bicubic")


@pytest.mark.parametrize("seed", range(4))
def test_panoptic(seed):
    logits, size = draw(1, seed), (61, 93)
    graph = merge(Given(*logits), "panoptic", thing_classes=THINGS, num_classes=NUM_CLASSES, **RULES)
    ids, table = graph(torch.zeros(1, *size, 3, dtype=torch.uint8))
    wanted = TaskInference("panoptic", THINGS, **RULES)(Predictions(*logits), size, size)
    assert torch.equal(ids, wanted.panoptic)
    assert len(wanted.segments) > 2
    assert [(int(i), int(c)) for i, c, _ in table] == [(s.id, s.class_id) for s in wanted.segments]
    torch.testing.assert_close(table[:, 2], torch.tensor([s.score for s in wanted.segments]))


def test_no_query_is_certain():
    graph = merge(Given(*draw(1, 0, False)), "panoptic", thing_classes=THINGS, num_classes=NUM_CLASSES)
    ids, table = graph(torch.zeros(1, 64, 96, 3, dtype=torch.uint8))
    assert not ids.any()
    assert table.shape == (0, 3)


def test_semantic_of_a_batch():
    logits, size = draw(2, 0), (61, 93)
    graph = merge(Given(*logits), "semantic", thing_classes=THINGS, num_classes=NUM_CLASSES)
    (classes,) = graph(torch.zeros(2, *size, 3, dtype=torch.uint8))
    for i, got in enumerate(classes):
        one = Predictions(*(x[i : i + 1] for x in logits))
        assert torch.equal(got, TaskInference("semantic", THINGS)(one, size, size).semantic)


def test_unknown_results():
    with pytest.raises(UserError, match="results=instance: choose false, panoptic or semantic"):
        merge(nn.Identity(), "instance", thing_classes=THINGS, num_classes=NUM_CLASSES)
