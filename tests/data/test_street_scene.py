from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pem_lightning.data.street_scene import LABELS, draw_street


@pytest.mark.parametrize(
    ("seed", "image_hash", "ids_hash"),
    [
        (0, "7f7ae41391747e7b", "ce177b761d6a8e10"),
        (1, "2a8f1cb8a09b8139", "a07113ace9c1ada1"),
        (2, "26afc8fe01bf0b88", "0e02617793d12c75"),
        (7, "9e6596d580ee95ad", "a4febd654cc48070"),
    ],
)
def test_the_scenes_never_change(seed, image_hash, ids_hash):
    image, ids = draw_street(np.random.default_rng(seed), 64, 128)
    assert hashlib.sha256(ids.tobytes()).hexdigest()[:16] == ids_hash
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == image_hash


def test_labels_follow_the_picture():
    """Sky is bluish or bright and above, road is grey and below: colours and ids are drawn in the same place."""
    for seed in range(3):
        image, ids = draw_street(np.random.default_rng(seed), 64, 128)
        rows = np.arange(64)[:, None] * np.ones((1, 128))
        sky, road = ids == LABELS["sky"], ids == LABELS["road"]
        assert rows[sky].max() < 40
        assert rows[road].min() > 24
        assert image[sky].mean() > image[road].mean() + 40
        assert np.ptp(image[road].mean(0)) < 25


def test_resolution_changes_only_detail():
    small = draw_street(np.random.default_rng(3), 64, 128)[1]
    large = draw_street(np.random.default_rng(3), 128, 256)[1]
    assert (small == large[1::2, 1::2]).mean() > 0.95
