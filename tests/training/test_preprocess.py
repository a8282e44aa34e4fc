import torch

from pem_lightning.preprocess import IMAGE_MEAN, IMAGE_STD, normalize, pad_batch
from pem_lightning.types import Target


def test_normalisation_is_imagenets():
    image = torch.tensor(IMAGE_MEAN).round().to(torch.uint8)[:, None, None].expand(3, 2, 2)
    assert normalize(image).abs().max() < 0.01
    shifted = normalize(image + 50) - normalize(image)
    torch.testing.assert_close(shifted[:, 0, 0], 50 / torch.tensor(IMAGE_STD))


def test_normalised_first_then_padded_with_zero():
    """The second image has no segments."""
    images = [torch.full((3, 20, 40), 7, dtype=torch.uint8), torch.full((3, 33, 30), 9, dtype=torch.uint8)]
    masks = [torch.ones(n, *x.shape[1:], dtype=torch.bool) for n, x in zip((1, 0), images, strict=True)]
    batch, padded = pad_batch(images, [Target(torch.ones(len(m), dtype=torch.int64), m) for m in masks])
    assert batch.shape == (2, 3, 64, 64)
    torch.testing.assert_close(batch[0, :, :20, :40], normalize(images[0]))
    assert (batch[0, :, 20:] == 0).all()
    assert (batch[0, :, :, 40:] == 0).all()
    assert padded[0].masks[0, :20, :40].all()
    assert padded[0].masks.sum() == 20 * 40  # padding is background
    assert padded[1].masks.shape == (0, 64, 64)
