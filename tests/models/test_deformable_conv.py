"""Every kernel of the deformable convolution against its definition, in float64 with all gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.models import deformable_conv
from pem_lightning.models.deformable_conv import DeformableConv, choose_kernel, deform_conv_torch, get_kernel
from pem_lightning.models.flops import count_gmacs
from pem_lightning.models.mask2former_pixel_decoder import MultiScaleDeformableAttention as Attention
from pem_lightning.models.mask2former_pixel_decoder import get_kernel as attention_kernel
from pem_lightning.types import UserError
from scripts.benchmark.reference.network import deform_conv as by_grid_sample
from tests.models.randomize import assert_same, scattered


def inputs(seed=0, batch=2, height=5, width=7, spread=2.0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, 3, height, width), (batch, 18, height, width), (batch, 9, height, width), (4, 3, 3, 3)]
    x, offsets, mask, weight = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return [x, offsets * spread, mask.sigmoid(), weight]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.3, 3.0, 300]))
def test_equals_the_definition_and_its_gradients(seed, batch, height, width, spread):
    assert_same(deform_conv_torch, by_grid_sample, inputs(seed, batch, height, width, spread))


@pytest.mark.parametrize("pixels_at_once", [1, 7, 4096])
def test_without_gradients_strip_by_strip(pixels_at_once, monkeypatch):
    monkeypatch.setattr(deformable_conv, "PIXELS_AT_ONCE", pixels_at_once)
    with torch.no_grad():
        actual = deform_conv_torch(*inputs())
    torch.testing.assert_close(actual, by_grid_sample(*inputs()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [deform_conv_torch, by_grid_sample])
def test_whole_offsets_shift_an_ordinary_convolution(function):
    """An offset is (dy, dx): one row down reads one row further down, and below the map lies zero."""
    x, offsets, mask, weight = inputs()
    offsets, mask = torch.zeros_like(offsets), torch.ones_like(mask)
    torch.testing.assert_close(function(x, offsets, mask, weight), F.conv2d(x, weight, padding=1))
    offsets[:, 0::2] = 1.0
    expected = F.conv2d(F.pad(x, (1, 1, 0, 2)), weight)
    torch.testing.assert_close(function(x, offsets, mask, weight), expected)


def test_nan_comes_out_as_nan():
    x, offsets, mask, weight = inputs()
    offsets[0, :, 2, 3] = float("nan")
    out = deform_conv_torch(x, offsets, mask, weight)
    assert out[0, :, 2, 3].isnan().all()
    assert out.isnan().sum() == 4


def test_module_starts_as_half_an_ordinary_convolution_and_works_under_autocast():
    torch.manual_seed(0)
    module, x = DeformableConv(4, 6), torch.randn(2, 4, 8, 8)
    expected = 0.5 * F.conv2d(x, module.weight, padding=1)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert module.offset.weight.grad.isfinite().all()


def installed(name):
    try:
        return get_kernel(name)
    except UserError as error:
        pytest.skip(str(error))


LIBRARIES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("torchvision", "mmcv")]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(2, 5, 7, 2.0), (3, 1, 1, 1.0), (1, 1, 9, 2.0), (2, 6, 3, 300.0)])
def test_libraries_equal_the_definition(library, shape):
    assert_same(installed(library), by_grid_sample, inputs(0, *shape), atol=1e-10)


@pytest.mark.parametrize("kernel", ["torch", *LIBRARIES])
def test_memory_in_any_order(kernel):
    arguments = [scattered(t) for t in inputs()]
    assert not any(t.is_contiguous() for t in arguments)
    assert_same(installed(kernel), by_grid_sample, arguments, atol=1e-10)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_libraries_take_half_precision(library, dtype):
    arguments = [t.to(dtype) for t in inputs()]
    out = installed(library)(*arguments)
    assert out.dtype == dtype
    torch.testing.assert_close(out, by_grid_sample(*(t.double() for t in arguments)).to(dtype))


def constant(value):
    return lambda x, *arguments: torch.full_like(x, value)


def missing(device):
    raise ImportError("no such library")


X = torch.zeros(2)


def test_auto_takes_the_first_library_that_works_on_a_gpu_only(monkeypatch):
    asked = []
    works = {"absent": missing, "mmcv": lambda device: asked.append(device) or constant(1.0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_kernel("op", "auto", constant(0.0), works)(X)[0] == 0
    assert asked == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_kernel("op", "auto", constant(0.0), works)(X)[0] == 0  # for these are on the CPU
    assert asked == ["cuda"]
    assert choose_kernel("op", "mmcv", constant(0.0), works)(X)[0] == 1
    assert asked == ["cuda", "cpu", "cuda"]
    assert choose_kernel("op", "auto", constant(0.0), {"mmcv": missing})(X)[0] == 0
    assert asked == ["cuda", "cpu", "cuda"]


@pytest.mark.parametrize(
    ("module", "find"), [(lambda: DeformableConv(3, 4), get_kernel), (lambda: Attention(8, 2, 1, 1), attention_kernel)]
)
def test_a_network_with_a_librarys_kernel_is_copied_and_pickled(monkeypatch, module, find):
    """Where there is a GPU, the kernel chooses a library's by the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    find.cache_clear()
    network = module()
    for copied in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert copied.kernel is network.kernel
        assert copied.state_dict().keys() == network.state_dict().keys()
    find.cache_clear()


def test_a_missing_library_and_an_unknown_name_are_said_in_one_line():
    message = r"^kernel=absent needs a working absent \(no such library\): install it, or use kernel=auto$"
    with pytest.raises(UserError, match=message):
        choose_kernel("op", "absent", constant(0.0), {"absent": missing})
    message = "^unknown deformable convolution kernel 'fats': choose auto, torch, mmcv or torchvision$"
    with pytest.raises(UserError, match=message):
        get_kernel("fats")


def test_libraries_leave_counting_to_the_plain_kernel():
    """On the meta device only shapes are computed, which libraries cannot."""
    network = DeformableConv(3, 4)
    expected = count_gmacs(network, 8, 8)
    network.kernel = choose_kernel("op", "fast", deform_conv_torch, {"fast": lambda device: missing})
    assert count_gmacs(network, 8, 8) == expected
