import io

import numpy as np
import pytest
from PIL import Image

from pem_lightning.callbacks.visualization import ConfusionMatrix, draw_confusion
from pem_lightning.data import ADE20K, CITYSCAPES
from pem_lightning.metrics import MeanIoUResult
from pem_lightning.metrics.evaluator import Evaluation


def draw(confusion, info):
    return Image.open(io.BytesIO(draw_confusion(confusion, info))).convert("RGB")


def random_matrix(classes):
    return np.random.default_rng(0).integers(0, 1000, (classes, classes + 1))


@pytest.mark.parametrize("info", [CITYSCAPES, ADE20K])
def test_every_class_has_room_for_its_name(info):
    picture = draw(random_matrix(info.num_classes), info)
    points = 8 if info is CITYSCAPES else 6
    line = points / 72 * 150  # pixels
    assert min(picture.size) > 1.2 * line * info.num_classes
    assert max(picture.size) < 5000


def test_rows_are_normalised(info):
    """A matrix and one whose rows are multiples of its rows look the same, and another one does not."""
    counts = random_matrix(info.num_classes)
    times = counts * np.array([[1], [7], [1000]])
    assert draw_confusion(times, info) == draw_confusion(counts, info)
    assert draw_confusion(counts.copy()[::-1], info) != draw_confusion(counts, info)


def test_a_class_that_does_not_occur_and_the_column_of_none(info):
    counts = np.diag([5, 5, 0]).astype(np.int64)
    without = draw(np.pad(counts, ((0, 0), (0, 1))), info)
    grey = sum(count for count, color in without.getcolors(10**6) if color == (228, 228, 228))
    assert grey > 1000  # the row of the train
    with_none = draw(np.pad(counts, ((0, 0), (0, 1)), constant_values=1), info)
    assert with_none.width > without.width


def test_is_written_where_there_is_a_matrix(tmp_path, module, trainer):
    semantic = MeanIoUResult(0.5, np.ones(3), 0.5, random_matrix(3))
    callback = ConfusionMatrix(tmp_path / "new")
    module.evaluation = Evaluation()
    callback.on_validation_end(trainer, module)
    assert not (tmp_path / "new").exists()
    module.evaluation = Evaluation(semantic=semantic)
    callback.on_validation_end(trainer, module)
    assert Image.open(tmp_path / "new" / "confusion.png").width > 100
