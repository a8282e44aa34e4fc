"""EfficientNet-Lite against timm's, where timm loads, and against frozen features of it elsewhere."""

import json

import numpy as np
import pytest
import torch

from pem_lightning.checkpoints.pretrained import read_weights
from pem_lightning.models.backbones import build_backbone
from pem_lightning.models.backbones.timm import import_timm
from pem_lightning.preprocess import normalize
from tests.checkpoint_files import random_backbone
from tests.models.test_timm import needs_timm

LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def pattern():
    """An image of 64 x 96 without symmetries."""
    y, x, channel = np.ogrid[:64, :96, :3]
    return torch.from_numpy(((7 * y + 13 * x + 29 * channel + x * y) % 256).astype(np.uint8)).permute(2, 0, 1)


def facts(features):
    """As they are frozen: of each level its shape, mean, deviation and the corners of four channels."""
    return [
        {
            "shape": list(feature.shape),
            "mean": feature.mean().item(),
            "std": feature.std().item(),
            "corners": feature[:: len(feature) // 4][:4, :: feature.shape[1] - 1, :: feature.shape[2] - 1].tolist(),
        }
        for feature in features
    ]


def assert_same_facts(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours["shape"] == theirs["shape"]
        for name in ("mean", "std", "corners"):
            torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=1e-5, atol=1e-4)


@pytest.fixture
def frozen(reference):
    return json.loads((reference / "timm" / "efficientnet_lite0.json").read_text())


def load(backbone, name):
    state = read_weights(name).state
    backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()})
    return backbone.eval()


def in_timm(name):
    """The network of timm's, without weights."""
    return import_timm().create_model(f"tf_{name}", features_only=True, out_indices=(1, 2, 3, 4)).eval()


def as_timm_wants(image):
    return (image[None].float() - 127.5) / 127.5


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@torch.no_grad()
def test_features_of_an_image_are_timms_on_imagenets_weights(frozen, norm):
    features = load(build_backbone("efficientnet_lite0", norm), "efficientnet_lite0")(normalize(pattern())[None])
    assert_same_facts(facts([feature[0] for feature in features]), frozen)


@needs_timm
@torch.no_grad()
def test_the_frozen_features_are_timms(frozen):
    features = load(in_timm("efficientnet_lite0"), "efficientnet_lite0")(as_timm_wants(pattern()))
    assert_same_facts(facts([feature[0] for feature in features]), frozen)


@needs_timm
@pytest.mark.parametrize("name", LITE)
@torch.no_grad()
def test_names_and_features_are_timms(name):
    """Borders included, which an image of 32 x 64 mostly is."""
    ours, theirs = random_backbone(name), in_timm(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    actual = ours(torch.stack([normalize(image) for image in images]))
    expected = theirs(torch.cat([as_timm_wants(image) for image in images]))
    for feature, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(feature, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize(("name", "channels", "blocks"), [(LITE[0], 320, 16), (LITE[1], 320, 21), (LITE[2], 352, 21)])
def test_sizes(name, channels, blocks):
    with torch.device("meta"):
        backbone = build_backbone(name)
    assert (backbone.channels[-1], sum(map(len, backbone.blocks))) == (channels, blocks)
    assert not any("input" in key for key in backbone.state_dict())
