import pytest
import torch

from pem_lightning.benchmark.training.settings import TrainingSettings, draw_batch
from pem_lightning.benchmark.weights import CITYSCAPES_CLASSES
from pem_lightning.types import UserError


@pytest.mark.parametrize("segments", [3, 40])
def test_every_image_has_as_many_segments_as_wanted(segments):
    settings = TrainingSettings(size=(64, 96), batch=3, segments=segments, device="cpu")
    batch = draw_batch(settings)
    assert [tuple(image.shape) for image in batch.images] == [(3, 64, 96)] * 3
    assert {image.dtype for image in batch.images} == {torch.uint8}
    assert not torch.equal(batch.images[0], batch.images[1])
    for target in batch.targets:
        assert target.masks.shape == (segments, 64, 96)
        assert target.masks.any((1, 2)).all()
        assert int(target.labels.max()) < CITYSCAPES_CLASSES
        if segments == 3:
            assert target.masks.sum(0).max() == 1  # of one scene, so they do not overlap
            assert target.masks.float().mean() > 0.1
    again = draw_batch(settings)
    assert all(torch.equal(a, b) for a, b in zip(batch.images, again.images, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 1}, "--batch 1: training needs 2 or more"),
        ({"segments": 0}, "--segments 0: give 1 or more"),
        ({"num_points": 0}, "--num-points 0: give 1 or more"),
        ({"threads": 0}, "--threads 0: give 1 or more"),
        ({"warmup": -1}, "--warmup -1: give 0 or more"),
        ({"size": (16, 64)}, "--size 16x64: each side needs 32 pixels or more"),
        ({"contestants": ("fast",)}, "--contestants fast: choose of straightforward, ours"),
        ({"precisions": ("float64",)}, "--precisions float64: choose of"),
        ({"precisions": ("float16",), "device": "cpu"}, "--precisions float16: training in it needs a GPU"),
        ({"compile": ("fast",)}, "--compile fast: choose of none, default"),
        ({"device": "tpu"}, "--device tpu: choose of cpu, cuda, auto"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(UserError, match=f"^{message}"):
        TrainingSettings(**values)
