import torch
import torch.nn.functional as F

from pem_lightning.inference.optimize import fuse_batch_norms
from pem_lightning.models.pixel_decoder import ContextSelfModulation, DeformableUpsampling, PixelDecoder
from tests.models.randomize import randomize


def test_csm_applies_the_sigmoid_twice():
    torch.manual_seed(0)
    csm = ContextSelfModulation(8).eval()
    x = torch.randn(2, 8, 5, 6)
    weight = torch.sigmoid(torch.sigmoid(csm.mlp(x.mean((2, 3), keepdim=True))))
    torch.testing.assert_close(csm(x), x + x * weight)
    assert 0.5 < weight.min() < weight.max() < 0.7311


def test_levels_and_mask_features():
    torch.manual_seed(0)
    decoder = PixelDecoder((8, 16, 32, 64), channels=12, mask_channels=10).eval()
    features = [torch.randn(2, c, 64 // s, 96 // s) for c, s in ((8, 4), (16, 8), (32, 16), (64, 32))]
    mask_features, levels = decoder(features)
    assert mask_features.shape == (2, 10, 16, 24)
    assert (mask_features >= 0).all()
    assert [tuple(x.shape) for x in levels] == [(2, 12, 2, 3), (2, 12, 4, 6), (2, 12, 8, 12)]


def test_mask_features_of_all_levels_are_a_projection_of_their_concatenation():
    """By the definition: every level is enlarged, then all are concatenated and projected, the biases added once."""
    torch.manual_seed(0)
    channels = (8, 16, 32, 64)
    decoder = randomize(PixelDecoder(channels, channels=12, mask_channels=10, mask_features="levels")).eval()
    features = [torch.randn(2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]
    mask_features, levels = decoder(features)
    assert [tuple(x.shape) for x in levels] == [(2, 12, 2, 3), (2, 12, 4, 6), (2, 12, 8, 12)]
    fused = fuse_batch_norms(decoder)
    convs = [projection[0] for projection in fused.mask_projection.projections]
    weight, bias = torch.cat([conv.weight for conv in convs], 1), sum(conv.bias for conv in convs)
    enlarged = [F.interpolate(x, (16, 24), mode="bilinear", align_corners=False) for x in features]
    expected = F.conv2d(torch.cat(enlarged, 1), weight, bias).relu()
    torch.testing.assert_close(mask_features, expected, rtol=1e-4, atol=1e-4)
    assert 0.3 < (expected > 0).float().mean() < 0.7
    torch.testing.assert_close(fused(features)[0], expected, rtol=1e-4, atol=1e-4)


def test_global_context_is_the_raw_coarsest_feature():
    """Nothing but the coarsest backbone feature's mean reaches the other levels where its own map is cut off."""
    torch.manual_seed(0)
    decoder = PixelDecoder((8, 16, 32, 64), channels=12, mask_channels=10).eval()
    features = [torch.zeros(1, c, 64 // s, 64 // s) for c, s in ((8, 4), (16, 8), (32, 16), (64, 32))]
    features[3] = torch.randn(1, 64, 2, 2)
    shuffled = [*features[:3], features[3].flip(2, 3)]
    context = decoder.global_context(features[3].mean((2, 3), keepdim=True))
    torch.testing.assert_close(context, decoder.global_context(shuffled[3].mean((2, 3), keepdim=True)))
    lateral = decoder.csm[0](decoder.laterals[0](features[3])) + context
    torch.testing.assert_close(decoder(features)[1][0], decoder.upsampling[0](lateral)[0])


def test_upsampling_doubles_the_size_and_starts_bilinear():
    module = DeformableUpsampling(6)
    aligned, doubled = module(torch.randn(2, 6, 5, 7))
    assert aligned.shape == (2, 6, 5, 7)
    assert doubled.shape == (2, 6, 10, 14)
    assert module.upsample.bias is None
    torch.testing.assert_close(module.upsample.weight[3, 0].sum(), torch.tensor(4.0))
    assert module.upsample.weight[0, 0, 1, 1] == 0.75**2
