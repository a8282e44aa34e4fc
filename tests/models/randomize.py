"""Small networks for tests, in the state in which training leaves them, and comparisons of operators."""

from functools import cache

import torch
from torch import nn

from pem_lightning import build_pem
from pem_lightning.models.backbones import Backbone
from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.layers import FrozenBatchNorm2d
from tests import jobs


class TinyBackbone(Backbone):
    """Four convolutions."""

    channels = (8, 8, 16, 16)

    def __init__(self):
        super().__init__()
        sizes = [(3, 8, 4), (8, 8, 2), (8, 16, 2), (16, 16, 2)]
        stages = [(nn.Conv2d(a, b, 5, stride, 2), nn.BatchNorm2d(b), nn.ReLU()) for a, b, stride in sizes]
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)

    def forward(self, images):
        features = [images]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]


def build_tiny(num_classes=5, **arguments):
    """A PEM of a few thousand weights on a `TinyBackbone`."""
    sizes = {"channels": 32, "hidden_channels": 48, "pyramid_channels": 32, "mask_channels": 16, "num_queries": 9}
    return build_pem(num_classes=num_classes, **{"backbone": TinyBackbone(), **sizes, **arguments})


def randomize(network):
    """Give a PEM statistics, scales and offsets that matter; returns it."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
        if isinstance(module, DeformableConv):
            module.offset.weight.data.normal_(0, 0.05)
    return network


@cache
def compose(*overrides):
    """The configuration of a training."""
    return jobs.compose("train", *overrides)


def scattered(tensor):
    """The same numbers in reversed order of memory, with gaps."""
    dims = tuple(reversed(range(tensor.ndim)))
    return torch.stack((tensor.permute(dims), -tensor.permute(dims)), dim=-1)[..., 0].permute(dims)


def assert_same(function, definition, arguments, atol=1e-12):
    """Equal outputs and equal gradients of all arguments."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    expected, actual = definition(*leaves), function(*leaves)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), leaves)
    found = torch.autograd.grad((actual * probe).sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * 10)
