import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pem_lightning.losses import SetCriterion
from pem_lightning.types import MaskFactors, Predictions, Target, UserError

WEIGHTS = {"ce": 2.0, "mask": 5.0, "dice": 5.0}


@pytest.fixture(params=["normal", "one_empty", "all_empty", "full_queries"])
def case(request, reference):
    """One recorded call of the authors' criterion, with their random points in the order in which ours draws them."""
    expected = json.loads((reference / "pem" / "losses.json").read_text())[request.param]
    arrays = np.load(reference / "pem" / "losses.npz")

    def tensor(key):
        return torch.from_numpy(arrays[f"{request.param}/{key}"])

    targets = []
    for i in range(len(expected["counts"])):
        width = tensor(f"masks_{i}_shape")[-1].item()
        masks = np.unpackbits(tensor(f"masks_{i}").numpy(), axis=-1, count=width).astype(bool)
        targets.append(Target(tensor(f"labels_{i}"), torch.from_numpy(masks)))
    layers = [
        Predictions(tensor(f"pred_logits_{i}").requires_grad_(), tensor(f"pred_masks_{i}").requires_grad_())
        for i in range(expected["n_pred_layers"])
    ]
    # The authors draw the matcher's points layer by layer and image by image, ours does it once.
    draws = [tensor(f"rand_{i:02d}") for i in range(len(expected["tape_shapes"]))]
    of_layers = [draws[start : start + len(targets) + 2] for start in range(0, len(draws), len(targets) + 2)]
    matching = torch.stack([torch.cat(layer[: len(targets)]) for layer in of_layers])
    tape = [matching, *(draw for layer in of_layers for draw in layer[len(targets) :])]

    def criterion():
        rest = iter(tape)

        def rand(shape, device):
            draw = next(rest)
            assert draw.shape == shape
            return draw

        criterion.rest = rest
        return SetCriterion(expected["K"], num_points=expected["num_points"], rand=rand)

    predictions = layers[-1]._replace(auxiliary=tuple(layers[:-1]))
    return SimpleNamespace(
        expected=expected, tensor=tensor, targets=targets, predictions=predictions, criterion=criterion
    )


def test_authors_indices(case):
    layers = (case.predictions, *case.predictions.auxiliary)
    matches = case.criterion().matcher(layers, case.targets)
    found = [[[match.queries.tolist(), match.segments.tolist()] for match in images] for images in matches]
    assert found == case.expected["indices_call_order"]


def test_authors_losses_and_gradients(case):
    losses = case.criterion()(case.predictions, case.targets)
    assert next(case.criterion.rest, None) is None
    expected = {key: WEIGHTS[key.split("_")[1]] * value for key, value in case.expected["losses_unweighted"].items()}
    assert {key: loss.item() for key, loss in losses.items()} == pytest.approx(expected, rel=2e-6)
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(case.expected["weighted_total"], rel=1e-6)
    total.backward()
    for logits, key in ((case.predictions.class_logits, "grad_logits"), (case.predictions.mask_logits, "grad_masks")):
        reference = case.tensor(key)
        torch.testing.assert_close(logits.grad, reference, rtol=0, atol=2e-6 * reference.abs().max().item())


def test_float32_under_autocast(case):
    expected = case.criterion()(case.predictions, case.targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = case.criterion()(case.predictions, case.targets)
    assert all(loss.dtype == torch.float32 and torch.equal(loss, expected[key]) for key, loss in losses.items())


def random_targets(*counts):
    return [Target(torch.randint(5, (n,)), torch.rand(n, 32, 48) < 0.4) for n in counts]


def factored_predictions(dtype=torch.float32, memory_format=torch.channels_last):
    """Three layers whose masks come in factors too, and the leaves they come from: shared features, embeddings."""
    torch.manual_seed(0)
    features = torch.randn(2, 4, 8, 12).to(dtype, memory_format=memory_format).requires_grad_()
    leaves = [features, *(torch.randn(2, 6, 4).to(dtype).requires_grad_() for _ in range(3))]
    layers = [
        Predictions(torch.randn(2, 6, 6), torch.einsum("bqc,bchw->bqhw", x, features), (), MaskFactors(x, features))
        for x in leaves[1:]
    ]
    return layers[0]._replace(auxiliary=tuple(layers[1:])), leaves


def without_factors(predictions):
    auxiliary = tuple(without_factors(layer) for layer in predictions.auxiliary)
    return predictions._replace(auxiliary=auxiliary, mask_factors=None)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (6, 4), (9, 7)])
def test_factors_of_masks_stand_for_the_masks_of_every_number_of_segments(counts, memory_format):
    predictions, leaves = factored_predictions(memory_format=memory_format)
    targets = random_targets(*counts)
    results = []
    for given in (predictions, without_factors(predictions)):
        torch.manual_seed(1)
        criterion = SetCriterion(5, num_points=40)
        assert criterion.state_dict() == {}  # checkpoints hold no constants
        losses = criterion(given, targets)
        assert set(losses) == {f"loss_{kind}{end}" for kind in WEIGHTS for end in ("", "_0", "_1")}
        assert all(loss.isfinite() for loss in losses.values())
        total = torch.stack(list(losses.values())).sum()
        # Every parameter takes part in every step, as DDP wants it.
        gradients = torch.autograd.grad(total, leaves, retain_graph=True)
        assert all(bool(gradient.any()) == any(counts) for gradient in gradients)
        results.append((losses, gradients))
    (losses, gradients), (expected_losses, expected_gradients) = results
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_masks_that_no_segment_matches_get_no_gradient():
    predictions, (_, *embeddings) = factored_predictions()
    losses = SetCriterion(5, num_points=40)(predictions, random_targets(2, 1))
    gradients = torch.autograd.grad(losses["loss_mask"] + losses["loss_mask_1"], embeddings)
    assert [x.abs().sum(2).count_nonzero(1).tolist() for x in gradients] == [[2, 1], [0, 0], [2, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factored", [True, False])
def test_half_precision_predictions_get_gradients(dtype, factored):
    predictions, leaves = factored_predictions(dtype)
    if not factored:
        leaves = [logits.detach().to(dtype).requires_grad_() for logits in predictions[:2]]
        predictions = Predictions(*leaves)
    with torch.autocast("cpu", dtype=dtype):
        losses = SetCriterion(5, num_points=40)(predictions, random_targets(3, 2))
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == dtype and leaf.grad.any() for leaf in leaves)


def test_segments_without_pixels_pull_masks_down():
    predictions = Predictions(torch.randn(1, 2, 6), torch.randn(1, 2, 8, 12, requires_grad=True))
    empty = Target(torch.tensor([0, 1]), torch.zeros(2, 32, 48, dtype=torch.bool))
    losses = SetCriterion(5, num_points=16)(predictions, [empty])
    assert all(loss.isfinite() for loss in losses.values())
    losses["loss_mask"].backward()
    assert (predictions.mask_logits.grad >= 0).all()
    assert predictions.mask_logits.grad.any()


def test_perfect_predictions_cost_nothing():
    wanted = Target(torch.tensor([1, 4]), torch.zeros(2, 32, 48, dtype=torch.bool))
    wanted.masks[0, :16], wanted.masks[1, 16:] = True, True
    class_logits = torch.full((1, 3, 6), -40.0)
    class_logits[0, torch.arange(3), torch.tensor([4, 5, 1])] = 40
    mask_logits = torch.full((1, 3, 8, 12), -1000.0)
    mask_logits[0, 2, :4], mask_logits[0, 0, 4:] = 1000, 1000
    # Points in the outermost and in the middle rows are blends, in the prediction as in the target: keep off them.
    criterion = SetCriterion(5, num_points=64, rand=lambda shape, device: 0.1 + 0.3 * torch.rand(shape, device=device))
    losses = criterion(Predictions(class_logits, mask_logits), [wanted])
    assert all(loss.item() == pytest.approx(0, abs=1e-4) for loss in losses.values())


def test_no_object_weight():
    """With one class and two queries, of which one is matched, the weighted mean can be written down."""
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0]]])
    masks = torch.stack([torch.full((4, 4), 5.0), torch.full((4, 4), -5.0)])[None]
    wanted = Target(torch.tensor([0]), torch.ones(1, 16, 16, dtype=torch.bool))
    losses = SetCriterion(1, num_points=8, no_object_weight=0.3, class_weight=1.0)(Predictions(logits, masks), [wanted])
    matched, unmatched = -logits.log_softmax(-1)[0, 0, 0], -logits.log_softmax(-1)[0, 1, 1]
    assert losses["loss_ce"].item() == pytest.approx(((matched + 0.3 * unmatched) / 1.3).item())


def test_weights_by_class():
    """The same mean with the class's own weight; weights of 1 are no weights, to the bit."""
    logits = torch.tensor([[[2.0, 1.0, 0.0], [1.0, 3.0, 0.0]]])
    masks = torch.stack([torch.full((4, 4), 5.0), torch.full((4, 4), -5.0)])[None]
    wanted = Target(torch.tensor([0]), torch.ones(1, 16, 16, dtype=torch.bool))

    def loss(weights):
        torch.manual_seed(0)
        criterion = SetCriterion(2, num_points=8, no_object_weight=0.3, class_weight=1.0, weight_by_class=weights)
        return criterion(Predictions(logits, masks), [wanted])["loss_ce"]

    matched, unmatched = -logits.log_softmax(-1)[0, 0, 0], -logits.log_softmax(-1)[0, 1, 2]
    assert loss([4.0, 7.0]).item() == pytest.approx(((4 * matched + 0.3 * unmatched) / 4.3).item())
    assert torch.equal(loss([1.0, 1.0]), loss(None))
    many = Target(torch.tensor([0, 0, 1]), torch.ones(3, 16, 16, dtype=torch.bool))  # of which two can be matched
    totals = SetCriterion(2, weight_by_class=[4.0, 7.0]).totals([many], 2, torch.device("cpu"))
    assert totals.class_weight.item() == pytest.approx(15 * 2 / 3)


@pytest.mark.parametrize(
    "wrong", [{"num_points": 0}, {"oversample_ratio": 0.5}, {"importance_sample_ratio": 1.5}], ids=str
)
def test_senseless_settings_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        SetCriterion(5, **wrong)


def test_parts_of_a_step_add_up_to_it():
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(3, 4, 6, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    targets = [  # more segments than queries, fewer, none
        Target(torch.arange(n) % 5, torch.rand(n, 32, 32, generator=generator) < 0.5) for n in (6, 2, 0)
    ]
    criterion = SetCriterion(5, num_points=4, no_object_weight=0.3, rand=lambda shape, device: torch.full(shape, 0.3))
    whole = criterion(Predictions(logits, masks), targets)
    totals = criterion.totals(targets, 4, logits.device)
    assert (totals.masks.item(), totals.class_weight.item()) == pytest.approx((8, 6 + 0.3 * 6))
    parts = [criterion(Predictions(logits[i], masks[i]), targets[i], totals) for i in (slice(0, 1), slice(1, 3))]
    for name, loss in whole.items():
        assert (parts[0][name] + parts[1][name]).item() == pytest.approx(loss.item(), rel=1e-5)


def test_totals_are_means_over_all_processes(monkeypatch):
    """One segment of an image with four queries here, and three there; test_same_step does it with real processes."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda own: own.add_(torch.tensor([3, 3 + 0.1])))
    totals = SetCriterion(5).totals(random_targets(1), 4, torch.device("cpu"))
    assert [total.item() for total in totals] == pytest.approx([2, (1 + 0.3 + 3 + 0.1) / 2])
