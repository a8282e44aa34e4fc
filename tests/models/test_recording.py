import pytest
import torch
from torch import nn

from pem_lightning.inference.prototypes import record_selections
from pem_lightning.models.prototype_attention import PrototypeCrossAttention, select_prototypes


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return PrototypeCrossAttention(channels=32, num_heads=4).eval()


@pytest.fixture
def inputs():
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 32), (9, 32), (2, 32, 6, 7), (2, 9, 6, 7))
    return [torch.randn(shape, generator=draw) for shape in shapes]


def test_what_is_recorded_is_what_was_selected(layer, inputs):
    """Against `select_prototypes`, on keys and queries that are projected here."""
    queries, query_positions, features, mask_logits = inputs
    with torch.no_grad(), record_selections(nn.Sequential(nn.Identity(), layer)) as selections:
        layer(*inputs)
        keys = layer.feature_conv(layer.feature_norm(features)).flatten(2).mT
        keys = nn.functional.normalize(layer.feature_linear(keys), dim=-1)
        projected = nn.functional.normalize(layer.query_linear(layer.query_norm(queries + query_positions)), dim=-1)
    background = mask_logits.flatten(2) < 0
    _, positions = select_prototypes(keys, projected, background, 4)
    (selection,) = selections
    assert torch.equal(selection.positions, positions)
    assert torch.equal(selection.background, background)
    highest = torch.einsum("bqmd,bpmd->bmqp", projected.unflatten(2, (4, 8)), keys.unflatten(2, (4, 8)))
    highest = highest.masked_fill(background[:, None], float("-inf")).amax(-1)
    torch.testing.assert_close(selection.similarity, highest)


def test_nothing_is_recorded_after_the_context_and_outputs_stay_the_same(layer, inputs):
    with torch.no_grad():
        before = layer(*inputs)
        with record_selections(layer) as selections:
            assert torch.equal(layer(*inputs), before)
        layer(*inputs)
    assert len(selections) == 1
    with pytest.raises(RuntimeError), record_selections(layer):
        raise RuntimeError
    layer(*inputs)
    assert not layer.selection._forward_hooks


def test_a_network_without_prototypes_leaves_no_record():
    with record_selections(nn.Linear(2, 2)) as selections:
        pass
    assert selections == []
