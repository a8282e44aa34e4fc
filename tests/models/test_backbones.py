import pytest
import torch

from pem_lightning.models.backbones import BACKBONES, build_backbone
from pem_lightning.types import UserError


@pytest.mark.parametrize("name", BACKBONES)
def test_features_have_the_promised_strides_and_channels(name):
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    assert [f.shape[1] for f in features] == list(backbone.channels)
    assert [tuple(f.shape[2:]) for f in features] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_resnet_has_torchvisions_names():
    keys = set(build_backbone("resnet50").state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.1.bias", "layer4.2.conv3.weight"} <= keys
    # 53 convolutions, and as many normalisations of five entries
    assert len(keys) == 53 * 6
    assert {"layer1.0.conv2.weight", "layer2.0.downsample.0.weight"} <= set(build_backbone("resnet18").state_dict())
    assert "layer1.0.downsample.0.weight" not in build_backbone("resnet18").state_dict()


def test_resnet_strides_in_the_3x3_convolution():
    block = build_backbone("resnet50").layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(("name", "last"), [("stdc1", 7), ("stdc2", 13)])
def test_stdc_has_the_published_names(name, last):
    keys = build_backbone(name).state_dict()
    assert all(key.startswith("features.") for key in keys)
    assert f"features.{last}.conv_list.3.conv.weight" in keys
    assert f"features.{last + 1}.conv_list.0.conv.weight" not in keys
    assert "features.2.avd_layer.0.weight" in keys


def test_frozen_norm_never_learns():
    backbone = build_backbone("resnet18", norm="frozen").train()
    before = backbone.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert torch.equal(backbone.bn1.running_mean, before)
    assert backbone.bn1.weight.grad is None
    assert backbone.conv1.weight.grad is not None
    assert set(backbone.state_dict()) == set(build_backbone("resnet18").state_dict())


def test_backbones_by_name_have_no_weights_to_load():
    with pytest.raises(UserError, match=r"backbone\.pretrained is for backbone=timm: leave it out"):
        build_backbone("resnet18").load_pretrained()
