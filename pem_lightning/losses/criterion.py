"""The training loss of PEM, which is Mask2Former's: classification, mask cross-entropy and dice, after every layer.

Legend: L decoder layers (the last one first), B batch, Q queries, K classes, M matched pairs of a layer, H W spatial,
P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pem_lightning.losses.matcher import HungarianMatcher, Match
from pem_lightning.losses.point_sampling import (
    UniformSource,
    choose_uncertain_points,
    sample_masks,
    sample_points,
    uniform,
)
from pem_lightning.types import Predictions, Target, UserError


class Pairs(NamedTuple):
    """Indices of the matched queries and segments of all layers, on the device; segments count over all images."""

    layers: Int64[Tensor, "layers #pairs"]
    images: Int64[Tensor, "layers pairs"]
    queries: Int64[Tensor, "layers pairs"]
    segments: Int64[Tensor, "layers pairs"]
    counts: tuple[int, ...]  # of each image, the same in all layers


class LossTotals(NamedTuple):
    """What the losses of a step are divided by: the mean over all processes, whose gradients are averaged.

    The authors divide the classification loss by each process's own total; ours ignores which process has which image.
    """

    masks: Float[Tensor, ""]  # number of segments, at least 1
    class_weight: Float[Tensor, ""]  # sum of the weights of all queries in the classification loss


class SetCriterion(nn.Module):
    """Matches queries to segments and computes the weighted losses (Mask2Former, section 3.3 and appendix).

    Args:
        num_classes: K, without "no object".
        class_weight: of classification, in loss and matching; `mask_weight` and `dice_weight` of their losses.
        no_object_weight: of unmatched queries in the classification loss.
        weight_by_class: of matched queries in the classification loss, by class index; None for 1 each.
        num_points: P, at which masks are compared; see `choose_uncertain_points` for the two ratios.
        rand: draws all points: the matcher's, then those of `choose_uncertain_points` layer by layer.

    Raises:
        UserError: a number is out of its range.
    """

    no_object_weighting: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        weight_by_class: Sequence[float] | None = None,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        rand: UniformSource = uniform,
    ) -> None:
        super().__init__()
        if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
            raise UserError(
                f"num_points={num_points}, oversample_ratio={oversample_ratio}, importance_sample_ratio="
                f"{importance_sample_ratio}: choose at least 1, at least 1, and 0 to 1 (the paper: 12544, 3 and 0.75)"
            )
        self.num_classes = num_classes
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.no_object_weight = no_object_weight
        self.sampling = (num_points, oversample_ratio, importance_sample_ratio, rand)
        self.matcher = HungarianMatcher(class_weight, mask_weight, dice_weight, num_points, rand)
        self.weight_by_class = None if weight_by_class is None else list(weight_by_class)
        weights = torch.ones(num_classes + 1)
        if self.weight_by_class is not None:
            weights[:-1] = torch.tensor(self.weight_by_class)
        weights[-1] = no_object_weight
        self.register_buffer("no_object_weighting", weights, persistent=False)

    def totals(self, targets: Sequence[Target], num_queries: int, device: torch.device) -> LossTotals:
        """Count for all images of the step in this process, then over all processes, without waiting for the device."""
        counts = [len(target.labels) for target in targets]
        matched = sum(min(count, num_queries) for count in counts)
        unmatched = len(targets) * num_queries - matched
        of_matched = float(matched)
        if self.weight_by_class is not None:
            of_matched = sum(self._weight_of_matched(target.labels.tolist(), num_queries) for target in targets)
        own = (float(sum(counts)), of_matched + self.no_object_weight * unmatched)
        # Numbers become arguments of kernels; a tensor made of them on the host would have to be copied.
        total = torch.stack([torch.full((), n, device=device) for n in own])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return LossTotals(total[0].clamp(min=1), total[1])

    def _weight_of_matched(self, labels: Sequence[int], num_queries: int) -> float:
        """Of an image's segments; if there are more than queries, of as many average ones."""
        assert self.weight_by_class is not None
        total = sum(self.weight_by_class[label] for label in labels)
        return total * min(1.0, num_queries / max(len(labels), 1))

    def forward(
        self, predictions: Predictions, targets: list[Target], totals: LossTotals | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute all losses, in float32 whatever the predictions' type and the autocast state.

        Args:
            predictions: of the last layer, with the others in `auxiliary`.
            targets: one per image, masks of the padded images' size; no segments and empty segments are fine.
            totals: of the whole step, if these are only some of its images.

        Returns:
            Weighted "loss_ce", "loss_mask" and "loss_dice" of the last layer, and with "_0", ... those of `auxiliary`.
        """
        layers = (predictions, *predictions.auxiliary)
        pairs = _gather_pairs(self.matcher(layers, targets), targets, predictions.mask_logits.device)
        if totals is None:
            totals = self.totals(targets, predictions.class_logits.shape[1], predictions.class_logits.device)
        cross_entropy = self._classification_loss(layers, targets, pairs) / totals.class_weight
        mask, dice = (loss / totals.masks for loss in self._mask_losses(layers, targets, pairs))
        weighted = {
            "loss_ce": self.class_weight * cross_entropy,
            "loss_mask": self.mask_weight * mask,
            "loss_dice": self.dice_weight * dice,
        }
        suffixes = ["", *(f"_{i}" for i in range(len(predictions.auxiliary)))]
        return {name + suffix: loss[i] for i, suffix in enumerate(suffixes) for name, loss in weighted.items()}

    def _classification_loss(
        self, layers: Sequence[Predictions], targets: Sequence[Target], pairs: Pairs
    ) -> Float[Tensor, " layers"]:
        """Sum over all queries; the target of unmatched ones is "no object"."""
        logits = torch.stack([layer.class_logits.float() for layer in layers])  # L B Q K+1
        labels = logits.new_full(logits.shape[:3], self.num_classes, dtype=torch.long)  # L B Q
        labels[pairs.layers, pairs.images, pairs.queries] = torch.cat([t.labels for t in targets])[pairs.segments]
        loss = F.cross_entropy(logits.permute(0, 3, 1, 2), labels, self.no_object_weighting, reduction="none")
        return loss.sum((1, 2))

    def _mask_losses(
        self, layers: Sequence[Predictions], targets: Sequence[Target], pairs: Pairs
    ) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
        """Binary cross-entropy and dice loss of the matched masks, at points chosen for each."""
        L, M = pairs.queries.shape
        P = self.sampling[0]
        logits = _matched_masks(layers, pairs)
        # One layer at a time, because the candidates are many times the points that are kept.
        points = torch.cat([choose_uncertain_points(layer, *self.sampling) for layer in logits.detach()])  # L*M P 2
        sampled = sample_points(logits.flatten(0, 1)[:, None], points).squeeze(1)  # L*M P

        # Each target mask is read once, at the points of all layers.
        masks = torch.cat([t.masks for t in targets])
        row = (pairs.segments * L + pairs.layers).flatten()  # of a pair, among all segments' layers
        by_segment = points.new_zeros(len(masks) * L, P, 2).index_copy_(0, row, points)
        expected = sample_masks(masks, by_segment.view(len(masks), L * P, 2)).view(-1, P).index_select(0, row)

        cross_entropy = F.binary_cross_entropy_with_logits(sampled, expected, reduction="none").mean(1)
        dice = dice_loss(sampled, expected)
        return cross_entropy.view(L, M).sum(1), dice.view(L, M).sum(1)


def dice_loss(logits: Float[Tensor, "rows points"], target: Float[Tensor, "rows points"]) -> Float[Tensor, " rows"]:
    """One minus the soft Dice coefficient; the 1 in numerator and denominator allows for empty masks."""
    probability = logits.sigmoid()
    overlap = (probability * target).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + target.sum(1) + 1)


def _matched_masks(layers: Sequence[Predictions], pairs: Pairs) -> Float[Tensor, "layers pairs H W"]:
    """Mask logits of the matched queries in float32, from their factors if given: other masks need no gradient."""
    factors = [layer.mask_factors for layer in layers if layer.mask_factors is not None]
    if len(factors) < len(layers):
        chosen = zip(layers, pairs.images, pairs.queries, strict=True)
        return torch.stack([layer.mask_logits[images, queries].float() for layer, images, queries in chosen])
    features = factors[0].features
    embeddings = torch.stack([factor.embeddings for factor in factors]).to(features.dtype)  # L B Q C
    rows = embeddings[pairs.layers, pairs.images, pairs.queries]  # L M C
    # Matrices of channels and pixels, which are no copies whatever the memory format.
    matrices = features.flatten(2) if features.is_contiguous() else features.permute(0, 2, 3, 1).flatten(1, 2).mT
    with torch.autocast(features.device.type, enabled=False):
        of_images = zip(rows.split(pairs.counts, dim=1), matrices, strict=True)
        masks = torch.cat([of_image @ matrix for of_image, matrix in of_images], dim=1)
    return masks.unflatten(2, features.shape[2:]).float()


def _gather_pairs(matches: list[list[Match]], targets: Sequence[Target], device: torch.device) -> Pairs:
    """Concatenate the images' matches on the host, so that one copy brings them to the device."""
    first_segments = accumulate((len(target.labels) for target in targets[:-1]), initial=0)
    images, queries, segments = [], [], []
    for image, first in enumerate(first_segments):
        of_layers = [match[image] for match in matches]
        queries.append(torch.stack([match.queries for match in of_layers]))
        segments.append(torch.stack([match.segments for match in of_layers]) + first)
        images.append(torch.full_like(queries[-1], image))
    rows = torch.stack([torch.cat(images, 1), torch.cat(queries, 1), torch.cat(segments, 1)])  # 3 L M
    if device.type == "cuda":
        rows = rows.pin_memory()  # a copy from any other memory may wait for the device
    layers = torch.arange(len(matches), device=device)[:, None]
    counts = tuple(of_image.shape[1] for of_image in queries)
    images_, queries_, segments_ = rows.to(device, non_blocking=True)
    return Pairs(layers, images_, queries_, segments_, counts)
