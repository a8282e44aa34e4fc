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
    assert result.iou_per_class[0] == 0.5
    assert result.pixel_accuracy == 0.5
    assert result.confusion[0, -1] == 1


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


def test_reset_forgets():
    metric = MeanIoU(2)
    metric.update(tensor([0]), tensor([1]))
    metric.reset()
    metric.update(tensor([1]), tensor([1]))
    assert metric.compute().miou == 1.0


class TestConventions:
    """What classes that the ground truth lacks do to the mean, here and in the evaluations of published numbers."""

    @staticmethod
    def mit_scene_parsing(confusion):
        """The mean is over all classes; an empty union gives 0."""
        union = confusion.sum(1) + confusion.sum(0)[:-1] - confusion.diagonal()
        return (confusion.diagonal() / (union + np.spacing(1))).mean()

    @staticmethod
    def detectron2(confusion):
        """The mean is over the classes of the ground truth."""
        union = confusion.sum(1) + confusion.sum(0)[:-1] - confusion.diagonal()
        true = confusion.sum(1) > 0
        return (confusion.diagonal()[true] / union[true]).mean()

    def test_all_agree_where_the_truth_has_every_class(self):
        """As in the validation sets of Cityscapes and ADE20K, in which label 0 is void and class k is label k + 1."""
        rng = np.random.default_rng(0)
        labels = np.concatenate([np.arange(151), rng.integers(0, 151, 20_000)])
        prediction = np.where(rng.random(labels.size) < 0.6, labels, rng.integers(1, 151, labels.size))
        prediction[labels == 0] = 150  # no penalty
        metric = MeanIoU(150)
        metric.update(torch.from_numpy(prediction - 1), torch.from_numpy(np.where(labels == 0, 255, labels - 1)))
        result = metric.compute()
        hits = np.bincount(labels[labels == prediction], minlength=151)[1:]
        union = np.bincount(labels, minlength=151)[1:] + np.bincount(prediction[labels > 0], minlength=151)[1:] - hits
        assert result.iou_per_class == pytest.approx(hits / union, abs=1e-12)
        assert result.miou == pytest.approx((hits / union).mean(), abs=1e-12)
        assert result.miou == pytest.approx(self.mit_scene_parsing(result.confusion), abs=1e-12)
        assert result.miou == pytest.approx(self.detectron2(result.confusion), abs=1e-12)

    def test_a_class_that_is_only_predicted(self):
        result = measure([[0, 1, 2, 2]], [[0, 1, 1, 1]])
        assert result.miou == pytest.approx((1 + 1 / 3 + 0) / 3)
        assert self.mit_scene_parsing(result.confusion) == pytest.approx(result.miou)
        assert self.detectron2(result.confusion) == pytest.approx((1 + 1 / 3) / 2)

    def test_a_class_that_does_not_occur(self):
        result = measure([[0, 1, 1, 1]], [[0, 1, 1, 0]])
        assert result.miou == pytest.approx((1 / 2 + 2 / 3) / 2)
        assert self.mit_scene_parsing(result.confusion) == pytest.approx((1 / 2 + 2 / 3) / 3)
        assert self.detectron2(result.confusion) == pytest.approx(result.miou)
