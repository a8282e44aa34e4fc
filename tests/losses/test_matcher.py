import warnings
from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.losses.criterion import dice_loss
from pem_lightning.losses.matcher import HungarianMatcher, pairwise_cross_entropy, pairwise_dice
from pem_lightning.losses.point_sampling import sample_masks, sample_points, uniform
from pem_lightning.types import Predictions, Target

NUM_CLASSES = 5


def matcher_of(num_points=16, rand=uniform):
    return HungarianMatcher(2.0, 5.0, 5.0, num_points, rand)


def predict(batch, queries, scale=3.0):
    return Predictions(scale * torch.randn(batch, queries, NUM_CLASSES + 1), scale * torch.randn(batch, queries, 8, 12))


def target(segments):
    return Target(torch.randint(NUM_CLASSES, (segments,)), torch.rand(segments, 32, 48) < 0.4)


def is_full(match, queries, segments):
    chosen, matched = (index.tolist() for index in match)
    pairs = min(queries, segments)
    unique = len(set(chosen)) == len(set(matched)) == len(chosen) == len(matched) == pairs
    return unique and set(chosen) <= set(range(queries)) and set(matched) <= set(range(segments))


def test_pairwise_costs_are_the_losses_of_the_pairs():
    torch.manual_seed(0)
    logits, masks = 30 * torch.randn(2, 4, 50), torch.rand(2, 3, 50)
    cross_entropy, dice = pairwise_cross_entropy(logits, masks), pairwise_dice(logits, masks)
    for b, q, n in product(range(2), range(4), range(3)):
        x, t = logits[b, q], masks[b, n]
        torch.testing.assert_close(cross_entropy[b, q, n], F.binary_cross_entropy_with_logits(x, t))
        torch.testing.assert_close(dice[b, q, n], dice_loss(x[None], t[None])[0])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), segments=st.integers(1, 4))
def test_no_other_assignment_is_cheaper(seed, segments):
    torch.manual_seed(seed)
    points = torch.rand(1, 1, 40, 2)
    matcher = matcher_of(40, lambda shape, device: points)
    prediction, wanted = predict(1, 4), target(segments)
    match = matcher([prediction], [wanted])[0][0]

    logits = sample_points(prediction.mask_logits, points[0])
    masks = sample_masks(wanted.masks, points[0].expand(segments, -1, -1))[None]
    cost = 5 * pairwise_cross_entropy(logits, masks) + 5 * pairwise_dice(logits, masks)
    cost = cost[0] - 2 * prediction.class_logits[0].softmax(-1)[:, wanted.labels]
    cheapest = min(sum(cost[q, n].item() for n, q in enumerate(chosen)) for chosen in permutations(range(4), segments))
    assert is_full(match, 4, segments)
    assert cost[match.queries, match.segments].sum().item() == pytest.approx(cheapest, abs=1e-4)


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 4), (6, 6), (9, 2)])
def test_every_number_of_segments(counts):
    torch.manual_seed(0)
    matches = matcher_of(16)([predict(2, 6), predict(2, 6)], [target(n) for n in counts])
    assert [len(images) for images in matches] == [2, 2]
    assert all(is_full(match, 6, n) for images in matches for match, n in zip(images, counts, strict=True))


def test_segments_without_pixels_are_matched():
    wanted = Target(torch.tensor([0, 1]), torch.zeros(2, 32, 48, dtype=torch.bool))
    assert is_full(matcher_of(16)([predict(1, 4)], [wanted])[0][0], 4, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_non_finite_predictions_warn_once_and_are_matched(value, everywhere):
    torch.manual_seed(0)
    prediction = predict(2, 5)
    for logits in prediction[:2]:
        logits[slice(None) if everywhere else slice(1), 0 if everywhere else 2 :] = value
    matcher, targets = matcher_of(16), [target(4), target(5)]
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        first = matcher([predict(2, 5), prediction], targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = matcher([prediction], targets)
    assert all(is_full(m, 5, len(t.labels)) for images in first + second for m, t in zip(images, targets, strict=True))
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        matcher_of(16)([prediction], targets)


@pytest.mark.parametrize("kind", [0, 1], ids=["class_logits", "mask_logits"])
def test_one_kind_of_non_finite_logits_is_enough_to_warn(kind):
    prediction = predict(1, 4)
    prediction[kind][0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        matcher_of(16)([prediction], [target(2)])


def test_one_bad_query_does_not_disturb_the_others():
    torch.manual_seed(0)
    wanted = Target(torch.tensor([0, 3]), torch.zeros(2, 32, 48, dtype=torch.bool))
    wanted.masks[0, :, :20] = True
    wanted.masks[1, 10:] = True
    class_logits = torch.full((1, 4, NUM_CLASSES + 1), -5.0)
    mask_logits = torch.full((1, 4, 8, 12), -8.0)
    for segment, query in enumerate((3, 1)):
        class_logits[0, query, wanted.labels[segment]] = 5
        mask_logits[0, query][wanted.masks[segment, ::4, ::4]] = 8
    class_logits[0, 0] = mask_logits[0, 2] = float("nan")
    with pytest.warns(RuntimeWarning):
        match = matcher_of(200)([Predictions(class_logits, mask_logits)], [wanted])[0][0]
    assert (match.queries.tolist(), match.segments.tolist()) == ([1, 3], [1, 0])


def test_huge_finite_predictions_do_not_overflow():
    prediction = predict(1, 5, scale=1e37)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match = matcher_of(2000)([prediction], [target(5)])[0][0]
    assert is_full(match, 5, 5)


@pytest.fixture
def host_reads(monkeypatch):
    """Every call, in order, that would make the host wait for an accelerator, and for which tensor."""
    reads = []

    def watch(name):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, *args, **kw: reads.append((name, tensor)) or method(tensor, *args, **kw)
        )

    for name in ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__array__"):
        watch(name)
    return reads


def test_one_transfer_for_all_layers_and_images(host_reads):
    # Points as on a GPU: on a CPU they are drawn on the host anyway.
    matcher = matcher_of(16, lambda shape, device: torch.rand(shape))
    matcher([predict(3, 6) for _ in range(4)], [target(2), target(0), target(5)])
    name, costs = host_reads[0]
    assert name == "cpu"
    assert costs.numel() == 4 * 3 * 6 * 5 + 1
    assert [name for name, _ in host_reads].count("cpu") == 1


def test_costs_are_float32_under_autocast(host_reads):
    torch.manual_seed(0)
    points = torch.rand(2, 2, 64, 2)
    matcher = matcher_of(64, lambda shape, device: points)
    layers, targets = [predict(2, 8), predict(2, 8)], [target(5), target(3)]
    half = [Predictions(p.class_logits.bfloat16(), p.mask_logits.bfloat16()) for p in layers]
    matcher(layers, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matcher(layers, targets)
        matcher(half, targets)
    matcher([Predictions(p.class_logits.float(), p.mask_logits.float()) for p in half], targets)
    plain, autocast, from_half, from_rounded = (tensor for name, tensor in host_reads if name == "cpu")
    assert plain.dtype == autocast.dtype == from_half.dtype == torch.float32
    assert torch.equal(plain, autocast)
    assert torch.equal(from_half, from_rounded)
