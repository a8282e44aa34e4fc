import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.models.prototype_attention import PrototypeCrossAttention, PrototypeSelection


def select_by_loops(features, queries, background, num_heads):
    """The paper's selection written out, one image, query and head at a time."""
    B, P, C = features.shape
    D = C // num_heads
    prototypes = torch.empty_like(queries)
    for b in range(B):
        off = bool(background[b].all())
        for q in range(queries.shape[1]):
            for h in range(num_heads):
                part = slice(h * D, (h + 1) * D)
                inside = [p for p in range(P) if off or not background[b, q, p]]
                scores = [(features[b, p, part] @ queries[b, q, part]).item() for p in inside]
                best = inside[max(range(len(scores)), key=scores.__getitem__)] if inside else 0
                prototypes[b, q, part] = features[b, best, part]
    return prototypes


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 12), st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_selection_equals_the_loops(seed, num_queries, num_positions, share):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(2, num_positions, 8, generator=draw, dtype=torch.float64)
    queries = torch.randn(2, num_queries, 8, generator=draw, dtype=torch.float64)
    background = torch.rand(2, num_queries, num_positions, generator=draw) < share
    prototypes, positions = PrototypeSelection(4)(features, queries, background)
    torch.testing.assert_close(prototypes, select_by_loops(features, queries, background, 4), rtol=0, atol=0)
    assert positions.shape == (2, 4, num_queries)


def test_an_empty_mask_takes_position_0_unless_all_are_empty():
    features = torch.eye(4).expand(2, 4, 4).contiguous()
    queries = torch.eye(4)[None, 2:].expand(2, 2, 4).contiguous()  # most similar to positions 2 and 3
    background = torch.zeros(2, 2, 4, dtype=torch.bool)
    background[0] = True  # image 0: all masks empty, masking is off
    background[1, 0] = True  # image 1: only the first is
    _, positions = PrototypeSelection(1)(features, queries, background)
    assert positions.squeeze(1).tolist() == [[2, 3], [0, 3]]


def attention_inputs():
    torch.manual_seed(0)
    module = PrototypeCrossAttention(channels=16, num_heads=4).eval()
    module.alpha.data.normal_()
    queries, query_positions = torch.randn(2, 5, 16), torch.randn(5, 16)
    return module, (queries, query_positions, torch.randn(2, 16, 3, 4))


def test_equals_the_equations():
    mask = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1))
    module, (queries, query_positions, features) = attention_inputs()
    x = module.feature_conv(module.feature_norm(features))
    keys = F.normalize(module.feature_linear(x.flatten(2).mT), dim=2)
    q = F.normalize(module.query_linear(module.query_norm(queries + query_positions)), dim=2)
    k = select_by_loops(keys, q, mask.flatten(2) < 0, 4)
    interaction = module.interaction(k * q)
    interaction = interaction / interaction.norm(dim=1, keepdim=True)  # over the queries
    expected = module.output(module.alpha * interaction + k) + queries  # the residual carries no position
    seen = []
    module.selection.register_forward_hook(lambda _, arguments, out: seen.append(out))
    torch.testing.assert_close(module(queries, query_positions, features, mask), expected)
    torch.testing.assert_close(seen[0][0], k)


def test_a_logit_of_zero_is_foreground():
    mask = torch.full((2, 5, 3, 4), -1.0)
    mask[:, :, 2, 1] = 0.0
    module, arguments = attention_inputs()
    seen = []
    module.selection.register_forward_hook(lambda _, arguments, out: seen.append(out[1]))
    module(*arguments, mask)
    assert (seen[0] == 2 * 4 + 1).all()
