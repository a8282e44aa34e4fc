"""Networks with fused batch normalisations compute the same and leave the original alone."""

import pytest
import torch
from torch import nn

from pem_lightning import build_pem
from pem_lightning.inference.optimize import OptimizedNetwork
from tests.models.randomize import randomize

SIZES = {"num_classes": 3, "num_queries": 6, "num_layers": 2, "pyramid_channels": 32, "channels": 32}


@pytest.mark.parametrize(
    ("backbone", "norm"), [("stdc1", "batch"), ("resnet18", "batch"), ("resnet18", "frozen"), ("resnet50", "frozen")]
)
def test_same_function_without_normalisation(backbone, norm):
    torch.manual_seed(0)
    network = randomize(build_pem(backbone, backbone_norm=norm, **SIZES)).double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = OptimizedNetwork(network).network
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = network.eval()(images), fused(images)
    torch.testing.assert_close(actual.class_logits, expected.class_logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    left = [name for name, m in fused.named_modules() if "BatchNorm" in type(m).__name__]
    # The one of PEM-CA comes before its convolution, whose padding it must not reach.
    assert left == [f"transformer_decoder.layers.{i}.cross_attention.feature_norm" for i in range(2)]
    assert not any(p.requires_grad for p in fused.parameters())
    assert not fused.training


def test_a_normalisation_that_does_not_follow_is_left_alone():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    fused = OptimizedNetwork(network).network
    assert [type(m).__name__ for m in fused] == ["BatchNorm2d", "Conv2d", "ReLU", "BatchNorm2d"]


def test_a_subclass_may_do_more_and_is_left_alone():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class Standardized(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) / self.weight.std()

    network = nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4), Standardized(4, 4, 1), nn.BatchNorm2d(4)).eval()
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(OptimizedNetwork(network).network(images), network(images))
