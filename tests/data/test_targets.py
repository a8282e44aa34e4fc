from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pem_lightning.data.targets import build_target
from pem_lightning.types import IGNORE_INDEX, Sample, Segment, UserError, check_task

SEGMENTS = (
    Segment(7, 0, False),
    Segment(24, 11, True, is_crowd=True),
    Segment(24000, 11, True),
    Segment(24001, 11, True),
    Segment(26000, 13, True),  # cropped away
)
MAP = torch.tensor([[7, 7, 24, 0], [24000, 24001, 24, 0]], dtype=torch.int32)


def sample_of(panoptic=MAP, segments=SEGMENTS) -> Sample:
    return Sample(torch.zeros(3, *panoptic.shape, dtype=torch.uint8), panoptic, segments, "name")


def test_panoptic_drops_crowds_and_keeps_empty_segments():
    target = build_target(sample_of(), "panoptic")
    assert target.labels.tolist() == [0, 11, 11, 13]
    assert target.masks.dtype == torch.bool
    assert target.masks.sum((1, 2)).tolist() == [2, 1, 1, 0]
    for mask, value in zip(target.masks, (7, 24000, 24001, 26000), strict=True):
        assert torch.equal(mask, value == MAP)
    visible = build_target(sample_of(), "panoptic", keep_empty=False)
    assert visible.labels.tolist() == [0, 11, 11]
    assert visible.masks.flatten(1).any(1).all()
    assert build_target(sample_of(), "instance").labels.tolist() == [11, 11, 13]


def test_semantic_merges_per_class_and_counts_crowds():
    target = build_target(sample_of(), "semantic")
    assert target.labels.tolist() == [0, 11]
    assert target.masks[0].tolist() == [[True, True, False, False], [False] * 4]
    assert target.masks[1].tolist() == [[False, False, True, False], [True, True, True, False]]


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
@pytest.mark.parametrize("segments", [(), SEGMENTS[1:2]])
def test_image_without_targets(task, segments):
    target = build_target(sample_of(torch.zeros(4, 6, dtype=torch.int32), segments), task)
    assert target.masks.shape == (0, 4, 6)
    assert target.labels.shape == (0,)
    assert target.labels.dtype == torch.int64
    assert target.masks.dtype == torch.bool


def test_unknown_task_names_the_known_ones():
    with pytest.raises(UserError, match=r"'depth'.*panoptic, semantic, instance"):
        check_task("depth")


@given(st.lists(st.sampled_from([0, 7, 24, 24000, 24001]), min_size=6, max_size=6))
def test_semantic_masks_partition_the_labelled_pixels(values):
    sample = sample_of(torch.tensor(values, dtype=torch.int32).view(2, 3))
    masks = build_target(sample, "semantic").masks
    assert torch.equal(masks.sum(0), (sample.panoptic != 0).long())
    classes = {s.id: s.class_id for s in SEGMENTS} | {0: IGNORE_INDEX}
    assert sample.class_map().flatten().tolist() == [classes[value] for value in values]
