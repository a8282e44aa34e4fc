"""Parameter groups, gradient clipping and learning-rate schedule, as PEM's authors train."""

from __future__ import annotations

import math
from typing import Any, cast

from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pem_lightning.types import UserError

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""Modules whose parameters scale and shift what is already normalised: shrinking them regularises nothing."""


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.05, backbone_lr_multiplier: float = 0.1
) -> list[dict[str, Any]]:
    """Split trainable parameters by learning rate and weight decay.

    Norms and embeddings do not decay, biases do, as in the authors' training. Everything in a module called `backbone`
    learns more slowly. A module may exempt more of its parameters from decay: `no_weight_decay() -> set[str]`.

    Args:
        model: the network, or a module that holds it.
        lr: learning rate outside of the backbone.
        weight_decay: of all that decays.
        backbone_lr_multiplier: the backbone's share of `lr`.

    Returns:
        As few groups for a `torch.optim` optimiser as possible, in the order of the first parameter of each.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "no_weight_decay")]
    exempt = {owner.get_parameter(name) for owner in owners for name in owner.no_weight_decay()}
    for module_name, module in model.named_modules():
        part = "backbone" if "backbone" in module_name.split(".") else "decoders"
        group_lr = lr * backbone_lr_multiplier if part == "backbone" else lr
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = 0.0 if parameter in exempt or _is_norm_or_embedding(module, name) else weight_decay
            group = groups.setdefault((group_lr, decay), {"params": [], "lr": group_lr, "weight_decay": decay})
            group["params"].append(parameter)
            suffix = "_no_decay" if decay < weight_decay else ""
            name = f"{part}{suffix}"  # of its curve, see LearningRateMonitor
            group["name"] = name if group.get("name", name) == name else f"network{suffix}"
    return list(groups.values())


def _is_norm_or_embedding(module: nn.Module, name: str) -> bool:
    # Vision transformers keep embeddings and position tables as bare parameters, known by name alone.
    return isinstance(module, (*NORMS, nn.Embedding)) or "embed" in name or name == "relative_position_bias_table"


def freeze(network: nn.Module, part: str | None) -> None:
    """Stop a part of a network from learning: no gradients, and its normalisation keeps its statistics.

    Args:
        network: PEM, or anything with its interface.
        part: `recipe.freeze`: "backbone", or None for nothing.

    Raises:
        UserError: it is anything else.
    """
    if part is None:
        return
    if part != "backbone":
        raise UserError(f"recipe.freeze={part}: choose backbone, or null to train everything")
    backbone = cast(nn.Module, network.backbone)
    # Lightning leaves the mode of every module as it finds it, also after a validation.
    backbone.requires_grad_(False).eval()


def clip_gradients(optimizer: Optimizer, max_norm: float, precision: Precision) -> Tensor:
    """Scale the gradient of an optimiser that is about to step down to a norm over all parameters.

    Args:
        optimizer: of the parameters.
        max_norm: 0 for no limit.
        precision: the trainer's plugin. In float16, Lightning leaves undoing the loss scale to fused optimisers while
            they step, which is too late to clip.

    Returns:
        The norm before clipping, on the device.
    """
    scaler = getattr(precision, "scaler", None)
    if scaler is not None and optimizer.defaults.get("fused"):
        scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)


def cosine_schedule(
    optimizer: Optimizer,
    *,
    max_iterations: int,
    end_lr: float = 0.0,
    warmup_iterations: int = 0,
    warmup_factor: float = 0.001,
) -> LambdaLR:
    """Decay along half a cosine, stepped every iteration: lr(t) = end + (base - end) (1 + cos(pi t / max)) / 2.

    One factor scales all groups, so that their proportions stay.

    Args:
        optimizer: its groups' learning rates are the base values.
        max_iterations: when the end is reached; the rate stays there afterwards.
        end_lr: last learning rate of the group with the largest one.
        warmup_iterations: of a linear rise to the decay's value; the paper has none.
        warmup_factor: where the rise begins, as a share of the base value.
    """
    end = end_lr / max(group["lr"] for group in optimizer.param_groups)

    def decay(iteration: int) -> float:
        progress = min(iteration / max_iterations, 1.0)
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))

    def factor(iteration: int) -> float:
        if iteration >= warmup_iterations:
            return decay(iteration)
        return warmup_factor + (decay(warmup_iterations) - warmup_factor) * iteration / warmup_iterations

    return LambdaLR(optimizer, factor)
