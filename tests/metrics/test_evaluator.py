import math

import pytest
import torch

from pem_lightning.inference.postprocess import Instance, Result
from pem_lightning.metrics.evaluator import Evaluator, from_plain, to_plain
from pem_lightning.types import ClassInfo, DatasetInfo, Sample, Segment

INFO = DatasetInfo("toy", (ClassInfo("person", (220, 20, 60), True, 24), ClassInfo("sky", (70, 130, 180), False, 23)))
SEGMENTS = (Segment(1, 0, True), Segment(2, 1, False))


def sample(columns, name="a"):
    """A person in so many columns of ten, sky in the others."""
    ids = torch.full((10, 10), 2, dtype=torch.int32)
    ids[:, :columns] = 1
    return Sample(torch.zeros(3, 10, 10, dtype=torch.uint8), ids, SEGMENTS, name)


def result(columns):
    ids = sample(columns).panoptic
    return Result(ids - 1, ids, SEGMENTS, (Instance(ids == 1, 0, 0.9), Instance(ids == 2, 0, 0.3)))


@pytest.mark.parametrize(
    ("task", "score"),
    [
        ("panoptic", (5 / 8 + 0) / 2),
        ("semantic", (5 / 8 + 2 / 5) / 2),
        ("instance", 1.0),
    ],
)
def test_an_image_has_its_own_score(task, score):
    """Five columns of a person, of which eight are said to be one: the sky's IoU of 2/5 is no match."""
    evaluator = Evaluator(INFO, task)
    assert evaluator.update(result(4), sample(4)) == 1
    assert evaluator.update(result(8), sample(5, "b")) == pytest.approx(score)
    empty = sample(5, "c")._replace(panoptic=torch.zeros(10, 10, dtype=torch.int32), segments=())
    nothing = Result(torch.full((10, 10), 1, dtype=torch.int32), torch.zeros(10, 10, dtype=torch.int32))
    assert math.isnan(evaluator.update(nothing, empty))


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_scores_of_images_leave_the_data_sets_metrics_alone(task):
    """The sums go on over images, and start anew after a reset."""
    evaluator = Evaluator(INFO, task)
    for columns in (4, 8):
        evaluator.update(result(columns), sample(5, f"image{columns}"))
    both = evaluator.compute()
    if task == "instance":
        assert both.instance.num_objects.tolist() == [2, 0]
    else:
        assert both.semantic.confusion.sum() == 200
        assert both.semantic.iou_per_class[0] == pytest.approx((4 + 5) / (5 + 8))
    if task == "panoptic":
        assert both.panoptic.true_positives.tolist() == [2, 1]
        assert both.panoptic.false_negatives.tolist() == [0, 1]
    assert (both.semantic is None) == (task == "instance") == (not evaluator.needs_semantic)
    evaluator.reset()
    evaluator.update(result(4), sample(4))
    assert all(value == pytest.approx(100) or math.isnan(value) for value in evaluator.compute().scalars().values())


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_a_checkpoint_holds_numbers_to_the_last_bit(task, tmp_path):
    evaluator = Evaluator(INFO, task)
    evaluator.update(result(8), sample(5))
    evaluation = evaluator.compute()
    torch.save(to_plain(evaluation), tmp_path / "a.pt")
    again = from_plain(torch.load(tmp_path / "a.pt", weights_only=True))
    assert type(again) is type(evaluation)
    assert repr(again) == repr(evaluation)
    assert from_plain(to_plain(None)) is None
