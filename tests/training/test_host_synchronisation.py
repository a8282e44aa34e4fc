"""How often a training step makes the host wait for the device, on a machine without one.

The step runs on PyTorch's "meta" device, which has no values: whatever needs one on the host (`item`, `nonzero`,
indexing with a mask, ...) raises, except for plain copies, which are counted here and answered with ones.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pem_lightning import build_pem
from pem_lightning.losses import SetCriterion
from pem_lightning.preprocess import pad_batch
from pem_lightning.types import Target
from tests.models.randomize import TinyBackbone


class Crossings(TorchDispatchMode):
    """Counts copies from the device, and those to it that are free to wait."""

    def __init__(self):
        super().__init__()
        self.to_host = []
        self.to_device = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func is torch.ops.aten._to_copy.default:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device).type
            if source.is_meta and target == "cpu":
                self.to_host.append(source.shape)
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            if target == "meta" and not source.is_meta:
                self.to_device.append((source.shape, bool(kwargs.get("non_blocking"))))
        else:
            devices = {t.device.type for t in tensors if t.dim()}
            assert len(devices) <= 1, f"{func} mixes devices"
        return func(*args, **kwargs)


class Constants(TorchFunctionMode):
    """Adds the constants that are brought to the device, which dispatch does not see."""

    def __init__(self, crossings):
        super().__init__()
        self.crossings = crossings

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.is_meta and not isinstance(args[0], Tensor):
            self.crossings.to_device.append((out.shape, False))
        return out


def targets(*counts):
    with torch.device("meta"):
        return [Target(torch.zeros(n, dtype=torch.long), torch.zeros(n, 64, 96, dtype=torch.bool)) for n in counts]


@pytest.fixture
def crossings():
    return Crossings()


@pytest.mark.parametrize("pixel_decoder", ["pem", "msdeform"])
def test_one_synchronisation_per_step(crossings, monkeypatch, pixel_decoder):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which knows no meta device
    with torch.device("meta"):
        backbone = "stdc1" if pixel_decoder == "pem" else TinyBackbone()
        network = build_pem(backbone, num_classes=5, num_queries=10, num_layers=2, pixel_decoder=pixel_decoder).train()
        criterion = SetCriterion(5, num_points=64)
        images = [torch.zeros(3, 64, 96, dtype=torch.uint8) for _ in range(2)]

    def step():
        batch, wanted = pad_batch(images, targets(3, 4))
        losses = criterion(network(batch), wanted)
        torch.stack(list(losses.values())).sum().backward()

    with Crossings():
        step()  # brings constants to the device once and for all
    with crossings, Constants(crossings):
        step()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert crossings.to_host == [(3 * 2 * 10 * 4 + 1,)]  # all layers' costs, and whether they are finite
    assert crossings.to_device == [((3, 3, 7), True)]  # images, queries and segments of all layers' pairs


@pytest.mark.parametrize("read", [Tensor.item, Tensor.nonzero, lambda x: x[x > 0], lambda x: bool(x.sum() > 0)])
def test_reads_do_not_go_unseen(crossings, read):
    with crossings, pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.zeros(1, device="meta"))


def test_copies_do_not_go_unseen(crossings):
    with crossings, Constants(crossings):
        torch.zeros(2, device="meta").cpu()
        torch.zeros(3).to("meta")
        torch.tensor([1.0, 2.0], device="meta")
    assert crossings.to_host == [(2,)]
    assert crossings.to_device == [((3,), False), ((2,), False)]
