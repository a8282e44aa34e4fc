"""The network against the authors' frozen outputs, and its published size."""

import copy
from functools import cache

import numpy as np
import pytest
import torch

from pem_lightning import build_pem, checkpoints
from pem_lightning.models.flops import count_gmacs, count_parameters
from pem_lightning.models.pem import padded_size
from pem_lightning.preprocess import normalize
from tests.models.randomize import build_tiny

CASES = [pytest.param(f"city_pan_r50_{size}", marks=pytest.mark.slow) for size in ("96x160", "90x150")]
CASES += ["city_pan_stdc1_96x160", "city_pan_stdc1_90x150"]


@pytest.fixture(scope="module")
def models(official_weights):
    """Gives the authors' two networks with the reference weights, in evaluation mode."""

    @cache
    def load(name: str):
        backbone = {"city_pan_r50": "resnet50", "city_pan_stdc1": "stdc1"}[name]
        model = build_pem(backbone=backbone, num_classes=19, auxiliary="always").eval()
        model.load_state_dict(checkpoints.from_official(official_weights(name, seed=1)), strict=True)
        return model

    return load


@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors_network(case, models, reference):
    model = models(case.rsplit("_", 1)[0])
    expected = np.load(reference / "pem" / f"{case}.npz")
    images = normalize(torch.from_numpy(expected["image"]))[None]
    height, width = expected["padded_hw"].tolist()
    padded = torch.nn.functional.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))

    def near(actual, name, atol):
        torch.testing.assert_close(actual[0], torch.from_numpy(expected[name]), rtol=0, atol=atol)

    with torch.no_grad():
        features = model.backbone(padded)
        mask_features, levels = model.pixel_decoder(features)
        out = model(images)
    for feature, name in zip(features, ("res2_c16", "res3_c16", "res4_c16", "res5_c16"), strict=True):
        near(feature[:, ::16], name, 1e-4)
    near(mask_features, "mask_features", 1e-4)
    for level, name in zip(levels, ("ms_32", "ms_16", "ms_8"), strict=True):
        near(level, name, 1e-4)
    near(out.class_logits, "pred_logits", 1e-4)
    near(out.mask_logits, "pred_masks", 1e-3)
    assert len(out.auxiliary) == 6
    near(torch.stack([layer.class_logits for layer in out.auxiliary], 1), "aux_logits", 1e-4)
    near(torch.stack([layer.mask_logits[..., ::4, ::4] for layer in out.auxiliary], 1), "aux_masks_s4", 1e-3)


@pytest.mark.parametrize(
    ("backbone", "gmacs", "parameters"), [("resnet50", 237.3, 35.53), ("stdc1", 92.1, 16.96), ("stdc2", 118.5, 20.99)]
)
def test_size_is_the_published_one(backbone, gmacs, parameters):
    with torch.device("meta"):
        model = build_pem(backbone, num_classes=19, auxiliary="always")  # as the authors predict, after every layer
    assert round(count_parameters(model) / 1e6, 2) == parameters
    assert round(count_gmacs(model, 1024, 2048), 1) == gmacs


@pytest.mark.parametrize(("size", "padded"), [((1, 1), (32, 32)), ((32, 33), (32, 64)), ((97, 64), (128, 64))])
def test_takes_any_size(size, padded):
    model = build_tiny(num_layers=1).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert padded_size(*size) == padded
    assert out.class_logits.shape == (2, 9, 6)
    assert out.mask_logits.shape == (2, 9, padded[0] // 4, padded[1] // 4)


def test_images_of_a_batch_do_not_influence_each_other_in_evaluation(models):
    """In float64: in float32 one image and two may be rounded differently, and with that a logit near 0 change sign."""
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = copy.deepcopy(models("city_pan_stdc1")).double()
    with torch.no_grad():
        both, alone = model(images), model(images[1:])
    torch.testing.assert_close(both.class_logits[1:], alone.class_logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(both.mask_logits[1:], alone.mask_logits, rtol=0, atol=1e-9)
