"""Mask2Former's pixel decoder, held against the one of `transformers` where that is installed."""

import copy

import pytest
import torch
from torch import nn

from pem_lightning.inference.optimize import fold_batch_norms
from pem_lightning.models.flops import count_gmacs
from pem_lightning.models.layers import sine_position_encoding
from pem_lightning.models.mask2former_pixel_decoder import MSDeformPixelDecoder
from pem_lightning.types import UserError

IN_CHANNELS = (8, 16, 24, 40)


def make(channels=32, num_layers=2, **arguments):
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "hidden_channels": 48, **arguments}
    return MSDeformPixelDecoder(IN_CHANNELS, channels, mask_channels=20, num_layers=num_layers, **sizes)


def backbone_features(height=96, width=160, batch=2, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, height // s, width // s, generator=draw).to(dtype)
        for c, s in zip(IN_CHANNELS, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 160), (224, 32)])
def test_levels_and_mask_features(height, width):
    mask_features, levels = make()(backbone_features(height, width))
    assert mask_features.shape == (2, 20, height // 4, width // 4)
    assert [tuple(x.shape) for x in levels] == [(2, 32, height // s, width // s) for s in (32, 16, 8)]


def test_any_sizes_go_together():
    """Nothing is assumed about how a level's size follows from the next one's."""
    draw = [(7, 11), (5, 5), (3, 2), (1, 3)]
    features = [torch.randn(1, c, *size) for c, size in zip(IN_CHANNELS, draw, strict=True)]
    mask_features, levels = make()(features)
    assert mask_features.shape == (1, 20, 7, 11)
    assert [tuple(x.shape[2:]) for x in levels] == draw[:0:-1]


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


def test_images_of_a_batch_do_not_meet():
    decoder, features = make().double(), backbone_features(dtype=torch.float64)
    masks, levels = decoder(features)
    first_masks, first_levels = decoder([x[:1] for x in features])
    torch.testing.assert_close(masks[:1], first_masks)
    torch.testing.assert_close(levels[2][:1], first_levels[2])


def test_channels_last_and_folding_change_nothing():
    decoder, features = make().double().eval(), backbone_features(dtype=torch.float64)
    folded = fold_batch_norms(decoder).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, expected_levels = decoder(features)
        actual, levels = folded([x.to(memory_format=torch.channels_last) for x in features])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for a, b in zip(levels, expected_levels, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_is_near():
    decoder, features = make().eval(), backbone_features()
    with torch.no_grad():
        expected, _ = decoder(features)
        actual, levels = copy.deepcopy(decoder).bfloat16()([x.bfloat16() for x in features])
    assert {x.dtype for x in (actual, *levels)} == {torch.bfloat16}
    assert (actual.float() - expected).norm() < 0.03 * expected.norm()


class OnPyramid(nn.Module):
    """A network whose backbone is free: average pooling, and channels by repetition."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, images):
        gray = images.mean(1, keepdim=True)
        return self.decoder(
            [
                nn.functional.avg_pool2d(gray, s).expand(-1, c, -1, -1)
                for c, s in zip(IN_CHANNELS, (4, 8, 16, 32), strict=True)
            ]
        )


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_multiply_accumulates_are_those_of_the_layers(kernel):
    """The sampling itself counts nothing, as in Mask2Former's published numbers."""
    C, hidden = 32, 48
    coarse = [(2, 3), (4, 6), (8, 12)]
    positions, fine = sum(h * w for h, w in coarse), 16 * 24
    projections = sum(h * w * c * C for (h, w), c in zip(coarse, IN_CHANNELS[:0:-1], strict=True))
    attention = C * (4 * 3 * 4 * 3) + 2 * C * C  # offsets and weights; values and output
    norms = 5 * C * (positions + 2 * fine) + 2 * (2 * 5 * C * positions)
    upsampling = 4 * C * fine
    layers = 2 * positions * (attention + 2 * C * hidden)
    top = fine * (IN_CHANNELS[0] * C + 9 * C * C + C * 20)
    expected = projections + norms + layers + upsampling + top
    assert count_gmacs(OnPyramid(make(kernel=kernel)), 64, 96) == pytest.approx(expected / 1e9, rel=1e-12)


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="pyramid_channels=100: this pixel decoder needs a multiple of 32"):
        MSDeformPixelDecoder(IN_CHANNELS, 100)


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
    torch.testing.assert_close(
        Positions()((1, 32, 3, 5), "cpu", torch.float32),
        theirs.position_embedding((1, 32, 3, 5), "cpu", torch.float32),
        rtol=0,
        atol=1e-5,
    )
    theirs.position_embedding = Positions()

    features = [x.requires_grad_() for x in backbone_features(96, 160, dtype=torch.float64)]
    mask_features, levels = ours(features)
    expected = theirs(features)
    outputs, wanted = (mask_features, *levels), (expected.mask_features, *expected.multi_scale_features)
    for a, b in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    own_parameters = dict(ours.named_parameters())
    pairs = [(p, own_parameters[mapping[name]]) for name, p in theirs.named_parameters()]
    probes = [torch.randn_like(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, [*features, *(own for _, own in pairs)], probes)
    wanted_gradients = torch.autograd.grad(wanted, [*features, *(their for their, _ in pairs)], probes)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)
