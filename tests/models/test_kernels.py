"""Choosing kernels: by name, by device, and what is said when one is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pem_lightning.models import deformable_conv
from pem_lightning.models import mask2former_pixel_decoder as deformable_attention
from pem_lightning.models.deformable_conv import DeformableConv, Kernels, at_least_float32
from pem_lightning.models.flops import count_gmacs
from pem_lightning.types import UserError


def constant(value):
    return lambda x, *arguments: torch.full_like(x, value)


def missing(device):
    raise ImportError("no such library")


def choices(order, **others):
    return Kernels("folding", plain=constant(0.0), others={"absent": missing, **others}, fastest={"cpu": order})


X = torch.zeros(2)


@pytest.mark.parametrize(
    ("order", "expected"),
    [(("fast",), 1.0), (("absent", "fast"), 1.0), (("torch", "fast"), 0.0), (("absent",), 0.0), ((), 0.0)],
)
def test_auto_takes_the_first_of_the_table_that_is_installed(order, expected):
    kernel = choices(order, fast=lambda device: constant(1.0)).get("auto")
    assert kernel(X)[0] == expected


def test_auto_decides_at_every_call_by_the_device_of_the_features():
    kernels = choices(("fast",), fast=lambda device: constant(1.0))
    kernel = kernels.get("auto")
    assert kernel(X)[0] == 1.0
    seen = []
    plain = Kernels("folding", plain=lambda x: seen.append(x.device.type) or x, others={}, fastest=kernels.fastest)
    for name in ("auto", "torch"):
        plain.get(name)(X.to("meta"))  # a device without an entry
    assert seen == ["meta", "meta"]


def test_libraries_are_loaded_for_the_device_and_only_where_it_exists():
    asked = []
    kernels = Kernels(
        "folding",
        plain=constant(0.0),
        others={"fast": lambda device: asked.append(device) or constant(1.0)},
        fastest={"cpu": ("torch",), "cuda": ("fast", "torch")},
    )
    kernels.get("auto")
    assert asked == (["cuda"] if torch.cuda.is_available() else [])
    kernels.get("fast")
    assert asked[-2:] == (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])


def test_a_missing_library_and_an_unknown_name_are_said_in_one_line():
    kernels = choices((), fast=lambda device: constant(1.0))
    message = r"^kernel=absent needs a working absent \(no such library\): install it, or use kernel=auto$"
    with pytest.raises(UserError, match=message):
        kernels.get("absent")
    with pytest.raises(UserError, match=r"^unknown folding kernel 'fats': choose auto, torch, absent or fast$"):
        kernels.get("fats")


def test_every_name_in_the_tables_exists():
    for module in (deformable_conv, deformable_attention):
        for name in ("auto", "torch"):
            assert callable(module.get_kernel(name))
        with pytest.raises(UserError) as error:
            module.get_kernel("?")
        assert "mmcv" in str(error.value)


def test_named_kernels_leave_counting_to_the_plain_one():
    """On the meta device only shapes are computed, which libraries cannot."""

    def of_a_library(x, *arguments):
        raise NotImplementedError

    network = DeformableConv(3, 4)
    expected = count_gmacs(network, 8, 8)
    kernels = Kernels(
        "convolution", deformable_conv.deform_conv_torch, {"fast": lambda device: of_a_library}, {"cpu": ("fast",)}
    )
    for name in ("auto", "fast"):
        network.kernel = kernels.get(name)
        assert count_gmacs(network, 8, 8) == expected


def test_foreign_kernels_see_one_type_of_at_least_float32():
    half, single, double = (torch.zeros(1, dtype=t) for t in (torch.bfloat16, torch.float32, torch.float64))
    assert [t.dtype for t in at_least_float32(half, single)] == [torch.float32] * 2
    assert [t.dtype for t in at_least_float32(double, single)] == [torch.float64] * 2
    assert [t.dtype for t in at_least_float32(half, half)] == [torch.float32] * 2


COMPILED = """
import torch
from torch import nn
from pem_lightning.models.mask2former_pixel_decoder import MultiScaleDeformableAttention
from pem_lightning.models.deformable_conv import DeformableConv

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.attention = DeformableConv(8, 8), MultiScaleDeformableAttention(8, 2, 1, 2)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.attention(x, torch.full((x.shape[1], 2), 0.3), x, [(6, 7)])

torch.manual_seed(0)
network, x = Both().eval(), torch.randn(2, 8, 6, 7)
for context in (torch.no_grad(), torch.enable_grad()):
    with context:
        torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))
"""


@pytest.mark.slow
def test_the_choice_of_a_kernel_does_not_break_a_compiled_graph():
    """In a process of its own: the compiler cannot look through the tests' checks of shapes."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parents[2], timeout=300)
