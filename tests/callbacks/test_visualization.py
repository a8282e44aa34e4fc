import io
import math
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from pem_lightning.callbacks import ConfusionMatrix, PredictionPanels, WorstImages
from pem_lightning.callbacks.visualization import (
    draw_confusion,
    draw_curves,
    draw_panel,
    make_panel,
    panel_masks,
    read_metrics,
)
from pem_lightning.data import ADE20K
from pem_lightning.inference.postprocess import Instance, Result
from pem_lightning.metrics import MeanIoUResult
from pem_lightning.metrics.evaluator import Evaluation
from pem_lightning.types import DatasetInfo


def parts_of(picture):
    """Image, truth and prediction without their titles."""
    width = picture.shape[1] // 3
    return [picture[60:, i * width + 10 : (i + 1) * width - 10].astype(int) for i in range(3)]


def test_a_panel_is_legible_and_shows_three_pictures(sample, result, info):
    small = sample._replace(image=torch.zeros(3, 10, 15, dtype=torch.uint8))  # evaluation may resize the image alone
    picture = draw_panel(make_panel(small, result, info), info)
    assert picture.dtype == np.uint8
    assert picture.shape[0] > 256
    assert picture.shape[1] >= 3 * 390
    image, truth, prediction = parts_of(picture)
    assert not image.any()
    assert truth.mean() > 20
    assert np.abs(truth - prediction).mean() < 1  # they are the same


def test_a_panel_of_every_task(sample, result, info):
    objects = Result(instances=(Instance(sample.panoptic == 1, 0, 0.9), Instance(sample.panoptic == 2, 2, 0.1)))
    panels = [make_panel(sample, other, info) for other in (result, Result(result.semantic), objects, Result())]
    pictures = [draw_panel(panel, info) for panel in panels]
    assert len({picture.shape for picture in pictures}) == 1
    _, truth, prediction = parts_of(pictures[-1])
    assert not prediction.any()
    assert truth[:, :100].any()
    assert not truth[:, -100:].any()  # stuff is no object
    assert [(s.class_id, s.score) for s in panels[2].prediction[1]] == [(0, 0.9)]  # confident ones only


def test_void_shows_the_photo(sample, info):
    ids = sample.panoptic.clone()
    ids[:, 15:] = 0
    panel = make_panel(sample._replace(panoptic=ids), Result(torch.where(ids == 1, 0, 255).int()), info)
    for part in parts_of(draw_panel(panel, info))[1:]:
        assert part[:, :100].any()
        assert not part[:, -100:].any()


def test_masks_for_weights_and_biases(sample, result, info):
    masks = panel_masks(make_panel(sample, result, info), info)
    assert set(masks) == {"truth", "truth_segments", "prediction", "prediction_segments"}
    classes = masks["prediction"]["mask_data"]
    assert classes.dtype == np.uint8
    assert (classes[:, :15] == 1).all()  # the first class; 0 is nothing
    assert (classes[:, 15:] == 2).all()
    assert masks["prediction"]["class_labels"] == {1: "person", 2: "sky", 3: "train"}
    assert np.array_equal(masks["truth_segments"]["mask_data"], sample.panoptic.numpy())
    ids = torch.arange(1, 601, dtype=torch.int32).reshape(20, 30)
    many = sample._replace(panoptic=ids, segments=tuple(sample.segments[0]._replace(id=i) for i in range(1, 601)))
    masks = panel_masks(make_panel(many, result, info), info)
    assert (masks["truth"]["mask_data"] == 1).all()
    numbers = masks["truth_segments"]["mask_data"].ravel()
    assert numbers.max() == 255
    assert not numbers[255:].any()  # there are no numbers left for them


def test_panels_of_the_first_images_only(tmp_path, sample, result, validate):
    validate(PredictionPanels(tmp_path, num_images=3), [sample._replace(name=str(i)) for i in range(4)], [result] * 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_000005_{i}.png" for i in range(3)]


def test_worst_images_by_rank_score_and_name(tmp_path, sample, result, validate):
    callback = WorstImages(tmp_path, 4)
    scores = [0.9, 0.25, math.nan, 0.5, 0.25, 0.0, 1.0]
    samples = [sample._replace(name=f"image{i}") for i in range(7)]
    validate(callback, samples, [result] * 7, scores)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["01_0.0_image5.png", "02_25.0_image1.png", "03_25.0_image4.png", "04_50.0_image3.png"]
    assert Image.open(tmp_path / names[0]).height > 256
    (tmp_path / "notes.txt").touch()
    validate(callback, samples[:1], [result], [0.4])  # the next evaluation leaves nothing of this one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01_40.0_image0.png", "notes.txt"]


def test_curves_join_the_logs_of_a_resumed_run(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("epoch,step,train/loss,val/PQ\n0,0,3.0,\n0,1,2.0,\n0,1,,10.0\n0,2")
    second.write_text("epoch,step,train/loss\n0,1,1.5\n0,2,1.0\n")
    series = read_metrics([first, tmp_path / "missing.csv", second])
    assert series == {"train/loss": [(1, 3.0), (2, 1.5), (3, 1.0)], "val/PQ": [(2, 10.0)]}
    draw_curves(series, tmp_path / "deep" / "curves.png")
    assert Image.open(tmp_path / "deep" / "curves.png").size == (1320, 480)


def draw(confusion, info):
    return Image.open(io.BytesIO(draw_confusion(confusion, info))).convert("RGB")


def random_matrix(classes):
    return np.random.default_rng(0).integers(0, 1000, (classes, classes + 1))


def test_every_class_of_a_confusion_matrix_has_room_for_its_name():
    picture = draw(random_matrix(45), DatasetInfo("many", ADE20K.classes[:45]))
    assert min(picture.size) > 1.2 * 6 / 72 * 150 * 45  # points, inches, pixels, classes
    assert max(picture.size) < 5000


def test_rows_of_a_confusion_matrix_are_normalised(info):
    counts = random_matrix(3)
    assert draw_confusion(counts, info) == draw_confusion(counts * np.array([[1], [7], [1000]]), info)


def test_a_class_that_does_not_occur_and_the_column_of_none(info):
    counts = np.diag([5, 5, 0]).astype(np.int64)
    without = draw(np.pad(counts, ((0, 0), (0, 1))), info)
    grey = sum(count for count, color in without.getcolors(10**6) if color == (228, 228, 228))
    assert grey > 1000  # the row of the train
    assert draw(np.pad(counts, ((0, 0), (0, 1)), constant_values=1), info).width > without.width


def test_class_names_of_a_confusion_matrix_are_readable_in_any_script(info, recwarn):
    """Matplotlib warns of characters that it draws as empty boxes, and reads $ as the beginning of a formula."""
    names = ("дорога", "背景", "5 $ and $\\oops$")
    renamed = DatasetInfo("x", tuple(replace(c, name=name) for c, name in zip(info.classes, names, strict=True)))
    picture = draw(random_matrix(3), renamed)
    assert picture.size[0] > 100
    assert not [w for w in recwarn.list if "missing from" in str(w.message)]
    plain = DatasetInfo("x", tuple(replace(c, name=name) for c, name in zip(info.classes, "abc", strict=True)))
    assert draw(random_matrix(3), plain).tobytes() != picture.tobytes()


def test_panels_name_classes_in_any_script(sample, result, info):
    """Cyrillic is never the same picture twice, as boxes are."""
    pictures = []
    for name in ("дорога", "машина"):
        classes = (replace(info.classes[0], name=name), *info.classes[1:])
        pictures.append(draw_panel(make_panel(sample, result, info), DatasetInfo("x", classes)))
    assert (pictures[0] != pictures[1]).any()


def test_a_confusion_matrix_is_written_where_there_is_one(tmp_path, module, trainer):
    callback = ConfusionMatrix(tmp_path / "new")
    module.evaluation = Evaluation()
    callback.on_validation_end(trainer, module)
    assert not (tmp_path / "new").exists()
    module.evaluation = Evaluation(semantic=MeanIoUResult(0.5, np.ones(3), 0.5, random_matrix(3)))
    callback.on_validation_end(trainer, module)
    assert Image.open(tmp_path / "new" / "confusion.png").width > 100
