"""Networks whose answers move with the image must say the same from every view."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pem_lightning.inference import tta
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.preprocess import normalize
from pem_lightning.types import Predictions, UserError

THINGS = {0, 1}
VIEWS = [{"flip": True}, {"scales": [0.75, 1.0, 1.25]}, {"scales": [0.5, 2.0], "flip": True}]


class Equivariant:
    """Six queries that each look at one channel or its opposite, in an order that changes with every view.

    Class logits do not depend on the image: two queries see nothing, the others things and stuff, each with another
    certainty, because where masks are certain equal scores would be decided by rounding.
    """

    def __init__(self, gain=40.0, shuffle=True):
        self.gain, self.shuffle, self.seen = gain, shuffle, []
        self.class_logits = torch.tensor([6.0, 5, 4, 3, 9, 9])[:, None] * torch.eye(5)[[0, 1, 2, 3, 4, 4]]

    def __call__(self, images):
        self.seen.append(images)
        height, width = (-(-side // 32) * 32 for side in images.shape[-2:])
        padded = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))[0]
        masks = self.gain * F.avg_pool2d(torch.cat([padded, -padded]), 4)
        generator = torch.Generator().manual_seed(len(self.seen) if self.shuffle else 0)
        order = torch.randperm(6, generator=generator) if self.shuffle else torch.arange(6)
        return Predictions(self.class_logits[order][None], masks[order][None])


@pytest.fixture
def image():
    """Smooth hills of three channels, 64 x 96; with the gain's logits almost everywhere far from 0."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    channels = [torch.sin(5 * x + 1) + 0.3, torch.cos(4 * x + 3 * y), torch.sin(6 * y - 2 * x)]
    return torch.stack(channels)[None]


def run(task, network, image, size=(64, 96), with_semantic=False, **views):
    inference = TaskInference(task, THINGS, object_mask_threshold=0.5, overlap_threshold=0.3)
    (result,) = tta.TestTimeAugmentation(inference, **views)(network, image, size, with_semantic=with_semantic)
    return result


class TestOff:
    @pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
    def test_is_the_plain_call(self, image, task):
        network = Equivariant(shuffle=False)
        result = run(task, network, image, with_semantic=True)
        assert len(network.seen) == 1
        assert network.seen[0] is image
        inference = TaskInference(task, THINGS, object_mask_threshold=0.5, overlap_threshold=0.3)
        expected = inference(network(image), (64, 96), (64, 96), with_semantic=True)
        assert torch.equal(result.semantic, expected.semantic)
        assert result.segments == expected.segments
        assert [i.score for i in result.instances] == [i.score for i in expected.instances]
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(result.instances, expected.instances, strict=True))


class TestEquivariantNetworks:
    @pytest.mark.parametrize("gain", [5.0, 400.0])  # probabilities of the latter are exactly 0 or 1 in float32
    def test_flip_changes_nothing(self, image, gain):
        for task in ("semantic", "panoptic", "instance"):
            plain = run(task, Equivariant(gain, shuffle=False), image, with_semantic=True)
            flipped = run(task, Equivariant(gain, shuffle=False), image, with_semantic=True, flip=True)
            assert torch.equal(plain.semantic, flipped.semantic)
            self.check_same(plain, flipped, tolerance=0)

    @pytest.mark.parametrize("views", VIEWS)
    def test_other_views_and_shuffled_queries_change_borders_at_most(self, image, views):
        for task in ("semantic", "panoptic", "instance"):
            plain = run(task, Equivariant(shuffle=False), image, with_semantic=True)
            network = Equivariant()
            augmented = run(task, network, image, with_semantic=True, **views)
            assert len(network.seen) == len(views.get("scales", [1])) * (1 + views.get("flip", False))
            assert (plain.semantic == augmented.semantic).float().mean() > 0.95
            self.check_same(plain, augmented, tolerance=0.05)

    @staticmethod
    def check_same(plain, augmented, tolerance):
        """The order of segments and instances may differ."""
        if plain.panoptic is not None:
            assert sorted(s.class_id for s in plain.segments) == sorted(s.class_id for s in augmented.segments)
            assert len(plain.segments) >= 2
            classes = []
            for result in (plain, augmented):
                table = torch.tensor([-1, *(s.class_id for s in result.segments)])
                classes.append(table[result.panoptic.long()])
            assert (classes[0] != classes[1]).float().mean() <= tolerance
        found = [{(i.class_id, round(i.score, 2)): i.mask for i in r.instances} for r in (plain, augmented)]
        for (class_id, score), mask in found[0].items():
            if score > 0.5:
                other = next(m for (k, s), m in found[1].items() if k == class_id and abs(s - score) < 0.02)
                assert (mask != other).float().mean() <= tolerance

    def test_sizes_that_need_padding(self, image):
        """Only next to the padding, which each view has at another side of the image, may they differ."""
        image = image[..., :50, :84]
        plain = run("semantic", Equivariant(), image, (50, 84))
        flipped = run("semantic", Equivariant(), image, (50, 84), flip=True)
        assert torch.equal(plain.semantic[:46, 4:80], flipped.semantic[:46, 4:80])


class LeftOfTheSecond:
    """Is undecided about the first view, and sees a thing in the left quarter of the second, stuff elsewhere."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append(images)
        mask = torch.zeros([side // 4 for side in images.shape[-2:]])
        if len(self.seen) == 2:
            mask[:] = -9
            mask[:, : mask.shape[1] // 4] = 9
        return Predictions(9 * torch.eye(3)[[0, 2]][None], torch.stack([mask, -mask])[None])


def test_a_mirrored_view_is_turned_back():
    image = torch.arange(64.0).expand(1, 3, 32, 64)
    for task in ("semantic", "panoptic", "instance"):
        network = LeftOfTheSecond()
        result = run(task, network, image, (32, 64), with_semantic=True, flip=True)
        assert torch.equal(network.seen[1], network.seen[0].flip(-1))
        thing = torch.zeros(32, 64, dtype=torch.bool)
        thing[:, 48:] = True
        if task == "instance":
            (found,) = (i.mask for i in result.instances if i.score > 0.5)
            assert (found == thing).float().mean() > 0.95
        if task == "panoptic":
            number = next(s.id for s in result.segments if s.class_id == 0)
            assert ((result.panoptic == number) == thing).float().mean() > 0.95


class Telling:
    """Says other things about every view; the masks cover all."""

    def __init__(self, probabilities, mask_logits):
        self.answers = iter(zip(probabilities, mask_logits, strict=True))

    def __call__(self, images):
        probabilities, mask_logit = next(self.answers)
        shape = (1, 1, images.shape[-2] // 4, images.shape[-1] // 4)
        return Predictions(torch.tensor([[probabilities]]).log(), torch.full(shape, mask_logit))


def test_probabilities_are_averaged_over_views():
    image = torch.zeros(1, 3, 32, 32)
    answers = [[0.9, 0.05, 0.05], [0.5, 0.3, 0.2]], [1.0, 3.0]
    inside = torch.tensor(answers[1]).sigmoid().mean().item()
    segment = run("panoptic", Telling(*answers), image, (32, 32), flip=True).segments[0]
    assert segment.score == pytest.approx(0.7, abs=1e-6)
    found = run("instance", Telling(*answers), image, (32, 32), flip=True).instances
    assert [(i.class_id, round(i.score, 5)) for i in found] == [
        (0, round(0.7 * inside, 5)),
        (1, round(0.175 * inside, 5)),
    ]


def test_semantic_scores_are_averaged_over_views():
    image = torch.zeros(1, 3, 32, 32)
    answers = [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]
    for task in ("semantic", "panoptic"):
        network = Telling(answers, [5.0, 5.0])
        assert run(task, network, image, (32, 32), with_semantic=True, flip=True).semantic.eq(1).all()
        network = Telling(answers, [5.0, -5.0])
        assert run(task, network, image, (32, 32), with_semantic=True, flip=True).semantic.eq(0).all()


def test_views_are_resized_as_pillow_does():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    network = Equivariant()
    run("semantic", network, normalize(torch.from_numpy(pixels).permute(2, 0, 1))[None], scales=[1.5, 0.5])
    assert [tuple(x.shape[-2:]) for x in network.seen] == [(96, 144), (32, 48)]
    for seen in network.seen:
        size = seen.shape[-1], seen.shape[-2]
        resized = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        expected = normalize(torch.from_numpy(resized).permute(2, 0, 1))
        assert (seen[0] - expected).abs().max() < 1.1 / 57  # one grey level


@pytest.mark.parametrize("scales", [[], [1.0, 0.0], [-1.0]])
def test_impossible_scales_are_refused(scales):
    with pytest.raises(UserError, match=r"inference\.scales=.*e\.g\. \[0\.75,1\.0,1\.25\]"):
        tta.TestTimeAugmentation(TaskInference("semantic", THINGS), scales)
