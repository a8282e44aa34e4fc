"""The second forward pass equals the first, for every ablation and way of sampling, before anything is exported."""

import pytest
import torch

from pem_lightning.deploy.graph import DEFORMABLE_CONVOLUTIONS, ExportGraph
from pem_lightning.installation import CONF
from pem_lightning.models.deformable_conv import DeformableConv, deform_conv_torch
from pem_lightning.preprocess import normalize
from pem_lightning.types import UserError
from tests.models.randomize import build_tiny, randomize
from tests.models.test_ablations import network_of

ABLATIONS = [path.stem for path in sorted((CONF / "ablation").glob("*.yaml"))]
VARIANTS = [*((name, 4) for name in [*ABLATIONS, "no_prototype,no_interaction,no_masking,fpn"]), ("prototype", 1)]


def draw(*shape):
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def assert_equal(network, graph, images):
    wanted = network(torch.stack([normalize(image.permute(2, 0, 1)) for image in images]))
    class_logits, mask_logits = graph(images)
    torch.testing.assert_close(class_logits, wanted.class_logits, rtol=0, atol=2e-5)
    largest = wanted.mask_logits.abs().max().item()
    torch.testing.assert_close(mask_logits, wanted.mask_logits, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize(("variant", "layers"), VARIANTS)
def test_every_ablation(variant, layers):
    network = randomize(network_of(variant, layers)).eval()
    for deform in DEFORMABLE_CONVOLUTIONS:
        if deform == "operator" and variant == "msdeform":
            with pytest.raises(UserError, match="this network has attention: choose gather"):
                ExportGraph(network, deform)
            continue
        assert_equal(network, ExportGraph(network, deform), draw(2, 45, 70))


def test_empty_masks_are_not_masked_or_take_the_first_position():
    network = randomize(build_tiny(num_layers=3)).eval()
    with torch.no_grad():
        network.transformer_decoder.mask_head.layers[-1].bias.sub_(100)  # mask features are never negative
    graph = ExportGraph(network)
    assert (graph(draw(1, 64, 96))[1] < 0).all()
    assert_equal(network, graph, draw(2, 64, 96))


@pytest.mark.parametrize("deform", ["gather", "grid_sample"])
def test_offsets_beyond_the_border_sample_zeros(deform):
    torch.manual_seed(0)
    x, weight, mask = torch.randn(2, 4, 5, 7), torch.randn(3, 4, 3, 3), torch.rand(2, 9, 5, 7)
    offsets = torch.randn(2, 18, 5, 7) * 4
    offsets[1] *= 1e4
    found = DEFORMABLE_CONVOLUTIONS[deform](x, offsets, mask, weight)
    torch.testing.assert_close(found, deform_conv_torch(x, offsets, mask, weight), rtol=0, atol=1e-4)


def test_the_network_itself_is_left_alone():
    network = build_tiny().eval()
    kernels = [m.kernel for m in network.modules() if isinstance(m, DeformableConv)]
    names = set(network.state_dict())
    ExportGraph(network, "grid_sample")
    assert kernels == [m.kernel for m in network.modules() if isinstance(m, DeformableConv)]
    assert set(network.state_dict()) == names


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(UserError, match="type Linear cannot be exported: it is no PEM"):
        ExportGraph(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="deform=magic: choose auto, gather, grid_sample, operator"):
        ExportGraph(build_tiny(), "magic")
