import pytest
import torch

from pem_lightning.models.backbones import BACKBONES, build_backbone
from pem_lightning.types import UserError


@pytest.mark.parametrize("name", BACKBONES)
def test_features_have_the_promised_strides_and_channels(name):
    with torch.device("meta"):
        backbone = build_backbone(name)
        features = backbone(torch.randn(2, 3, 32, 64))
    assert [f.shape[1] for f in features] == list(backbone.channels)
    assert [tuple(f.shape[2:]) for f in features] == [(8, 16), (4, 8), (2, 4), (1, 2)]
    sum(f.sum() for f in features).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_resnet_has_torchvisions_names_and_strides():
    with torch.device("meta"):
        resnet50, resnet18 = build_backbone("resnet50"), build_backbone("resnet18")
    keys = set(resnet50.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.1.bias", "layer4.2.conv3.weight"} <= keys
    assert len(keys) == 53 * 6  # convolutions, each with a normalisation of five entries
    assert {"layer1.0.conv2.weight", "layer2.0.downsample.0.weight"} <= set(resnet18.state_dict())
    assert "layer1.0.downsample.0.weight" not in resnet18.state_dict()
    block = resnet50.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(("name", "last"), [("stdc1", 7), ("stdc2", 13)])
def test_stdc_has_the_published_names(name, last):
    with torch.device("meta"):
        keys = build_backbone(name).state_dict()
    assert all(key.startswith("features.") for key in keys)
    assert f"features.{last}.conv_list.3.conv.weight" in keys
    assert f"features.{last + 1}.conv_list.0.conv.weight" not in keys
    assert "features.2.avd_layer.0.weight" in keys


def test_backbones_by_name_have_no_weights_to_load():
    with pytest.raises(UserError, match=r"backbone\.pretrained is for backbone=timm: leave it out"):
        build_backbone("stdc1").load_pretrained()
