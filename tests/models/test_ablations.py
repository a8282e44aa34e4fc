"""Every shipped ablation trains, reloads strictly and counts; its parts follow their definition."""

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.installation import CONF
from pem_lightning.losses import SetCriterion
from pem_lightning.models.ablations import (
    MaskedCrossAttention,
    MeanCrossAttention,
    MeanWithoutInteraction,
    WithoutInteraction,
)
from pem_lightning.models.flops import count_gmacs, count_parameters
from pem_lightning.models.layers import sine_position_encoding
from pem_lightning.types import Target, UserError
from scripts.benchmark.reference import predict
from tests.models.randomize import build_tiny, compose, randomize

VARIANTS = [path.stem for path in sorted((CONF / "ablation").glob("*.yaml"))]
VARIANTS += ["no_masking,no_csm", "no_prototype,no_interaction,no_masking,fpn"]


def config_of(variant, layers=4):
    """What Hydra composes, by one composition for all variants. The fourth layer sees the first level again."""
    files = [OmegaConf.load(CONF / "ablation" / f"{name}.yaml") for name in variant.split(",")]
    return OmegaConf.merge(compose(), *files, {"decoder_layers": layers})


def test_variants_are_composed_as_by_hydra():
    variant = "no_prototype,no_interaction,no_masking,fpn"
    assert config_of(variant, 3).network == compose(f"ablation=[{variant}]", "decoder_layers=3").network


def network_of(variant, layers=4):
    """The variant in small."""
    arguments = OmegaConf.to_container(config_of(variant, layers).network, resolve=True)
    for name in ("channels", "hidden_channels", "pyramid_channels", "mask_channels", "num_queries", "backbone"):
        del arguments[name]
    del arguments["_target_"]
    torch.manual_seed(0)
    return build_tiny(19, **arguments)


@pytest.mark.parametrize(("variant", "layers"), [*((name, 4) for name in VARIANTS), ("prototype", 1), ("prototype", 2)])
def test_every_variant_trains_reloads_counts_and_is_made_fast(variant, layers):
    network = randomize(network_of(variant, layers))
    images, target = torch.randn(2, 3, 32, 64), Target(torch.tensor([3, 12]), torch.rand(2, 32, 64) < 0.5)
    losses = SetCriterion(19, num_points=64)(network.train()(images), [target, target])
    torch.stack(list(losses.values())).sum().backward()
    without = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not without  # several processes would wait for them
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)

    again = network_of(variant, layers)
    torch.nn.init.zeros_(again.transformer_decoder.query_features.weight)
    again.load_state_dict(network.state_dict(), strict=True)
    with torch.no_grad():
        expected, actual = network.eval()(images), again.eval()(images)
    assert torch.equal(actual.mask_logits, expected.mask_logits)
    assert torch.equal(actual.class_logits, expected.class_logits)

    # Resized features instead of resized masks, fused normalisation: the same function in float64.
    with torch.no_grad():
        fast = OptimizedNetwork(network.double())(images.double())
        network.transformer_decoder.auxiliary = "always"
        slow = network(images.double())
    torch.testing.assert_close(fast.class_logits, slow.class_logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(fast.mask_logits, slow.mask_logits, rtol=0, atol=1e-9)
    network.transformer_decoder.layers = network.transformer_decoder.layers[:1]
    assert count_gmacs(network.float(), 32, 64) > 0


def test_the_default_is_the_paper():
    with torch.device("meta"):
        default = instantiate(compose("num_queries=100").network, num_classes=19)
    assert not OmegaConf.load(CONF / "ablation" / "prototype.yaml")
    assert count_parameters(default) == 16_957_829


@pytest.mark.parametrize("layers", [1, 2, 3, 9])
def test_levels_keep_cycling_and_none_is_idle(layers):
    decoder = build_tiny(num_layers=layers).transformer_decoder.eval()
    levels = [torch.randn(1, 32, 16 // s, 16 // s) for s in (8, 4, 2)]
    sizes = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _, arguments, out: sizes.append(arguments[2].shape[-1]))
    decoder(torch.randn(1, 16, 16, 16), levels)
    assert sizes == [(2, 4, 8)[i % 3] for i in range(layers)]
    assert len(decoder.input_projections) == min(3, layers)


def attention_inputs(kind):
    torch.manual_seed(0)
    module = kind(16, 4).eval()
    queries, positions, features = torch.randn(2, 5, 16), torch.randn(5, 16), torch.randn(2, 16, 3, 4)
    masks = torch.randn(2, 5, 3, 4)
    masks[0, 1] = -1  # an empty mask
    masks[1, 2, 0, 0] = 0  # foreground
    return module, (queries, positions, features, masks)


def keys_and_queries(module, queries, positions, features):
    keys = module.feature_linear(module.feature_conv(module.feature_norm(features)).flatten(2).mT)
    projected = module.query_linear(module.query_norm(queries + positions))
    return F.normalize(keys, dim=2), F.normalize(projected, dim=2)


def mean_by_loops(keys, masks, queries):
    out = torch.empty_like(queries)
    for b in range(len(queries)):
        for q in range(queries.shape[1]):
            inside = (masks[b, q].flatten() >= 0).nonzero().squeeze(1)
            out[b, q] = keys[b, inside if len(inside) else slice(None)].mean(0)
    return out


def test_mean_of_the_mask_in_the_place_of_the_prototype():
    module, (queries, positions, features, masks) = attention_inputs(MeanCrossAttention)
    keys, projected = keys_and_queries(module, queries, positions, features)
    mean = mean_by_loops(keys, masks, queries)
    interaction = module.interaction(mean * projected)
    expected = module.output(module.alpha * interaction / interaction.norm(dim=1, keepdim=True) + mean) + queries
    torch.testing.assert_close(module(queries, positions, features, masks), expected)
    everywhere = module(queries, positions, features, torch.ones_like(masks))
    torch.testing.assert_close(module(queries, positions, features, None), everywhere)


@pytest.mark.parametrize("kind", [WithoutInteraction, MeanWithoutInteraction])
def test_without_interaction_the_prototype_goes_in_as_it_is(kind):
    module, (queries, positions, features, masks) = attention_inputs(kind)
    keys, projected = keys_and_queries(module, queries, positions, features)
    taken = module.select(keys, projected, masks.flatten(2) < 0)
    torch.testing.assert_close(module(queries, positions, features, masks), module.output(taken) + queries)
    if kind is MeanWithoutInteraction:
        torch.testing.assert_close(taken, mean_by_loops(keys, masks, queries))
    assert not any("interaction" in name or "alpha" in name for name in module.state_dict())
    frozen = {name.split(".")[0] for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {"query_norm", "query_linear"}  # a selection teaches its projection nothing


@pytest.mark.parametrize("masked", [True, False])
def test_masked_cross_attention_equals_multihead_attention(masked):
    """PyTorch's own layer on the same weights, its mask as Mask2Former builds it."""
    module, (queries, positions, features, masks) = attention_inputs(MaskedCrossAttention)
    module.requires_grad_(False)
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    layers = (module.query_linear, module.key_linear, module.value_linear)
    attention.in_proj_weight.data = torch.cat([layer.weight for layer in layers])
    attention.in_proj_bias.data = torch.cat([layer.bias.normal_() for layer in layers])
    attention.out_proj = module.output
    y, x = sine_position_encoding(3, 4, 16)
    memory = features.flatten(2).mT
    blocked = (masks.flatten(2) < 0).repeat_interleave(4, dim=0)
    blocked[blocked.all(-1)] = False
    query, keys = module.query_norm(queries + positions), memory + (y + x).flatten(1).mT
    expected = attention(query, keys, memory, attn_mask=blocked if masked else None)[0]
    actual = module(queries, positions, features, masks if masked else None)
    torch.testing.assert_close(actual, expected + queries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "magic"}, r"attention=magic: choose prototype, mean, dot_product"),
        ({"attention": "dot_product", "interaction": False}, r"attention=dot_product has no interaction to leave out"),
        ({"pixel_decoder": "unet"}, r"pixel_decoder=unet: choose pem or msdeform"),
        ({"pixel_decoder": "msdeform", "csm": False}, r"csm=false and deformable=false leave parts out of PEM's"),
        ({"pixel_decoder": "msdeform", "mask_features": "levels"}, r"mask_features=levels is of PEM's pixel decoder"),
        ({"mask_features": "level"}, r"mask_features=level: choose pyramid or levels"),
        ({"num_layers": 0}, r"num_layers=0: choose at least 1"),
        ({"num_queries": 0}, r"num_queries=0: choose at least 1"),
        ({"channels": 30}, r"channels=30: choose a multiple of 4 and of num_heads=8"),
        ({"auxiliary": "sometimes"}, r"auxiliary=sometimes: choose training, always or never"),
        ({"backbone": "resnet99"}, r"resnet99.*resnet50"),
        ({"backbone": "resnet18", "backbone_norm": "nrm"}, r"nrm.*frozen"),
    ],
)
def test_impossible_variants_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        build_tiny(**arguments)


@pytest.mark.parametrize("variant", ["no_masking", "no_prototype", "no_csm", "fpn", "mask_levels"])
def test_the_reference_refuses_ablations(variant):
    with pytest.raises(UserError, match="an ablation of it"):
        predict(network_of(variant, layers=1).eval(), torch.zeros(1, 3, 32, 32))
