"""Semantic scores averaged over views; networks whose answers move with the image say the same from every view."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.tta import TestTimeAugmentation
from pem_lightning.preprocess import normalize
from pem_lightning.types import Predictions, UserError

THINGS = {0, 1}


class Equivariant:
    """Six queries that each look at one channel or its opposite. Class logits do not depend on the image."""

    def __init__(self):
        self.inputs = []
        self.class_logits = torch.tensor([6.0, 5, 4, 3, 9, 9])[:, None] * torch.eye(5)[[0, 1, 2, 3, 4, 4]]

    def __call__(self, images):
        self.inputs.append(images)
        height, width = (-(-side // 32) * 32 for side in images.shape[-2:])
        padded = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        masks = 40 * F.avg_pool2d(torch.cat([padded, -padded], dim=1), 4)
        return Predictions(self.class_logits.expand(len(images), -1, -1), masks)


@pytest.fixture
def images():
    """Smooth hills of three channels, 64 x 96, and the same upside down."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    image = torch.stack([torch.sin(5 * x + 1) + 0.3, torch.cos(4 * x + 3 * y), torch.sin(6 * y - 2 * x)])
    return torch.stack([image, image.flip(1)])


def run(network, images, size=(64, 96), **views):
    return TestTimeAugmentation(TaskInference("semantic", THINGS), **views)(network, images, size)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_without_views_it_is_the_plain_call(images, task):
    network = Equivariant()
    inference = TaskInference(task, THINGS, object_mask_threshold=0.5, overlap_threshold=0.3)
    results = TestTimeAugmentation(inference)(network, images, (64, 96), with_semantic=True)
    assert len(network.inputs) == 1
    assert network.inputs[0] is images
    for image, result in zip(images, results, strict=True):
        expected = inference(network(image[None]), (64, 96), (64, 96), with_semantic=True)
        assert torch.equal(result.semantic, expected.semantic)
        assert result.segments == expected.segments
        assert [i.score for i in result.instances] == [i.score for i in expected.instances]


@pytest.mark.parametrize(
    ("views", "count"),
    [({"flip": True}, 2), ({"scales": [0.75, 1.0, 1.25]}, 3), ({"scales": [0.5, 2.0], "flip": True}, 4)],
)
def test_views_change_borders_at_most(images, views, count):
    network = Equivariant()
    for plain, augmented in zip(run(network, images), run(network, images, **views), strict=True):
        agreement = (plain.semantic == augmented.semantic).float().mean()
        assert agreement == 1 if "scales" not in views else agreement > 0.95
    assert len(network.inputs) == 1 + count


def test_sizes_that_need_padding(images):
    """Only next to the padding, which each view has at another side of the image, may they differ."""
    image = images[:1, :, :50, :84]
    (plain,), (flipped,) = run(Equivariant(), image, (50, 84)), run(Equivariant(), image, (50, 84), flip=True)
    assert torch.equal(plain.semantic[:46, 4:80], flipped.semantic[:46, 4:80])


class Answers:
    """Says other things about every view; the masks cover all."""

    def __init__(self, probabilities, mask_logits):
        self.answers = iter(zip(probabilities, mask_logits, strict=True))

    def __call__(self, images):
        probabilities, mask_logit = next(self.answers)
        shape = (1, 1, images.shape[-2] // 4, images.shape[-1] // 4)
        return Predictions(torch.tensor([[probabilities]]).log(), torch.full(shape, mask_logit))


@pytest.mark.parametrize(("second", "expected"), [(5.0, 1), (-5.0, 0)])
def test_scores_are_averaged_over_views(second, expected):
    network = Answers([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]], [5.0, second])
    (result,) = run(network, torch.zeros(1, 3, 32, 32), (32, 32), flip=True)
    assert result.semantic.eq(expected).all()


def test_views_are_resized_as_pillow_does():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    network = Equivariant()
    run(network, normalize(torch.from_numpy(pixels).permute(2, 0, 1))[None], scales=[1.5, 0.5])
    assert [tuple(x.shape[-2:]) for x in network.inputs] == [(96, 144), (32, 48)]
    for view in network.inputs:
        size = view.shape[-1], view.shape[-2]
        resized = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        expected = normalize(torch.from_numpy(resized).permute(2, 0, 1))
        assert (view[0] - expected).abs().max() < 1.1 / 57  # one grey level


@pytest.mark.parametrize("scales", [[], [1.0, 0.0], [-1.0]])
def test_impossible_scales_are_refused(scales):
    with pytest.raises(UserError, match=r"inference\.scales=.*e\.g\. \[0\.75,1\.0,1\.25\]"):
        TestTimeAugmentation(TaskInference("semantic", THINGS), scales)


@pytest.mark.parametrize(("task", "views"), [("panoptic", {"flip": True}), ("instance", {"scales": [0.5]})])
def test_other_tasks_are_refused(task, views):
    with pytest.raises(UserError, match=f"choose task=semantic, or leave them out for task={task}"):
        TestTimeAugmentation(TaskInference(task, THINGS), **views)
