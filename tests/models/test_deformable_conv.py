"""Every kernel of the deformable convolution against its definition, in float64 with all gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.models import deformable_conv
from pem_lightning.models.deformable_conv import DeformableConv, deform_conv_torch, get_kernel
from pem_lightning.types import UserError
from tests.models.scattered import scattered


def by_grid_sample(x, offsets, mask, weight):
    """The definition, tap by tap, on PyTorch's own bilinear sampling."""
    H, W = x.shape[2:]
    y, x0 = torch.meshgrid(torch.arange(H, dtype=x.dtype), torch.arange(W, dtype=x.dtype), indexing="ij")
    out = 0
    for tap in range(9):
        dy, dx = offsets[:, 2 * tap], offsets[:, 2 * tap + 1]
        rows, columns = y + tap // 3 - 1 + dy, x0 + tap % 3 - 1 + dx
        grid = torch.stack(((2 * columns + 1) / W - 1, (2 * rows + 1) / H - 1), dim=-1)
        sampled = F.grid_sample(x, grid, align_corners=False) * mask[:, tap : tap + 1]
        out = out + torch.einsum("bchw,oc->bohw", sampled, weight[:, :, tap // 3, tap % 3])
    return out


def inputs(seed, batch=2, channels=3, height=5, width=7, spread=2.0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, channels, height, width),
        (batch, 18, height, width),
        (batch, 9, height, width),
        (4, channels, 3, 3),
    ]
    x, offsets, mask, weight = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return [t.requires_grad_() for t in (x, offsets * spread, mask.sigmoid(), weight)]


def assert_same(kernel, arguments, atol=1e-12):
    leaves = [t.detach().requires_grad_() for t in arguments]
    expected, actual = by_grid_sample(*leaves), kernel(*leaves)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), leaves)
    given_ = torch.autograd.grad((actual * probe).sum(), leaves)
    for a, b in zip(given_, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol * 10)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.3, 3.0, 300.0])
)
def test_equals_the_definition_and_its_gradients(seed, batch, height, width, spread):
    assert_same(deform_conv_torch, inputs(seed, batch, 3, height, width, spread))


@pytest.mark.parametrize("pixels_at_once", [1, 7, 4096])
def test_without_gradients_strip_by_strip(pixels_at_once, monkeypatch):
    monkeypatch.setattr(deformable_conv, "PIXELS_AT_ONCE", pixels_at_once)
    arguments = inputs(0)
    with torch.no_grad():
        torch.testing.assert_close(deform_conv_torch(*arguments), by_grid_sample(*arguments), rtol=0, atol=1e-12)


def test_is_an_ordinary_convolution_without_offsets():
    x, _, _, weight = inputs(0)
    offsets, mask = torch.zeros(2, 18, 5, 7).double(), torch.ones(2, 9, 5, 7).double()
    torch.testing.assert_close(deform_conv_torch(x, offsets, mask, weight), F.conv2d(x, weight, padding=1))


def test_nan_comes_out_as_nan():
    x, offsets, mask, weight = (t.detach() for t in inputs(0))
    offsets[0, :, 2, 3] = float("nan")
    out = deform_conv_torch(x, offsets, mask, weight)
    assert out[0, :, 2, 3].isnan().all()
    assert out.isnan().sum() == 4


def test_whole_offsets_shift_the_image():
    """An offset is (dy, dx): one row down reads one row further down."""
    x = torch.arange(25.0).view(1, 1, 5, 5)
    offsets = torch.zeros(1, 18, 5, 5)
    offsets[:, 0::2] = 1.0
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0
    out = deform_conv_torch(x, offsets, torch.ones(1, 9, 5, 5), weight)
    assert torch.equal(out[0, 0, :4], x[0, 0, 1:])
    assert (out[0, 0, 4] == 0).all()


def test_module_starts_as_half_an_ordinary_convolution():
    torch.manual_seed(0)
    module = DeformableConv(4, 6)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(module(x), 0.5 * F.conv2d(x, module.weight, padding=1), rtol=1e-5, atol=1e-5)


def test_works_under_autocast():
    torch.manual_seed(0)
    module, x = DeformableConv(4, 6), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert module.offset.weight.grad.isfinite().all()


def test_unknown_or_missing_kernels_are_refused():
    with pytest.raises(UserError, match="choose auto, torch, torchvision or mmcv"):
        get_kernel("cuda")


def installed(name):
    try:
        return get_kernel(name)
    except UserError as error:
        pytest.skip(str(error))


LIBRARIES = [
    pytest.param("torchvision", marks=pytest.mark.torchvision),
    pytest.param("mmcv", marks=pytest.mark.mmcv),
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("batch", "height", "width", "spread"), [(2, 5, 7, 2.0), (3, 1, 1, 1.0), (1, 1, 9, 2.0), (2, 6, 3, 300.0)]
)
def test_libraries_equal_the_definition(library, batch, height, width, spread):
    assert_same(installed(library), inputs(0, batch, 3, height, width, spread), atol=1e-10)


@pytest.mark.parametrize("kernel", ["torch", *LIBRARIES])
def test_memory_in_any_order(kernel):
    arguments = [scattered(t) for t in inputs(0)]
    assert not any(t.is_contiguous() for t in arguments)
    assert_same(installed(kernel), arguments, atol=1e-10)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_libraries_take_half_precision(library, dtype):
    arguments = [t.detach().to(dtype) for t in inputs(0)]
    out = installed(library)(*arguments)
    assert out.dtype == dtype
    torch.testing.assert_close(out, by_grid_sample(*(t.double() for t in arguments)).to(dtype))
