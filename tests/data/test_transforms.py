from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.transforms import (
    PAD_VALUE,
    PAPER_SHORTEST_EDGES,
    EvalTransform,
    RandomResizedCrop,
    TrainTransform,
)
from pem_lightning.types import Sample, Segment, UserError

IDS = np.array([0, 7, 23, 24000, 33999], np.int32)
SEGMENTS = tuple(Segment(int(i), 0, False) for i in IDS[1:])


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def make_sample(height: int = 40, width: int = 64, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (3, height, width), np.uint8)
    return Sample(torch.from_numpy(image), torch.from_numpy(rng.choice(IDS, (height, width))), SEGMENTS, "name")


def coded_sample(height: int, width: int) -> Sample:
    """Image and map that hold every pixel's own coordinates, so that each result shows where it came from."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    return Sample(image, (rows * 1000 + columns + 1).int(), SEGMENTS, "name")


def test_paper_sizes():
    # The authors' configuration: [int(x * 0.1 * 1024) for x in range(5, 21)]
    assert PAPER_SHORTEST_EDGES[:3] == (512, 614, 716)
    assert PAPER_SHORTEST_EDGES[-1] == 2048


@pytest.mark.parametrize("edge", [17, 40, 93])
def test_resize_is_pillows(edge):
    sample = make_sample()
    out = TrainTransform((1000, 1000), [edge], None, color_jitter=False, flip=0.0)(sample)
    size = (round(64 * edge / 40), edge)
    image = Image.fromarray(sample.image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BILINEAR)
    ids = Image.fromarray(sample.panoptic.numpy()).resize(size, Image.Resampling.NEAREST)
    assert np.array_equal(out.image.permute(1, 2, 0).numpy(), np.array(image))
    assert np.array_equal(out.panoptic.numpy(), np.array(ids))


def test_nearest_takes_pixel_centres():
    out = TrainTransform((100, 100), [16], None, color_jitter=False, flip=0.0)(coded_sample(20, 20))
    source = ((np.arange(16) + 0.5) * 20 / 16).astype(int)
    assert np.array_equal(out.panoptic.numpy(), source[:, None] * 1000 + source[None] + 1)


def test_every_size_is_drawn():
    resize = TrainTransform((1000, 1000), [10, 20, 40], None, color_jitter=False)
    heights = {resize(make_sample(20, 30)).image.shape[1] for _ in range(60)}
    assert heights == {10, 20, 40}


@given(seed=st.integers(0, 1000), flip=st.sampled_from([0.0, 1.0]))
@settings(max_examples=25, deadline=None)
def test_crop_and_flip_move_image_and_map_together(seed, flip):
    torch.manual_seed(seed)
    out = TrainTransform((16, 24), [40], None, color_jitter=False, flip=flip)(coded_sample(40, 64))
    assert out.panoptic.shape == (16, 24)
    rows, columns = (out.panoptic - 1) // 1000, (out.panoptic - 1) % 1000
    assert torch.equal(out.image[0].int(), rows)
    assert torch.equal(out.image[1].int(), columns)
    assert (columns.diff(dim=1) == (-1 if flip else 1)).all()
    assert (rows.diff(dim=0) == 1).all()


def test_crop_reaches_every_place_equally():
    crop = TrainTransform((5, 2), [5], None, color_jitter=False, flip=0.0)
    torch.manual_seed(0)
    left = [int(crop(coded_sample(5, 6)).image[1, 0, 0]) for _ in range(500)]
    counts = np.bincount(left, minlength=5)
    assert len(counts) == 5
    assert counts.min() > 60


@pytest.mark.parametrize(("height", "width"), [(20, 90), (90, 20), (20, 20)])
def test_crop_is_clipped_to_the_image(height, width):
    edge = min(height, width)
    out = TrainTransform((32, 48), [edge], None)(make_sample(height, width))
    assert out.image.shape[1:] == (min(height, 32), min(width, 48)) == out.panoptic.shape


def test_padding_at_bottom_and_right():
    sample = make_sample(20, 30)
    out = TrainTransform((32, 48), [20], None, color_jitter=False, flip=0.0, pad=True)(sample)
    assert out.image.shape == (3, 32, 48)
    assert torch.equal(out.image[:, :20, :30], sample.image)
    assert torch.equal(out.panoptic[:20, :30], sample.panoptic)
    outside = torch.ones(32, 48, dtype=torch.bool)
    outside[:20, :30] = False
    assert (out.image[:, outside] == PAD_VALUE).all()
    assert (out.panoptic[outside] == 0).all()


def test_padding_value_is_a_setting():
    out = TrainTransform((32, 48), [20], None, color_jitter=None, pad=True, pad_value=7)(make_sample(20, 30))
    assert (out.image[:, 20:] == 7).all()
    assert (out.image[:, :, 30:] == 7).all()


def test_map_stays_ids_and_segments_stay_listed():
    sample = make_sample()
    for _ in range(20):
        out = TrainTransform((16, 16), [20, 33, 57], None, pad=True)(sample)
        assert out.image.dtype == torch.uint8
        assert out.image.is_contiguous()
        assert out.panoptic.dtype == torch.int32
        assert set(out.panoptic.unique().tolist()) <= set(IDS.tolist())
        assert out.segments == SEGMENTS
        assert out.name == "name"


def test_same_seed_same_sample():
    transform, sample = TrainTransform((16, 16), [20, 33, 57], None), make_sample()

    def draw(seed):
        torch.manual_seed(seed)
        return [transform(sample) for _ in range(3)]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(
        torch.equal(a.image, b.image) and torch.equal(a.panoptic, b.panoptic) for a, b in zip(first, again, strict=True)
    )
    assert not all(torch.equal(a.image, b.image) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0].image, first[1].image)


def test_scale_place_and_flip_are_independent():
    transform = TrainTransform((10, 20), [11, 80], None, color_jitter=False)
    torch.manual_seed(0)
    table = np.zeros((2, 2, 2), int)
    for _ in range(400):
        rows, columns, _ = transform(coded_sample(80, 160)).image.float()
        large_scale = rows.max() - rows.min() < 30  # few source rows fill the crop
        below = rows.mean() > 40
        flipped = columns[0, 0] > columns[0, -1]
        table[int(large_scale), int(below), int(flipped)] += 1
    assert table.min() > 25


def test_jitter_leaves_the_map_alone():
    sample = make_sample()
    out = TrainTransform((40, 64), [40], None, flip=0.0)(sample)
    assert torch.equal(out.panoptic, sample.panoptic)


def test_eval_keeps_native_size_by_default():
    sample = make_sample()
    out = EvalTransform()(sample)
    assert torch.equal(out.image, sample.image)
    assert out.image.is_contiguous()


def test_eval_resizes_the_image_only():
    sample = make_sample()
    out = EvalTransform(shortest_edge=80, max_size=100)(sample)
    expected = Image.fromarray(sample.image.permute(1, 2, 0).numpy()).resize((100, 63), Image.Resampling.BILINEAR)
    assert np.array_equal(out.image.permute(1, 2, 0).numpy(), np.array(expected))
    assert torch.equal(out.panoptic, sample.panoptic)


@pytest.mark.parametrize(
    "arguments",
    [
        {"crop_size": (0, 10)},
        {"crop_size": (10,)},
        {"shortest_edges": ()},
        {"shortest_edges": (512, -1)},
        {"max_size": 0},
        {"max_size": -5},
        {"flip": 1.5},
        {"flip": -0.1},
        {"pad_value": 256},
    ],
)
def test_train_transform_refuses(arguments):
    with pytest.raises(UserError):
        TrainTransform(**arguments)


@pytest.mark.parametrize("arguments", [{"shortest_edge": 0}, {"shortest_edge": 5, "max_size": -1}, {"max_size": 100}])
def test_eval_transform_refuses(arguments):
    with pytest.raises(UserError):
        EvalTransform(**arguments)


def test_resize_keeps_the_two_targets_apart():
    resize = RandomResizedCrop(100, 100, [20], None)
    out = resize(image=PIXELS, mask=np.arange(256, dtype=np.int32).reshape(16, 16) * 100)
    assert out["image"].dtype == np.uint8
    assert out["mask"].dtype == np.int32
    assert (out["mask"] % 100 == 0).all()
