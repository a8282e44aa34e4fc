import math

import numpy as np
import pytest
import torch
from torch import tensor
from torchmetrics.functional.classification import multiclass_jaccard_index

from pem_lightning.metrics import MeanIoU


def measure(prediction, target, num_classes=3):
    metric = MeanIoU(num_classes)
    metric.update(tensor(prediction), tensor(target))
    return metric.compute()


def test_hand_computed_example():
    result = measure([[0, 0, 1, 1]], [[0, 1, 1, 255]])
    assert result.confusion.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert result.iou_per_class[:2].tolist() == [0.5, 0.5]
    assert math.isnan(result.iou_per_class[2])  # in neither: left out of the mean
    assert result.miou == 0.5
    assert result.pixel_accuracy == pytest.approx(2 / 3)


def test_predicting_no_class_is_wrong_where_labelled_and_nothing_where_not():
    result = measure([[0, 255, 255]], [[0, 0, 255]])
    assert result.iou_per_class[0] == 0.5
    assert result.pixel_accuracy == 0.5
    assert result.confusion[0, -1] == 1


def test_class_that_is_only_predicted_counts_as_zero():
    assert measure([[0, 2]], [[0, 0]]).miou == pytest.approx((0.5 + 0.0) / 2)


def test_agrees_with_torchmetrics_where_every_class_occurs():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 5, (2, 3, 40, 50), generator=generator)
    target = torch.randint(0, 6, (2, 3, 40, 50), generator=generator)
    target[target == 5] = 255
    metric = MeanIoU(5)
    for p, t in zip(prediction, target, strict=True):
        metric.update(p, t)
    official = multiclass_jaccard_index(prediction, target, 5, average=None, ignore_index=255)
    assert np.allclose(metric.compute().iou_per_class, official.numpy(), rtol=1e-6)


def test_small_integers_are_understood():
    metric = MeanIoU(200)
    metric.update(tensor([199, 255], dtype=torch.uint8), tensor([199, 255], dtype=torch.uint8))
    assert metric.compute().miou == 1.0


def test_nothing_labelled_gives_nan_and_no_warning(recwarn):
    metric = MeanIoU(2)
    metric.update(tensor([[1]]), tensor([[255]]))
    result = metric.compute()
    assert math.isnan(result.miou)
    assert math.isnan(result.pixel_accuracy)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("stray", [3, -1])
def test_target_that_is_no_class_is_refused(stray):
    with pytest.raises(ValueError, match=f"target {stray} is neither"):
        measure([[0]], [[stray]])


def test_reset_forgets():
    metric = MeanIoU(2)
    metric.update(tensor([0]), tensor([1]))
    metric.reset()
    metric.update(tensor([1]), tensor([1]))
    assert metric.compute().miou == 1.0
