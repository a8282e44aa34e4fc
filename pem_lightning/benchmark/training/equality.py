"""Whether two paths of a training step compute the same: losses and gradients, with the same weights and points.

Normalisation takes running statistics here: with those of a small batch, rounding alone grows to a percent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from pem_lightning.benchmark.equality import other_library
from pem_lightning.benchmark.training.draws import SharedDraws
from pem_lightning.benchmark.training.lineup import Plan
from pem_lightning.benchmark.training.settings import TrainingSettings
from pem_lightning.benchmark.training.steps import Losses
from pem_lightning.models.pem import PEM
from pem_lightning.types import Batch, UserError

LARGEST_DIFFERENCE = 0.01
"""Relative, of the sum of the losses in float32; rounding stays far below it."""

Found = tuple[Losses, dict[str, Tensor]]


def compare_plans(
    plans: Collection[Plan],
    network: Callable[[str], PEM],
    batch: Batch,
    settings: TrainingSettings,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Compare every path with its backbone's straightforward one in float32.

    Compiled networks are left out: without batch statistics they would be others.

    Args:
        plans: the contestants.
        network: backbone -> weights.
        batch: to be learnt from.
        settings: of the benchmark.
        say: is told what happens.

    Raises:
        UserError: one of ours in float32 does not compute the same.
    """
    rows = []
    for backbone in dict.fromkeys(plan.backbone for plan in plans):
        reference = Plan("straightforward", backbone)
        say(f"comparing losses and gradients with {reference.name}")
        expected = _find(reference, network, batch, settings)
        library, context = other_library(settings.torch_device)
        with context:
            rounding = _find(reference, network, batch, settings)
        rows.append(_row(f"{reference.name} {library}", reference, rounding, expected))
        for plan in plans:
            if plan.backbone == backbone and plan != reference and not plan.compile:
                rows.append(_row(plan.name, reference, _find(plan, network, batch, settings), expected))
                if plan.precision == "float32":
                    _check(rows[-1])
    return rows


def compare_steps(actual: Found, expected: Found) -> dict[str, float]:
    """Relative differences of losses and gradients.

    Returns:
        loss: sum of the losses.
        loss_difference: of that sum.
        largest_difference: of the loss that differs most.
        gradient_norm: over all parameters.
        gradient_norm_difference: of that norm.
        gradient_difference: norm of all gradients' difference, divided by the norm.
    """
    total, expected_total = (float(sum(loss.double() for loss in found[0].values())) for found in (actual, expected))
    of_losses = [_relative(float(loss), float(expected[0][name])) for name, loss in actual[0].items()]
    norm, expected_norm = _norm(actual[1]), _norm(expected[1])
    missing = actual[1].keys() ^ expected[1].keys()
    differences = {
        name: expected[1][name].double() - g.double() for name, g in actual[1].items() if name not in missing
    }
    return {
        "loss": total,
        "loss_difference": _relative(total, expected_total),
        "largest_difference": max(of_losses),
        "gradient_norm": norm,
        "gradient_norm_difference": _relative(norm, expected_norm),
        "gradient_difference": float("inf") if missing else _norm(differences) / expected_norm,
    }


def _find(plan: Plan, network: Callable[[str], PEM], batch: Batch, settings: TrainingSettings) -> Found:
    step = plan.build(network(plan.backbone), settings, rand=SharedDraws())
    step.freeze_statistics()
    return step.gradients(batch)


def _row(name: str, reference: Plan, actual: Found, expected: Found) -> dict[str, Any]:
    return {"name": name, "reference": reference.name, **compare_steps(actual, expected)}


def _check(row: dict[str, Any]) -> None:
    if not row["loss_difference"] <= LARGEST_DIFFERENCE:  # NaN is no equality
        raise UserError(
            f"{row['name']} computes something else than {row['reference']}: its loss differs by "
            f"{row['loss_difference']:.1%}, so times would say nothing (--no-equality measures them all the same)"
        )


def _norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


def _relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / abs(expected) if expected else abs(actual)
