import math

import pytest
import torch
from torch import nn

from pem_lightning.models.backbones import build_backbone
from pem_lightning.models.layers import FrozenBatchNorm2d, sine_position_encoding
from tests.models.randomize import randomize


def test_frozen_norm_is_a_batch_norm_in_evaluation():
    torch.manual_seed(0)
    norm, x = randomize(nn.BatchNorm2d(5)).eval(), torch.randn(2, 5, 4, 4, requires_grad=True)
    frozen = FrozenBatchNorm2d(5)
    assert list(frozen.state_dict()) == list(norm.state_dict())
    frozen.load_state_dict(norm.state_dict(), strict=True)
    assert torch.equal(frozen.train()(x), norm(x))
    gradients = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (frozen, norm)]
    assert torch.equal(*gradients)
    assert list(frozen.parameters()) == []


def test_frozen_norms_never_learn_and_are_not_synchronised():
    backbone = build_backbone("resnet18", norm="frozen").train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    assert backbone.conv1.weight.grad is not None
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())


@pytest.mark.parametrize(("height", "width"), [(3, 5), (1, 1), (8, 16)])
def test_position_encoding_equals_its_definition(height, width):
    y, x = sine_position_encoding(height, width, 8)
    encoding = y + x
    assert encoding.shape == (8, height, width)
    for row in range(height):
        for column in range(width):
            for half, (place, length) in enumerate(((row, height), (column, width))):
                for i in range(4):
                    angle = (place + 1) / (length + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / 4)
                    expected = math.cos(angle) if i % 2 else math.sin(angle)
                    assert encoding[4 * half + i, row, column] == pytest.approx(expected, abs=1e-5)
