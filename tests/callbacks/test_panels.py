import math

import numpy as np
import torch
from PIL import Image

from pem_lightning.callbacks.shown import draw_panel, draw_pictures, shown
from pem_lightning.callbacks.visualization import PredictionPanels, WorstImages
from pem_lightning.inference.postprocess import Instance, Result
from pem_lightning.types import Batch


def drawn(what, info):
    return draw_panel(draw_pictures(what, info))


def parts_of(panel):
    """Image, truth and prediction without their titles."""
    width = panel.shape[1] // 3
    return [panel[60:, i * width + 10 : (i + 1) * width - 10].astype(int) for i in range(3)]


def test_is_legible_and_shows_three_pictures(sample, result, info):
    panel = drawn(shown(sample, result, info), info)
    assert panel.dtype == np.uint8
    assert panel.shape[0] > 256
    assert panel.shape[1] >= 3 * 390
    image, truth, prediction = parts_of(panel)
    assert not image.any()
    assert truth.mean() > 20
    assert np.abs(truth - prediction).mean() < 1  # they are the same


def test_every_task_is_drawn(sample, result, info):
    of_panoptic = drawn(shown(sample, result, info), info)
    objects = Result(instances=(Instance(sample.panoptic == 1, 0, 0.9), Instance(sample.panoptic == 2, 2, 0.1)))
    for other in (Result(result.semantic), objects, Result()):
        panel = drawn(shown(sample, other, info), info)
        assert panel.shape == of_panoptic.shape
    nothing = parts_of(panel)
    assert not nothing[2].any()
    assert nothing[1][:, :100].any()
    assert not nothing[1][:, -100:].any()  # stuff is no object
    objects_shown = shown(sample, objects, info).prediction
    assert [(s.class_id, s.score) for s in objects_shown[1]] == [(0, 0.9)]  # only the confident


def test_void_keeps_the_photograph(sample, info):
    ids = sample.panoptic.clone()
    ids[:, 15:] = 0
    of = shown(sample._replace(panoptic=ids), Result(torch.where(ids == 1, 0, 255).int()), info)
    for part in parts_of(drawn(of, info))[1:]:
        assert part[:, :100].any()
        assert not part[:, -100:].any()


def test_a_resized_image(sample, result, info):
    """Evaluation may resize the image and not the annotation."""
    small = sample._replace(image=torch.zeros(3, 10, 15, dtype=torch.uint8))
    panels = [drawn(shown(s, result, info), info) for s in (small, sample)]
    assert panels[0].shape == panels[1].shape


def test_panels_of_the_first_images_only(tmp_path, sample, result, module, trainer):
    callback = PredictionPanels(tmp_path, num_images=3)
    for batch_idx in range(2):
        samples = [sample._replace(name=f"{batch_idx}{i}") for i in range(2)]
        batch = Batch([s.image for s in samples], [], samples)
        callback.on_validation_batch_end(trainer, module, {"results": [result, result]}, batch, batch_idx)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000005_00.png", "step_000005_01.png", "step_000005_10.png"]


class TestWorstImages:
    def run(self, callback, scores, sample, result, trainer, module):
        callback.on_validation_start(trainer, module)
        held = []
        for i, score in enumerate(scores):
            one = sample._replace(name=f"image{i}")
            outputs = {"results": [result], "scores": [score]}
            callback.on_validation_batch_end(trainer, module, outputs, Batch([one.image], [], [one]), i)
            held.append(len(callback._worst))
        callback.on_validation_end(trainer, module)
        return held

    def test_are_drawn_by_rank_score_and_name(self, tmp_path, sample, result, module, trainer):
        scores = [0.9, 0.25, math.nan, 0.5, 0.25, 0.0, 1.0]
        held = self.run(WorstImages(tmp_path, 4), scores, sample, result, trainer, module)
        assert max(held) == 4  # never more
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["01_0.0_image5.png", "02_25.0_image1.png", "03_25.0_image4.png", "04_50.0_image3.png"]
        assert Image.open(tmp_path / names[0]).height > 256

    def test_fewer_images_than_wanted_and_no_leftovers(self, tmp_path, sample, result, module, trainer):
        callback = WorstImages(tmp_path, 4)
        self.run(callback, [0.1, 0.2, 0.3], sample, result, trainer, module)
        (tmp_path / "notes.txt").touch()
        self.run(callback, [0.4], sample, result, trainer, module)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["01_40.0_image0.png", "notes.txt"]

    def test_what_is_held_is_small(self, tmp_path, sample, info):
        """Objects as one id map, whatever their number."""
        many = Result(instances=tuple(Instance(sample.panoptic == 1, 0, 0.9) for _ in range(100)))
        kept = shown(sample, many, info)
        tensors = [kept.image, kept.truth[0], kept.prediction[0]]
        assert sum(t.numel() * t.element_size() for t in tensors) == (3 + 4 + 4) * 20 * 30
