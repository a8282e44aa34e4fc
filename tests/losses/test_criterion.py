from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pem_lightning.losses import SetCriterion
from pem_lightning.types import MaskFactors, Predictions, Target, UserError

WEIGHTS = {"ce": 2.0, "mask": 5.0, "dice": 5.0}
CASES = ["normal", "one_empty", "all_empty", "full_queries"]


class Tape:
    """Hands out recorded draws in the order in which ours asks for them."""

    def __init__(self, draws: list[torch.Tensor]) -> None:
        self.draws = draws
        self.position = 0

    def __call__(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        draw = self.draws[self.position % len(self.draws)]
        self.position += 1
        assert draw.shape == shape
        return draw.to(device)


class Case:
    """One recorded call of the authors' criterion."""

    def __init__(self, folder: Path, name: str) -> None:
        self.expected = json.loads((folder / "losses.json").read_text())[name]
        arrays = np.load(folder / "losses.npz")
        self.arrays = {key.split("/")[1]: arrays[key] for key in arrays if key.startswith(f"{name}/")}
        layers = [
            Predictions(
                self.tensor(f"pred_logits_{i}").requires_grad_(), self.tensor(f"pred_masks_{i}").requires_grad_()
            )
            for i in range(self.expected["n_pred_layers"])
        ]
        self.predictions = layers[-1]._replace(auxiliary=tuple(layers[:-1]))
        self.targets = [self.target(i) for i in range(len(self.expected["counts"]))]
        self.tape = Tape(self.reordered_draws())

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def target(self, image: int) -> Target:
        width = self.arrays[f"masks_{image}_shape"][-1]
        masks = np.unpackbits(self.arrays[f"masks_{image}"], axis=-1, count=width).astype(bool)
        return Target(self.tensor(f"labels_{image}"), torch.from_numpy(masks))

    def reordered_draws(self) -> list[torch.Tensor]:
        """The authors draw the matcher's points layer by layer and image by image, ours does it once."""
        draws = [self.tensor(f"rand_{i:02d}") for i in range(len(self.expected["tape_shapes"]))]
        images = len(self.targets)
        layers = [draws[start : start + images + 2] for start in range(0, len(draws), images + 2)]
        matching = torch.stack([torch.cat(layer[:images]) for layer in layers])
        return [matching, *(draw for layer in layers for draw in layer[images:])]

    def criterion(self) -> SetCriterion:
        return SetCriterion(self.expected["K"], num_points=self.expected["num_points"], rand=self.tape)

    def layers(self) -> tuple[Predictions, ...]:
        return (self.predictions, *self.predictions.auxiliary)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, reference: Path) -> Case:
    return Case(reference / "pem", request.param)


def test_authors_indices(case: Case) -> None:
    matches = case.criterion().matcher(case.layers(), case.targets)
    found = [[[match.queries.tolist(), match.segments.tolist()] for match in images] for images in matches]
    assert found == case.expected["indices_call_order"]


def test_authors_losses_and_gradients(case: Case) -> None:
    losses = case.criterion()(case.predictions, case.targets)
    expected = {key: WEIGHTS[key.split("_")[1]] * value for key, value in case.expected["losses_unweighted"].items()}
    assert case.tape.position == len(case.tape.draws)
    assert {key: loss.item() for key, loss in losses.items()} == pytest.approx(expected, rel=2e-6)
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(case.expected["weighted_total"], rel=1e-6)
    total.backward()
    for logits, key in ((case.predictions.class_logits, "grad_logits"), (case.predictions.mask_logits, "grad_masks")):
        reference = case.tensor(key)
        torch.testing.assert_close(logits.grad, reference, rtol=0, atol=2e-6 * reference.abs().max().item())


def test_float32_under_autocast(case: Case) -> None:
    expected = case.criterion()(case.predictions, case.targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = case.criterion()(case.predictions, case.targets)
    assert all(loss.dtype == torch.float32 and torch.equal(loss, expected[key]) for key, loss in losses.items())


def test_half_precision_predictions_get_gradients() -> None:
    torch.manual_seed(0)
    predictions = random_predictions(2, 6)
    half = Predictions(*(logits.detach().bfloat16().requires_grad_() for logits in predictions[:2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = SetCriterion(5, num_points=32)(half, [random_target(3), random_target(2)])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for logits in half[:2]:
        assert logits.grad is not None
        assert logits.grad.dtype == torch.bfloat16
        assert logits.grad.abs().sum() > 0


def random_predictions(batch: int, queries: int, auxiliary: int = 0) -> Predictions:
    layers = [
        Predictions(
            torch.randn(batch, queries, 6, requires_grad=True), torch.randn(batch, queries, 8, 12, requires_grad=True)
        )
        for _ in range(auxiliary + 1)
    ]
    return layers[0]._replace(auxiliary=tuple(layers[1:]))


def random_target(segments: int) -> Target:
    return Target(torch.randint(5, (segments,)), torch.rand(segments, 32, 48) < 0.4)


def factored_predictions(dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Predictions, list[Tensor]]:
    """Three layers whose masks come in factors too, and the leaves they come from: shared features, embeddings."""
    features = torch.randn(2, 4, 8, 12).to(dtype, memory_format=memory_format).requires_grad_()
    leaves = [features, *(torch.randn(2, 6, 4).to(dtype).requires_grad_() for _ in range(3))]
    layers = [
        Predictions(torch.randn(2, 6, 6), torch.einsum("bqc,bchw->bqhw", x, features), (), MaskFactors(x, features))
        for x in leaves[1:]
    ]
    return layers[0]._replace(auxiliary=tuple(layers[1:])), leaves


def without_factors(predictions: Predictions) -> Predictions:
    return predictions._replace(
        auxiliary=tuple(without_factors(layer) for layer in predictions.auxiliary), mask_factors=None
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (5, 4), (9, 7)])
def test_factors_of_masks_stand_for_the_masks(counts: tuple[int, int], memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    predictions, leaves = factored_predictions(torch.float32, memory_format)
    targets = [random_target(n) for n in counts]
    results = []
    for given in (predictions, without_factors(predictions)):
        torch.manual_seed(1)
        losses = SetCriterion(5, num_points=40)(given, targets)
        total = torch.stack(list(losses.values())).sum()
        results.append((losses, torch.autograd.grad(total, leaves, retain_graph=True)))
    (losses, gradients), (expected_losses, expected_gradients) = results
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_masks_that_no_segment_matches_get_no_gradient() -> None:
    torch.manual_seed(0)
    predictions, (_, *embeddings) = factored_predictions(torch.float32, torch.contiguous_format)
    losses = SetCriterion(5, num_points=40)(predictions, [random_target(2), random_target(1)])
    gradients = torch.autograd.grad(losses["loss_mask"] + losses["loss_mask_1"], embeddings)
    assert [x.abs().sum(2).count_nonzero(1).tolist() for x in gradients] == [[2, 1], [0, 0], [2, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    predictions, leaves = factored_predictions(dtype, torch.channels_last)
    with torch.autocast("cpu", dtype=dtype):
        losses = SetCriterion(5, num_points=40)(predictions, [random_target(3), random_target(2)])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == dtype and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (6, 6), (9, 7)])
def test_every_number_of_segments(counts: tuple[int, int]) -> None:
    torch.manual_seed(0)
    predictions = random_predictions(2, 6, auxiliary=2)
    losses = SetCriterion(5, num_points=16)(predictions, [random_target(n) for n in counts])
    assert set(losses) == {f"loss_{kind}{end}" for kind in WEIGHTS for end in ("", "_0", "_1")}
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for layer in (predictions, *predictions.auxiliary):
        assert layer.class_logits.grad is not None
        assert layer.mask_logits.grad is not None  # every parameter takes part in every step, as DDP wants it
        assert bool(layer.mask_logits.grad.any()) == any(counts)


def test_segments_without_pixels_pull_masks_down() -> None:
    torch.manual_seed(0)
    predictions = random_predictions(1, 2)
    empty = Target(torch.tensor([0, 1]), torch.zeros(2, 32, 48, dtype=torch.bool))
    losses = SetCriterion(5, num_points=16)(predictions, [empty])
    assert all(loss.isfinite() for loss in losses.values())
    losses["loss_mask"].backward()
    assert (predictions.mask_logits.grad >= 0).all()
    assert predictions.mask_logits.grad.any()


def test_perfect_predictions_cost_nothing() -> None:
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


def test_no_object_weight() -> None:
    """With one class and two queries, of which one is matched, the weighted mean can be written down."""
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0]]])
    masks = torch.stack([torch.full((4, 4), 5.0), torch.full((4, 4), -5.0)])[None]
    wanted = Target(torch.tensor([0]), torch.ones(1, 16, 16, dtype=torch.bool))
    losses = SetCriterion(1, num_points=8, no_object_weight=0.3, class_weight=1.0)(Predictions(logits, masks), [wanted])
    matched, unmatched = -logits.log_softmax(-1)[0, 0, 0], -logits.log_softmax(-1)[0, 1, 1]
    assert losses["loss_ce"].item() == pytest.approx(((matched + 0.3 * unmatched) / 1.3).item())


def test_checkpoints_hold_no_constants() -> None:
    assert SetCriterion(5).state_dict() == {}


@pytest.mark.parametrize(
    "wrong", [{"num_points": 0}, {"oversample_ratio": 0.5}, {"importance_sample_ratio": 1.5}], ids=str
)
def test_senseless_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SetCriterion(5, **wrong)


def test_losses_of_a_steps_parts_add_up() -> None:
    """With the totals of all its images; by themselves, they are divided by their own."""
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


WORKER = """
import sys
import torch
import torch.distributed as dist
from pem_lightning.losses import SetCriterion
from pem_lightning.types import MaskFactors, Predictions, Target

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
generator = torch.Generator().manual_seed(0)
predictions = Predictions(torch.randn(1, 4, 6, generator=generator), torch.randn(1, 4, 8, 8, generator=generator))
target = Target(torch.tensor([1]), torch.rand(1, 32, 32, generator=generator) < 0.5)
criterion = SetCriterion(5, num_points=4, rand=lambda shape, device: torch.full(shape, 0.3))
alone = criterion(predictions, [target])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
if rank == 0:  # one segment here, three there: two on average
    together = criterion(predictions, [target])
    torch.testing.assert_close(together["loss_mask"], alone["loss_mask"] / 2)
    # Weights of the four queries: one matched and three not here, three and one there.
    torch.testing.assert_close(together["loss_ce"], alone["loss_ce"] * 1.3 / ((1.3 + 3.1) / 2))
else:
    criterion(predictions, [Target(target.labels.repeat(3), target.masks.repeat(3, 1, 1))])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_masks_are_counted_over_all_processes(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")], cwd=Path(__file__).parents[2]
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
