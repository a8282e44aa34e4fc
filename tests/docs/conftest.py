"""The files that the documentation's commands speak of, tiny, in the current folder."""

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.deploy.conftest import tiny_exports, write_tiny_checkpoint

__all__ = ["tiny_exports"]


def draw(path, size=(128, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="module")
def trained(work):
    """Checkpoints as if trained, one of them in a run's folder; photographs, a video and a data set of one's own."""
    checkpoint = write_tiny_checkpoint(work / "best.ckpt")
    run = work / "outputs" / "synthetic_panoptic_stdc1" / "run" / "checkpoints"
    run.mkdir(parents=True)
    for copy in (work / "last.ckpt", run / "best.ckpt", run / "last.ckpt"):
        shutil.copy(checkpoint, copy)
    for name in ("photo.jpg", "street.jpg", "large.tif", "aerial.tif", "photos/a.png"):
        draw(work / name)
    video = cv2.VideoWriter("clip.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 32))
    for level in (0, 100, 200):
        video.write(np.full((32, 64, 3), level, np.uint8))
    video.release()
    for split in ("train", "val"):
        for name in "ab":
            draw(work / "my_data" / "images" / split / f"{name}.png")
            labels = work / "my_data" / "labels" / split / f"{name}.png"
            labels.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.repeat(np.uint8([[0, 1], [2, 255]]), 32, 0).repeat(64, 1)).save(labels)
    (work / "my_data" / "classes.yaml").write_text("[road, car, tree]")
    return work
