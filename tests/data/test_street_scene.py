from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pem_lightning.data.street_scene import draw_street


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
