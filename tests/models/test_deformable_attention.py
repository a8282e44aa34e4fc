"""Every kernel of multi-scale deformable attention against its definition, in float64 with all gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.models import mask2former_pixel_decoder as deformable_attention
from pem_lightning.models.mask2former_pixel_decoder import (
    MultiScaleDeformableAttention,
    get_kernel,
    ms_deform_attn_torch,
)
from pem_lightning.types import UserError
from tests.models.scattered import scattered

SIZES = [(3, 5), (1, 1), (6, 7)]


def by_grid_sample(values, sizes, locations, weights):
    """The definition, point by point, on PyTorch's own bilinear sampling."""
    B, _, M, D = values.shape
    start, out = 0, 0
    for level, (height, width) in enumerate(sizes):
        maps = values[:, start : start + height * width].reshape(B, height, width, M, D)
        start += height * width
        for head in range(M):
            grid = 2 * locations[:, :, head, level] - 1  # [B, Q, P, 2]
            sampled = F.grid_sample(maps[:, :, :, head].permute(0, 3, 1, 2), grid, align_corners=False)
            attended = torch.einsum("bdqp,bqp->bqd", sampled, weights[:, :, head, level])
            out = out + F.pad(attended, (head * D, (M - 1 - head) * D))
    return out


def inputs(seed=0, batch=2, queries=9, heads=2, depth=3, sizes=SIZES, points=2, spread=0.3):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    values = normal(batch, sum(h * w for h, w in sizes), heads, depth)
    locations = 0.5 + spread * normal(batch, queries, heads, len(sizes), points, 2)
    weights = normal(batch, queries, heads, len(sizes) * points).softmax(-1).unflatten(3, (len(sizes), points))
    return values, sizes, locations, weights


def assert_same(kernel, arguments, atol=1e-12):
    values, sizes, locations, weights = arguments
    leaves = [t.detach().requires_grad_() for t in (values, locations, weights)]
    expected, actual = (f(leaves[0], sizes, *leaves[1:]) for f in (by_grid_sample, kernel))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), leaves)
    given_ = torch.autograd.grad((actual * probe).sum(), leaves)
    for a, b in zip(given_, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol * 10)


SIDES = st.tuples(st.integers(1, 8), st.integers(1, 8))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 5),
    st.lists(SIDES, min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([0.1, 1.0, 100.0, 1e6]),
)
def test_equals_the_definition_and_its_gradients(seed, batch, queries, sizes, points, spread):
    assert_same(ms_deform_attn_torch, inputs(seed, batch, queries, 2, 3, sizes, points, spread))


@pytest.mark.parametrize("queries_at_once", [1, 4, 4096])
def test_without_gradients_strip_by_strip(queries_at_once, monkeypatch):
    monkeypatch.setattr(deformable_attention, "QUERIES_AT_ONCE", queries_at_once)
    arguments = inputs()
    with torch.no_grad():
        actual = ms_deform_attn_torch(*arguments)
    torch.testing.assert_close(actual, by_grid_sample(*arguments), rtol=0, atol=1e-12)


def test_takes_memory_in_any_order():
    values, sizes, locations, weights = inputs()
    assert not scattered(values).is_contiguous()
    assert torch.equal(scattered(values), values)
    assert_same(ms_deform_attn_torch, (scattered(values), sizes, scattered(locations), scattered(weights)))


def test_nan_comes_out_as_nan():
    values, sizes, locations, weights = inputs()
    locations[0, 2, 1, 0, 0, 0] = float("nan")
    out = ms_deform_attn_torch(values, sizes, locations, weights)
    assert out[0, 2, 3:].isnan().all()
    assert out.isnan().sum() == 3


def test_no_queries():
    values, sizes, locations, weights = inputs(queries=0)
    assert ms_deform_attn_torch(values, sizes, locations, weights).shape == (2, 0, 6)
    with torch.no_grad():
        assert ms_deform_attn_torch(values, sizes, locations, weights).shape == (2, 0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_keep_their_digits_in_half_precision(dtype):
    """In bfloat16 a location could name one column in 256."""
    values = torch.arange(1000.0).view(1, 1000, 1, 1).to(dtype)
    locations = torch.tensor([(700.5 / 1000, 0.5)]).view(1, 1, 1, 1, 1, 2)
    out = ms_deform_attn_torch(values, [(1, 1000)], locations, torch.ones(1, 1, 1, 1, 1, dtype=dtype))
    assert out.dtype == dtype
    assert out.item() == torch.tensor(700.0).to(dtype).item()


def module(**arguments):
    torch.manual_seed(0)
    return MultiScaleDeformableAttention(16, num_heads=4, num_levels=3, num_points=2, **arguments).double()


def test_module_starts_with_directions_and_uniform_attention():
    attention = module()
    bias = attention.offsets.bias.view(4, 3, 2, 2)
    expected = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]]).double()  # (x, y) of each head's first point
    torch.testing.assert_close(bias[:, 0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(bias[:, 2, 1], 2 * expected, atol=1e-6, rtol=0)
    queries, features = torch.randn(1, 1, 16).double(), torch.randn(1, 3 * 81, 16).double()
    out = attention(queries, torch.full((1, 2), 0.5).double(), features, [(9, 9)] * 3)
    values = attention.values(features).view(3, 9, 9, 4, 4)
    # Points at one and two pixels from the centre: right, below, left, above.
    looked_at = [(4, 5, 4, 6), (5, 4, 6, 4), (4, 3, 4, 2), (3, 4, 2, 4)]
    heads = [(values[:, y1, x1, m] + values[:, y2, x2, m]).mean(0) / 2 for m, (y1, x1, y2, x2) in enumerate(looked_at)]
    torch.testing.assert_close(out[0, 0], attention.output(torch.cat(heads)), atol=1e-6, rtol=0)


def test_offsets_are_in_pixels_of_their_level():
    attention = module()
    torch.nn.init.zeros_(attention.offsets.bias)
    attention.offsets.bias.data.view(4, 3, 2, 2)[..., 0] = 1.0  # one column to the right
    sizes = [(2, 3), (4, 6), (8, 12)]
    features = torch.cat([torch.arange(float(w)).repeat(h) for h, w in sizes]).double()[None, :, None].expand(1, -1, 16)
    attention.values.weight.data, attention.output.weight.data = torch.eye(16).double(), torch.eye(16).double()
    references = torch.tensor([(0.5, 0.5)]).double()
    out = attention(torch.randn(1, 1, 16).double(), references, features, sizes)
    columns = [width / 2 - 0.5 + 1 for _, width in sizes]
    torch.testing.assert_close(out, torch.full_like(out, sum(columns) / 3))


def test_works_under_autocast():
    attention = module().float()
    queries = torch.randn(2, 5, 16)
    arguments = (queries, torch.rand(5, 2), torch.randn(2, 58, 16), SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*arguments)
    torch.testing.assert_close(out.float(), attention(*arguments), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert attention.offsets.weight.grad.isfinite().all()


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="choose auto, torch or mmcv"):
        get_kernel("torchvision")
    with pytest.raises(UserError, match="30 channels cannot be shared out to 8 heads"):
        MultiScaleDeformableAttention(30)


def mmcv_kernel():
    try:
        return get_kernel("mmcv")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.mmcv
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"spread": 100.0},
        {"batch": 1, "queries": 1, "sizes": [(1, 1)]},
        {"batch": 3, "sizes": [(1, 9), (7, 1), (2, 2), (5, 3)], "points": 3},
    ],
)
def test_mmcv_equals_the_definition(arguments):
    assert_same(mmcv_kernel(), inputs(**arguments), atol=1e-10)


@pytest.mark.mmcv
def test_mmcv_takes_memory_in_any_order():
    values, sizes, locations, weights = inputs()
    assert_same(mmcv_kernel(), (scattered(values), sizes, scattered(locations), scattered(weights)), atol=1e-10)


@pytest.mark.mmcv
def test_mmcv_takes_half_precision():
    values, sizes, locations, weights = inputs()
    out = mmcv_kernel()(values.bfloat16(), sizes, locations.float(), weights.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_grid_sample(values, sizes, locations, weights), rtol=0.02, atol=0.02)
