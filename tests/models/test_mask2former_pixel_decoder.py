"""Mask2Former's pixel decoder against `transformers`, and its attention's kernels against their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pem_lightning.models import mask2former_pixel_decoder
from pem_lightning.models.flops import count_gmacs
from pem_lightning.models.layers import sine_position_encoding
from pem_lightning.models.mask2former_pixel_decoder import (
    MSDeformPixelDecoder,
    MultiScaleDeformableAttention,
    get_kernel,
    ms_deform_attn_torch,
)
from pem_lightning.types import UserError
from scripts.benchmark.reference.deformable_attention import ms_deform_attn as by_grid_sample
from tests.models.randomize import assert_same, scattered

SIZES = [(3, 5), (1, 1), (6, 7)]


def inputs(seed=0, batch=2, queries=9, sizes=SIZES, points=2, spread=0.3):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    values = normal(batch, sum(h * w for h, w in sizes), 2, 3)
    locations = 0.5 + spread * normal(batch, queries, 2, len(sizes), points, 2)
    weights = normal(batch, queries, 2, len(sizes) * points).softmax(-1).unflatten(3, (len(sizes), points))
    return values, sizes, locations, weights


def assert_equals_the_definition(kernel, arguments, atol=1e-12):
    values, sizes, *others = arguments
    of_sizes = [lambda v, *rest, f=f: f(v, sizes, *rest) for f in (kernel, by_grid_sample)]
    assert_same(*of_sizes, (values, *others), atol)


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
def test_attention_equals_the_definition_and_its_gradients(seed, batch, queries, sizes, points, spread):
    assert_equals_the_definition(ms_deform_attn_torch, inputs(seed, batch, queries, sizes, points, spread))


@pytest.mark.parametrize("queries_at_once", [1, 4, 4096])
def test_without_gradients_strip_by_strip(queries_at_once, monkeypatch):
    monkeypatch.setattr(mask2former_pixel_decoder, "QUERIES_AT_ONCE", queries_at_once)
    with torch.no_grad():
        actual = ms_deform_attn_torch(*inputs())
    torch.testing.assert_close(actual, by_grid_sample(*inputs()), rtol=0, atol=1e-12)


def mmcv_kernel():
    try:
        return get_kernel("mmcv")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kernel", ["torch", pytest.param("mmcv", marks=pytest.mark.mmcv)])
def test_takes_memory_in_any_order(kernel):
    values, sizes, locations, weights = inputs()
    assert not scattered(values).is_contiguous()
    kernel = ms_deform_attn_torch if kernel == "torch" else mmcv_kernel()
    arguments = (scattered(values), sizes, scattered(locations), scattered(weights))
    assert_equals_the_definition(kernel, arguments, atol=1e-10)


@pytest.mark.mmcv
@pytest.mark.parametrize("sizes", [SIZES, [(1, 1)], [(1, 9), (7, 1), (2, 2), (5, 3)]], ids=str)
@pytest.mark.parametrize("spread", [0.3, 100.0])
def test_mmcv_equals_the_definition(sizes, spread):
    assert_equals_the_definition(mmcv_kernel(), inputs(sizes=sizes, points=3, spread=spread), atol=1e-10)


@pytest.mark.mmcv
def test_mmcv_takes_half_precision():
    values, sizes, locations, weights = inputs()
    out = mmcv_kernel()(values.bfloat16(), sizes, locations.float(), weights.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_grid_sample(values, sizes, locations, weights), rtol=0.02, atol=0.02)


def test_nan_comes_out_as_nan():
    values, sizes, locations, weights = inputs()
    locations[0, 2, 1, 0, 0, 0] = float("nan")
    out = ms_deform_attn_torch(values, sizes, locations, weights)
    assert out[0, 2, 3:].isnan().all()
    assert out.isnan().sum() == 3


@pytest.mark.parametrize("grad", [True, False])
def test_no_queries(grad):
    with torch.set_grad_enabled(grad):
        assert ms_deform_attn_torch(*inputs(queries=0)).shape == (2, 0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_keep_their_digits_in_half_precision(dtype):
    """In bfloat16 a location could name one column in 256."""
    values = torch.arange(1000.0).view(1, 1000, 1, 1).to(dtype)
    locations = torch.tensor([(700.5 / 1000, 0.5)]).view(1, 1, 1, 1, 1, 2)
    out = ms_deform_attn_torch(values, [(1, 1000)], locations, torch.ones(1, 1, 1, 1, 1, dtype=dtype))
    assert out.dtype == dtype
    assert out.item() == torch.tensor(700.0).to(dtype).item()


def attention():
    torch.manual_seed(0)
    return MultiScaleDeformableAttention(16, num_heads=4, num_levels=3, num_points=2).double()


def test_attention_starts_with_directions_and_uniform_weights():
    module = attention()
    bias = module.offsets.bias.view(4, 3, 2, 2)
    expected = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]]).double()  # (x, y) of each head's first point
    torch.testing.assert_close(bias[:, 0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(bias[:, 2, 1], 2 * expected, atol=1e-6, rtol=0)
    queries, features = torch.randn(1, 1, 16).double(), torch.randn(1, 3 * 81, 16).double()
    out = module(queries, torch.full((1, 2), 0.5).double(), features, [(9, 9)] * 3)
    values = module.values(features).view(3, 9, 9, 4, 4)
    # Points at one and two pixels from the centre: right, below, left, above.
    looked_at = [(4, 5, 4, 6), (5, 4, 6, 4), (4, 3, 4, 2), (3, 4, 2, 4)]
    heads = [(values[:, y1, x1, m] + values[:, y2, x2, m]).mean(0) / 2 for m, (y1, x1, y2, x2) in enumerate(looked_at)]
    torch.testing.assert_close(out[0, 0], module.output(torch.cat(heads)), atol=1e-6, rtol=0)


def test_offsets_are_in_pixels_of_their_level():
    module = attention()
    torch.nn.init.zeros_(module.offsets.bias)
    module.offsets.bias.data.view(4, 3, 2, 2)[..., 0] = 1.0  # one column to the right
    sizes = [(2, 3), (4, 6), (8, 12)]
    features = torch.cat([torch.arange(float(w)).repeat(h) for h, w in sizes]).double()[None, :, None].expand(1, -1, 16)
    module.values.weight.data, module.output.weight.data = torch.eye(16).double(), torch.eye(16).double()
    out = module(torch.randn(1, 1, 16).double(), torch.tensor([(0.5, 0.5)]).double(), features, sizes)
    columns = [width / 2 - 0.5 + 1 for _, width in sizes]
    torch.testing.assert_close(out, torch.full_like(out, sum(columns) / 3))


def test_attention_works_under_autocast():
    module = attention().float()
    arguments = (torch.randn(2, 5, 16), torch.rand(5, 2), torch.randn(2, 58, 16), SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*arguments)
    torch.testing.assert_close(out.float(), module(*arguments), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert module.offsets.weight.grad.isfinite().all()


IN_CHANNELS = (8, 16, 24, 40)


def make():
    torch.manual_seed(0)
    return MSDeformPixelDecoder(IN_CHANNELS, 32, 20, num_layers=2, num_heads=4, hidden_channels=48)


def backbone_features(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    sizes = ((c, 64 // s, 96 // s) for c, s in zip(IN_CHANNELS, (4, 8, 16, 32), strict=True))
    return [torch.randn(2, *size, generator=draw).to(dtype) for size in sizes]


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="choose auto, torch or mmcv"):
        get_kernel("torchvision")
    with pytest.raises(UserError, match="pyramid_channels=100: this pixel decoder needs a multiple of 32"):
        MSDeformPixelDecoder(IN_CHANNELS, 100, 20)


@pytest.mark.parametrize("sizes", [[(16, 8), (8, 4), (4, 2), (2, 1)], [(7, 11), (5, 5), (3, 2), (1, 3)]])
def test_levels_and_mask_features_of_any_sizes(sizes):
    features = [torch.randn(2, c, *size) for c, size in zip(IN_CHANNELS, sizes, strict=True)]
    mask_features, levels = make()(features)
    assert mask_features.shape == (2, 20, *sizes[0])
    assert [tuple(x.shape) for x in levels] == [(2, 32, *size) for size in sizes[:0:-1]]


def test_every_level_learns_from_every_other():
    decoder = make()
    for layer in decoder.layers:
        nn.init.normal_(layer.attention.offsets.weight, std=0.1)
    for i in range(3):
        features = [x.requires_grad_() for x in backbone_features()]
        decoder(features)[1][i].square().sum().backward()
        assert features[0].grad is None  # stride 4 takes part in the mask features only
        assert all(x.grad.abs().sum() > 0 for x in features[1:])
    decoder(backbone_features())[0].square().sum().backward()
    unused = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


class OnPyramid(nn.Module):
    """A network whose backbone is free: average pooling, and channels by repetition."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, images):
        gray = images.mean(1, keepdim=True)
        levels = zip(IN_CHANNELS, (4, 8, 16, 32), strict=True)
        return self.decoder([nn.functional.avg_pool2d(gray, s).expand(-1, c, -1, -1) for c, s in levels])


def test_multiply_accumulates_are_those_of_the_layers():
    """The sampling itself counts nothing, as in Mask2Former's published numbers."""
    C, hidden, coarse = 32, 48, [(2, 3), (4, 6), (8, 12)]
    positions, fine = sum(h * w for h, w in coarse), 16 * 24
    projections = sum(h * w * c * C for (h, w), c in zip(coarse, IN_CHANNELS[:0:-1], strict=True))
    of_attention = C * (4 * 3 * 4 * 3) + 2 * C * C  # offsets and weights; values and output
    norms = 5 * C * (positions + 2 * fine) + 2 * (2 * 5 * C * positions)
    upsampling = 4 * C * fine
    layers = 2 * positions * (of_attention + 2 * C * hidden)
    top = fine * (IN_CHANNELS[0] * C + 9 * C * C + C * 20)
    expected = projections + norms + layers + upsampling + top
    assert count_gmacs(OnPyramid(make()), 64, 96) == pytest.approx(expected / 1e9, rel=1e-12)


class Positions(nn.Module):
    """Our position encoding in the other's interface; it is float32, which would blur a comparison in float64."""

    def forward(self, shape, device, dtype, mask=None):
        y, x = sine_position_encoding(shape[2], shape[3], 32)
        return (y + x).to(dtype).expand(shape[0], -1, -1, -1)


NAMES = {
    "input_projections": "input_projections",
    "encoder.layers": "layers",
    "self_attn.sampling_offsets": "attention.offsets",
    "self_attn.attention_weights": "attention.weights",
    "self_attn.value_proj": "attention.values",
    "self_attn.output_proj": "attention.output",
    "self_attn_layer_norm": "attention_norm",
    "fc": "linear",
    "final_layer_norm": "feed_forward_norm",
    "adapter_1": "lateral",
    "layer_1": "output",
    "level_embed": "level_embedding.weight",
}


def our_name(name):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def test_equals_mask2former_of_transformers_with_gradients():
    """Outputs and the gradients of features and of all weights, in float64."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-bench.txt)")
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

    config = transformers.Mask2FormerConfig(
        feature_size=32, mask_feature_size=20, encoder_layers=2, encoder_feedforward_dim=48, num_attention_heads=4
    )
    theirs, ours = Mask2FormerPixelDecoder(config, IN_CHANNELS).double().eval(), make().double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    weights = ours.state_dict()
    mapping = {name: our_name(name) for name in theirs.state_dict()}
    assert sorted(mapping.values()) == sorted(weights)
    theirs.load_state_dict({name: weights[mine] for name, mine in mapping.items()}, strict=True)
    shape = ((1, 32, 3, 5), "cpu", torch.float32)
    torch.testing.assert_close(Positions()(*shape), theirs.position_embedding(*shape), rtol=0, atol=1e-5)
    theirs.position_embedding = Positions()

    features = [x.requires_grad_() for x in backbone_features(dtype=torch.float64)]
    mask_features, levels = ours(features)
    expected = theirs(features)
    outputs, wanted = (mask_features, *levels), (expected.mask_features, *expected.multi_scale_features)
    torch.testing.assert_close(outputs, wanted, rtol=0, atol=1e-10)
    own_parameters = dict(ours.named_parameters())
    pairs = [(p, own_parameters[mapping[name]]) for name, p in theirs.named_parameters()]
    probes = [torch.randn_like(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, [*features, *(own for _, own in pairs)], probes)
    wanted_gradients = torch.autograd.grad(wanted, [*features, *(their for their, _ in pairs)], probes)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-10, atol=1e-9)
