"""timm's networks behind the interface of a backbone.

What is about our side of the interface runs everywhere, with a small stand-in for timm; real models need the real one.
"""

import sys
import types
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.models.backbones.timm import TimmBackbone, import_timm
from pem_lightning.models.flops import count_gmacs
from pem_lightning.preprocess import IMAGE_MEAN, IMAGE_STD
from pem_lightning.training.optim import parameter_groups
from pem_lightning.types import UserError
from tests.jobs import DRAWN, call
from tests.models.randomize import build_tiny, compose, randomize

try:
    import_timm()
    WHY_NOT = ""
except UserError as error:
    WHY_NOT = str(error)


def needs_timm(function):
    return pytest.mark.timm(pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)(function))


class FeatureInfo:
    def __init__(self, strides, channels, out_indices):
        self.out_indices = out_indices
        self.reduction = lambda: [strides[i] for i in out_indices]
        self.channels = lambda: [channels[i] for i in out_indices]


class Pyramid(nn.Module):
    """As much of a timm model as the backbone uses: a level per stride, and a norm that follows the first."""

    def __init__(self, strides=(2, 4, 8, 16, 32), out_indices=(0, 1, 2, 3, 4), output_fmt="NCHW", crop=0):
        super().__init__()
        channels = [3 + i for i in range(len(strides))]
        before = [3, *channels[:-1]]
        steps = [1, *strides[:-1]]
        self.levels = nn.ModuleList(
            nn.Conv2d(a, b, 1, stride // step)
            for a, b, step, stride in zip(before, channels, steps, strides, strict=True)
        )
        self.norm = nn.BatchNorm2d(channels[0])
        self.gamma = nn.Parameter(torch.ones(1))
        self.feature_info = FeatureInfo(strides, channels, out_indices)
        self.output_fmt, self.crop = output_fmt, crop
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 0.5)}

    def forward(self, x):
        assert x.shape[-1] != 96 or not self.crop, "96 is no multiple of 7"
        features = []
        for i, level in enumerate(self.levels):
            x = level(x)
            if i == 0:
                x = self.norm(x) * self.gamma
            features.append(x[..., self.crop :])
        features = [features[i] for i in self.feature_info.out_indices]
        return [f.permute(0, 2, 3, 1) for f in features] if self.output_fmt == "NHWC" else features


MODELS = {
    "conv": {},
    "last": {"output_fmt": "NHWC"},
    "twice": {"strides": (4, 4, 8, 16, 32)},
    "vit": {"strides": (16, 16), "out_indices": (0, 1)},
    "valid": {"crop": 1},
}


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with the few functions of timm that the backbone calls. `downloads` lists what was pretrained."""
    module, data = types.ModuleType("timm"), types.ModuleType("timm.data")
    module.downloads = []

    def create_model(name, features_only=False, pretrained=False, pretrained_cfg_overlay=None, **options):
        if not features_only and options:
            raise TypeError("unexpected keyword")
        model = Pyramid(**{**MODELS[name], **options})
        if pretrained:
            module.downloads.append((pretrained_cfg_overlay or {}).get("file", name))
            if name == "last":
                raise OSError("no route to host\nand more")
            nn.init.constant_(model.levels[0].weight, 0.5)
        return model

    module.create_model = create_model
    module.is_model = lambda name: name in MODELS
    module.list_pretrained = lambda pattern: ["conv.in1k", "conv.in22k"] if pattern == "conv.*" else []
    config = types.SimpleNamespace(fixed_input_size=False, hf_hub_id="timm/last.in1k", url="")
    module.get_pretrained_cfg = lambda name: config
    module.config = config
    module.data = data
    data.IMAGENET_DEFAULT_MEAN, data.IMAGENET_DEFAULT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return module


def test_without_timm_there_is_one_line_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"backbone=timm needs a working timm \(.*\): pip install -r .*timm\.txt$"):
        TimmBackbone()


@pytest.mark.parametrize("name", ["conv", "last", "twice"])
def test_the_four_strides_come_out_channels_first(timm, name):
    backbone = TimmBackbone(name)
    features = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(f.shape[2:]) for f in features] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [f.shape[1] for f in features] == list(backbone.channels) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "con"}, r"no model backbone\.name=con: choose one of timm\.list_models\(\)"),
        ({"name": "conv.in2k"}, r"no weights backbone\.name=conv\.in2k: choose one of conv, conv\.in1k, conv\.in22k"),
        ({"name": "vit"}, r"backbone\.name=vit has features of stride 16, but none of stride 4, 8, 32: choose"),
        ({"name": "conv", "norm": "nrm"}, r"unknown backbone norm 'nrm': choose batch or frozen"),
        ({"name": "conv", "options": {"depth": 3}}, r"cannot make features of backbone\.name=conv \(TypeError.*depth"),
        ({"name": "last", "pretrained": True}, r"\(OSError: no route to host\): get .*/timm/last\.in1k .*pretrained=F"),
    ],
)
def test_mistakes_name_the_cure(timm, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        TimmBackbone(**arguments)
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_fit_are_refused(timm):
    with pytest.raises(UserError, match=r"makes 16 x 15 features of an image of 64 x 64 where 16 x 16 are"):
        TimmBackbone("valid")(torch.randn(1, 3, 64, 64))
    with pytest.raises(UserError, match=r"images of 64 x 96 \(.*multiple of 7\): choose another$"):
        TimmBackbone("valid")(torch.randn(1, 3, 64, 96))
    timm.config.fixed_input_size = True
    with pytest.raises(UserError, match=r"images of 64 x 96 \(.*multiple of 7\): .*options\.img_size=\[64,96\]"):
        TimmBackbone("valid")(torch.randn(1, 3, 64, 96))


def test_pretrained_models_see_images_as_they_were_trained(timm):
    backbone = TimmBackbone("conv", pretrained=True).eval()
    assert timm.downloads == ["conv"]
    assert torch.all(backbone.model.levels[0].weight == 0.5)
    pixels = torch.rand(1, 3, 32, 32)
    imagenet_mean, imagenet_std = (torch.tensor(v)[:, None, None] / 255 for v in (IMAGE_MEAN, IMAGE_STD))
    own_mean, own_std = torch.full((3, 1, 1), 0.5), torch.tensor([0.5, 0.25, 0.5])[:, None, None]
    with torch.no_grad():
        actual = backbone((pixels - imagenet_mean) / imagenet_std)
        expected = backbone.model((pixels - own_mean) / own_std)
    torch.testing.assert_close(actual, expected)
    # A checkpoint carries it along.
    other = TimmBackbone("conv").eval()
    other.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(other(pixels), backbone(pixels), rtol=0, atol=0)
    assert len(timm.downloads) == 1


def test_frozen_norms_never_learn(timm):
    backbone = TimmBackbone("conv", norm="frozen").train()
    assert backbone.training
    assert not backbone.model.norm.training
    assert not any(p.requires_grad for p in backbone.model.norm.parameters())
    assert TimmBackbone("conv").train().model.norm.training


def test_scales_do_not_decay(timm):
    network = nn.ModuleDict({"backbone": TimmBackbone("conv"), "head": nn.Linear(2, 2)})
    names = {p: n for n, p in network.named_parameters()}
    groups = parameter_groups(network, lr=1.0, weight_decay=0.5, backbone_lr_multiplier=0.1)
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found["backbone.model.gamma"] == found["backbone.model.levels.0.bias"] == (0.1, 0.0)
    assert found["backbone.model.norm.weight"] == (0.1, 0.0)
    assert found["backbone.model.levels.0.weight"] == (0.1, 0.5)
    assert found["head.bias"] == (1.0, 0.5)


def test_config_reaches_the_backbone(timm):
    cfg = compose("backbone=timm", "backbone.name=twice", "+backbone.options.output_fmt=NHWC")
    assert (cfg.backbone.pretrained, cfg.backbone.norm) == (False, "batch")
    with torch.device("meta"):
        network = instantiate(cfg.network, num_classes=3)
    assert (network.backbone.name, network.backbone.model.output_fmt) == ("twice", "NHWC")


@pytest.mark.slow
def test_pretrained_weights_are_fetched_once_in_a_runs_life(timm, tmp_path, monkeypatch):
    """A step, saved, and one more; then a prediction."""
    monkeypatch.chdir(tmp_path)
    arguments = (
        *(*DRAWN, "dataset.datamodule.num_train=2", "dataset.datamodule.num_val=1", "recipe.max_steps=1"),
        *("network.num_layers=1", "network.num_queries=8", "network.channels=32", "network.pyramid_channels=32"),
        *("backbone=timm", "backbone.name=conv", "backbone.pretrained=true", "hydra.run.dir=run"),
    )
    checkpoint = "run/checkpoints/last.ckpt"
    assert call("train", *arguments) == 0
    assert call("train", *arguments, f"resume={checkpoint}", "recipe.max_steps=2") == 0
    assert read_checkpoint(checkpoint).step == 2
    image = next(Path("drawn").rglob("*.png"))
    assert call("predict", f"checkpoint={checkpoint}", f"input={image}", "output=out", "hydra.run.dir=predicted") == 0
    assert timm.downloads == ["conv"]


SMALL = (
    "convnext_atto convnextv2_atto efficientnet_lite0 fastvit_t8 hrnet_w18_small mobilenetv3_small_050 mobilevit_xxs "
    "pvt_v2_b0 regnety_002 repvit_m0_9 resnet10t swin_tiny_patch4_window7_224 vgg11_bn"
)
"""One small model of each family, with each of timm's ways to take features."""


@needs_timm
@pytest.mark.parametrize("name", SMALL.split())
def test_real_models_keep_the_promise(name):
    """Any image of multiples of 32, no parameter without a gradient, the same function when made fast."""
    torch.manual_seed(0)
    network = build_tiny(backbone=TimmBackbone(name), num_layers=1)
    features = network.backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(f.shape[2:]) for f in features] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [f.shape[1] for f in features] == list(network.backbone.channels)
    sum(f.square().mean() for f in features).backward()
    # A parameter without a gradient would stop training on several GPUs.
    assert [n for n, p in network.backbone.named_parameters() if p.grad is None] == []
    randomize(network).double().eval()
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = network(images), OptimizedNetwork(network)(images)
        assert OptimizedNetwork(network, "bfloat16")(images).mask_logits.isfinite().all()
    torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-8)
    assert count_gmacs(network, 64, 96) > 0


@needs_timm
@pytest.mark.parametrize("name", ["coatnet_pico_rw_224", "maxvit_tiny_tf_224"])
def test_real_models_of_one_size(name):
    with pytest.raises(UserError, match=r"does not take images of 64 x 96 .*img_size=\[64,96\]"):
        TimmBackbone(name)(torch.randn(1, 3, 64, 96))
    features = TimmBackbone(name, options={"img_size": [64, 96]})(torch.randn(1, 3, 64, 96))
    assert features[0].shape[2:] == (16, 24)


@needs_timm
def test_weights_of_a_file(tmp_path):
    """They have timm's names; those of this model expect ImageNet's statistics, which changes nothing."""
    donor = import_timm().create_model("convnext_atto")
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone("convnext_atto", pretrained=str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.model.stages_3.blocks[0].conv_dw.weight, donor.stages[3].blocks[0].conv_dw.weight)
    torch.testing.assert_close(backbone.input_scale, torch.ones(3, 1, 1))
    torch.testing.assert_close(backbone.input_shift, torch.zeros(3, 1, 1))
    with pytest.raises(UserError, match=r"weights for backbone\.name=convnext_atto \(FileNotFoundError\): get"):
        TimmBackbone("convnext_atto", pretrained="missing.pth")
    others = {name: value for name, value in donor.state_dict().items() if not name.startswith("stages.3")}
    torch.save(others, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth has no stages_3\..*weight: give the weights of convnext_atto"):
        TimmBackbone("convnext_atto", pretrained=str(tmp_path / "other.pth"))
