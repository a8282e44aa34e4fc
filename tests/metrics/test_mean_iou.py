import math

import numpy as np
import pytest
import torch
from torch import tensor

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
    assert (result.iou_per_class[0], result.pixel_accuracy, result.confusion[0, -1]) == (0.5, 0.5, 1)


def test_class_that_is_only_predicted_counts_as_zero():
    assert measure([[0, 2]], [[0, 0]]).miou == pytest.approx((0.5 + 0.0) / 2)


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


def test_equals_a_naive_evaluation():
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(151), rng.integers(0, 151, 20_000)])  # ADE20K's: 0 is void
    prediction = np.where(rng.random(labels.size) < 0.6, labels, rng.integers(1, 151, labels.size))
    prediction[labels == 0] = 150  # no penalty
    metric = MeanIoU(150)
    for part in np.array_split(np.arange(labels.size), 3):
        target = torch.from_numpy(np.where(labels == 0, 255, labels - 1)[part])
        metric.update(torch.from_numpy(prediction[part] - 1), target)
    result = metric.compute()
    hits = np.bincount(labels[labels == prediction], minlength=151)[1:]
    union = np.bincount(labels, minlength=151)[1:] + np.bincount(prediction[labels > 0], minlength=151)[1:] - hits
    assert result.iou_per_class == pytest.approx(hits / union, abs=1e-12)
    assert result.miou == pytest.approx((hits / union).mean(), abs=1e-12)
