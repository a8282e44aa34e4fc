"""Mask2Former's matching and losses as its authors compute them: layer by layer, image by image.

In every layer all target masks become floating-point maps at full resolution, which `grid_sample` reads. The host waits
for the device once per image and layer.

Legend: B batch, Q queries, K classes, N segments of an image, M matched pairs of a layer, H W spatial, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pem_lightning.losses import UniformSource
from pem_lightning.types import Predictions, Target

Match = tuple[Tensor, Tensor]  # an image's matched queries, and their segments


@dataclass(frozen=True)
class SetLosses:
    """The losses of a batch; for the attributes see `pem_lightning.losses.SetCriterion`."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    rand: UniformSource = lambda shape, device: torch.rand(shape, device=device)

    def __call__(self, predictions: Predictions, targets: Sequence[Target]) -> dict[str, Float[Tensor, ""]]:
        """Compute the weighted losses of all layers by name."""
        num_masks = max(1, sum(len(target.labels) for target in targets))
        losses = {}
        for i, layer in enumerate((predictions, *predictions.auxiliary)):
            suffix = f"_{i - 1}" if i else ""
            matches = self.match(layer, targets)
            mask, dice = self._mask_losses(layer.mask_logits, targets, matches, num_masks)
            losses["loss_ce" + suffix] = self.class_weight * self._class_loss(layer.class_logits, targets, matches)
            losses["loss_mask" + suffix] = self.mask_weight * mask
            losses["loss_dice" + suffix] = self.dice_weight * dice
        return losses

    @torch.no_grad()
    def match(self, layer: Predictions, targets: Sequence[Target]) -> list[Match]:
        """Find the cheapest pairs of every image."""
        matches = []
        for class_logits, mask_logits, target in zip(layer.class_logits, layer.mask_logits, targets, strict=True):
            class_cost = -class_logits.softmax(-1)[:, target.labels]
            points = self.rand((1, self.num_points, 2), mask_logits.device)
            masks = target.masks.to(mask_logits)
            expected = _sample(masks, points.repeat(len(masks), 1, 1))  # N P
            logits = _sample(mask_logits, points.repeat(len(mask_logits), 1, 1))  # Q P
            with torch.autocast(mask_logits.device.type, enabled=False):
                mask_cost, dice_cost = _pairwise_cross_entropy(logits, expected), _pairwise_dice(logits, expected)
            cost = self.class_weight * class_cost + self.mask_weight * mask_cost + self.dice_weight * dice_cost
            queries, segments = linear_sum_assignment(cost.cpu().numpy())
            matches.append((torch.from_numpy(queries), torch.from_numpy(segments)))
        return matches

    def _class_loss(
        self, logits: Float[Tensor, "B Q K_and_none"], targets: Sequence[Target], matches: Sequence[Match]
    ) -> Float[Tensor, ""]:
        none = logits.shape[-1] - 1
        labels = torch.full(logits.shape[:2], none, dtype=torch.int64, device=logits.device)
        found = [target.labels[segments] for target, (_, segments) in zip(targets, matches, strict=True)]
        labels[_index(matches, 0)] = torch.cat(found)
        weights = torch.ones(none + 1, dtype=_at_least_float32(logits).dtype, device=logits.device)
        weights[-1] = self.no_object_weight
        return F.cross_entropy(_at_least_float32(logits).transpose(1, 2), labels, weights)

    def _mask_losses(
        self,
        mask_logits: Float[Tensor, "B Q h w"],
        targets: Sequence[Target],
        matches: Sequence[Match],
        num_masks: int,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        logits = mask_logits[_index(matches, 0)]  # M h w
        masks = pad_sequence([target.masks for target in targets], batch_first=True).to(logits)[
            _index(matches, 1)
        ]  # M H W
        with torch.no_grad():
            points = self._choose_points(logits)
            expected = _sample(masks, points)
        sampled = _sample(logits, points)
        cross_entropy = F.binary_cross_entropy_with_logits(sampled, expected, reduction="none").mean(1)
        probability = sampled.sigmoid()
        overlap = 2 * (probability * expected).sum(-1)
        dice = 1 - (overlap + 1) / (probability.sum(-1) + expected.sum(-1) + 1)
        return cross_entropy.sum() / num_masks, dice.sum() / num_masks

    def _choose_points(self, logits: Float[Tensor, "M h w"]) -> Float[Tensor, "M P 2"]:
        """Choose the most uncertain of many candidates, and some points anywhere (PointRend)."""
        candidates = self.rand((len(logits), int(self.num_points * self.oversample_ratio), 2), logits.device)
        uncertainty = -_sample(logits, candidates).abs()
        num_uncertain = int(self.importance_sample_ratio * self.num_points)
        best = uncertainty.topk(num_uncertain, dim=1).indices
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        others = self.rand((len(logits), self.num_points - num_uncertain, 2), logits.device)
        return torch.cat([candidates[rows, best], others], dim=1)


def _pairwise_cross_entropy(logits: Float[Tensor, "Q P"], expected: Float[Tensor, "N P"]) -> Float[Tensor, "Q N"]:
    foreground = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    background = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")
    cost = torch.einsum("qp,np->qn", foreground, expected) + torch.einsum("qp,np->qn", background, 1 - expected)
    return cost / logits.shape[1]


def _pairwise_dice(logits: Float[Tensor, "Q P"], expected: Float[Tensor, "N P"]) -> Float[Tensor, "Q N"]:
    probability = logits.sigmoid()
    overlap = 2 * torch.einsum("qp,np->qn", probability, expected)
    return 1 - (overlap + 1) / (probability.sum(-1)[:, None] + expected.sum(-1)[None] + 1)


def _sample(maps: Float[Tensor, "rows H W"], points: Float[Tensor, "rows P 2"]) -> Float[Tensor, "rows P"]:
    maps = _at_least_float32(maps)
    return F.grid_sample(maps[:, None], 2 * points[:, :, None].to(maps) - 1, align_corners=False)[:, 0, :, 0]


def _index(matches: Sequence[Match], side: int) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " M"]]:
    """(image, query) of all pairs for side 0, (image, segment) for side 1."""
    images = torch.cat([torch.full_like(match[side], i) for i, match in enumerate(matches)])
    return images, torch.cat([match[side] for match in matches])


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
