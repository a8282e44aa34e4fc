"""The reference's training step against the authors' numbers, and ours against it: losses and all gradients."""

import json

import numpy as np
import pytest
import torch

from pem_lightning import build_pem, checkpoints
from pem_lightning.losses import SetCriterion
from pem_lightning.preprocess import pad_batch
from pem_lightning.training.optim import parameter_groups
from pem_lightning.types import Predictions, Target
from scripts.benchmark import reference as plain
from scripts.benchmark.training import shared_draws
from tests.models.randomize import build_tiny, randomize


def freeze_statistics(network):
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


@pytest.mark.slow
def test_equals_the_authors_step(reference, official_weights):
    """With their random numbers in their order: losses, and the norms of all gradients."""
    expected = json.loads((reference / "pem" / "train_city_pan_r50_bneval.json").read_text())
    arrays = np.load(reference / "pem" / "train_city_pan_r50_bneval.npz")
    images = [torch.from_numpy(arrays[f"image_{i}"]) for i in range(2)]
    targets = []
    for i in range(2):
        masks = np.unpackbits(arrays[f"masks_{i}"], axis=-1, count=arrays[f"masks_{i}_shape"][-1]).astype(bool)
        targets.append(Target(torch.from_numpy(arrays[f"labels_{i}"]), torch.from_numpy(masks)))
    draws = [torch.from_numpy(arrays[f"rand_{i:02d}"]) for i in range(len(expected["tape_shapes"]))]
    rest = iter(draws)
    network = build_pem("resnet50", num_classes=19).train()
    network.load_state_dict(checkpoints.from_official(official_weights("city_pan_r50", seed=1)), strict=True)
    freeze_statistics(network)

    batch, padded = plain.prepare(images, targets)
    criterion = plain.SetLosses(num_points=expected["TRAIN_NUM_POINTS"], rand=lambda shape, device: next(rest))
    with torch.backends.mkldnn.flags(enabled=False):  # its algorithms for some processors round ten times worse
        losses = criterion(plain.predict(network, batch), padded)
        torch.stack(list(losses.values())).sum().backward()

    assert next(rest, None) is None
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected["losses_weighted"], rel=1e-5)
    parameters = dict(network.named_parameters())
    for key, norm in expected["grad_norms"].items():
        gradient = parameters[checkpoints.rename_official_key(key)].grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), key


def draw_targets(counts, size, num_classes):
    """Blocks of ones; the last mask of an image is empty, as of a segment that a crop removed."""
    draw = torch.Generator().manual_seed(1)
    targets = []
    for count in counts:
        coarse = torch.rand(count, 1, size[0] // 8, size[1] // 8, generator=draw) < 0.3
        masks = coarse.float().repeat_interleave(8, 2).repeat_interleave(8, 3).squeeze(1).bool()
        masks[-1:] = False
        targets.append(Target(torch.randint(num_classes, (count,), generator=draw), masks))
    return targets


@pytest.mark.parametrize("counts", [(3, 5), (0, 2), (0, 0)])
def test_one_function_with_ours_in_float64(counts):
    torch.manual_seed(0)
    network = randomize(build_tiny(num_layers=2, num_queries=12)).double().train()
    freeze_statistics(network)
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8).unbind()
    images = [images[0], images[1][:, :60, :70]]
    targets = draw_targets(counts, (64, 96), 5)
    targets[1] = Target(targets[1].labels, targets[1].masks[:, :60, :70])
    settings = {"num_points": 200, "no_object_weight": 0.2, "class_weight": 1.5}
    paths = [
        (
            plain.prepare,
            lambda images: plain.predict(network, images),
            plain.SetLosses(rand=shared_draws(), **settings),
        ),
        (pad_batch, network, SetCriterion(5, rand=shared_draws(), **settings)),
    ]
    gradients, losses = [], []
    for prepare, predict, criterion in paths:
        network.zero_grad(set_to_none=True)
        batch, padded = prepare(images, targets)
        found = criterion(predict(batch.double()), padded)
        torch.stack(list(found.values())).sum().backward()
        losses.append({name: loss.item() for name, loss in found.items()})
        gradients.append({name: p.grad for name, p in network.named_parameters()})

    expected, actual = gradients
    assert losses[1] == pytest.approx(losses[0], rel=1e-6, abs=1e-7)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        if gradient is not None:
            scale = gradient.abs().max().item()
            torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-5 * scale + 1e-9, msg=name)


def test_batches_are_prepared_alike():
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=draw) for size in ((40, 70), (33, 90))]
    targets = draw_targets((2, 3), (40, 90), 4)
    targets = [Target(t.labels, t.masks[:, : x.shape[1], : x.shape[2]]) for t, x in zip(targets, images, strict=True)]
    (expected, masks), (batch, padded) = plain.prepare(images, targets), pad_batch(images, targets)
    assert batch.shape == (2, 3, 64, 96)
    torch.testing.assert_close(batch, expected)
    for a, b in zip(padded, masks, strict=True):
        assert torch.equal(a.masks, b.masks)
        assert torch.equal(a.labels, b.labels)


def test_the_optimiser_has_a_group_per_parameter_and_the_recipes_values():
    network = build_tiny(num_layers=1)
    values = {"lr": 1e-3, "weight_decay": 0.05, "backbone_lr_multiplier": 0.1}
    groups = plain.build_optimizer(network, **values).param_groups
    assert [len(group["params"]) for group in groups] == [1] * len(list(network.parameters()))
    assert {group["foreach"] for group in groups} == {group["fused"] for group in groups} == {None}
    expected = {p: (g["lr"], g["weight_decay"]) for g in parameter_groups(network, **values) for p in g["params"]}
    assert {group["params"][0]: (group["lr"], group["weight_decay"]) for group in groups} == expected


def test_predictions_without_auxiliary_ones_have_three_losses():
    predictions = Predictions(torch.randn(1, 4, 6), torch.randn(1, 4, 8, 8))
    losses = plain.SetLosses(num_points=16)(predictions, draw_targets((2,), (32, 32), 5))
    assert list(losses) == ["loss_ce", "loss_mask", "loss_dice"]
