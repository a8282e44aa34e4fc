"""The training loss of PEM, which is Mask2Former's: classification, mask cross-entropy and dice, at every layer.

Legend: L decoder layers (the last one first), B batch, Q queries, K classes, M matched pairs of a layer, H W spatial,
P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
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
from pem_lightning.training.distributed import mean_over_processes
from pem_lightning.types import Predictions, Target, UserError


class Pairs(NamedTuple):
    """Matched queries and segments of all layers, on the device, image by image.

    Attributes:
        layers: index of the layer.
        images: index of the image.
        queries: index of the query in its image.
        segments: index of the segment among those of all images.
        counts: how many pairs every image has, the same in all layers.
    """

    layers: Int64[Tensor, "layers #pairs"]
    images: Int64[Tensor, "layers pairs"]
    queries: Int64[Tensor, "layers pairs"]
    segments: Int64[Tensor, "layers pairs"]
    counts: tuple[int, ...]


class LossTotals(NamedTuple):
    """What the losses of a step are divided by, as shares of one process: over all processes they average to these.

    Gradients of processes are averaged, so that their sum over the whole step is divided by the whole step's total.
    The authors divide the mask losses so, but the classification loss by each process's own total; with one process
    both are the same, and with several only the whole step's total leaves the loss independent of who has which image.

    Attributes:
        masks: segments, at least 1.
        class_weight: weights of all queries in the classification loss.
    """

    masks: Float[Tensor, ""]
    class_weight: Float[Tensor, ""]


class SetCriterion(nn.Module):
    """Matches queries to segments, then adds up the weighted losses (Mask2Former, section 3.3 and appendix).

    Args:
        num_classes: K, "no object" not counted.
        class_weight: weight of the classification loss, and of its cost in matching.
        mask_weight: weight of the masks' binary cross-entropy, likewise.
        dice_weight: weight of the masks' dice loss, likewise.
        no_object_weight: weight of queries without a segment in the classification loss.
        num_points: P, how many points masks are compared at.
        oversample_ratio: candidates per point, see `choose_uncertain_points`.
        importance_sample_ratio: share of uncertain points, see `choose_uncertain_points`.
        rand: source of all random points: the matcher's, then layer by layer, the last one first, the draws of
            `choose_uncertain_points`.

    Raises:
        UserError: if a number is out of its range.
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
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        rand: UniformSource = uniform,
    ) -> None:
        super().__init__()
        if num_points < 1:
            raise UserError(f"num_points is {num_points}; set it to at least 1 (the paper: 12544)")
        if oversample_ratio < 1:
            raise UserError(f"oversample_ratio is {oversample_ratio}; set it to at least 1 (the paper: 3)")
        if not 0 <= importance_sample_ratio <= 1:
            raise UserError(f"importance_sample_ratio is {importance_sample_ratio}; set it from 0 to 1 (paper: 0.75)")
        self.num_classes = num_classes
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.rand = rand
        self.matcher = HungarianMatcher(
            class_weight=class_weight,
            mask_weight=mask_weight,
            dice_weight=dice_weight,
            num_points=num_points,
            rand=rand,
        )
        weights = torch.ones(num_classes + 1)
        weights[-1] = no_object_weight
        self.register_buffer("no_object_weighting", weights, persistent=False)

    def totals(self, targets: Sequence[Target], num_queries: int, device: torch.device) -> LossTotals:
        """Count what a step's losses are divided by, over all processes; the device is not waited for.

        Args:
            targets: of all of this process's images in the step.
            num_queries: Q, of an image.
            device: where the losses are.
        """
        counts = [len(target.labels) for target in targets]
        matched = sum(min(count, num_queries) for count in counts)
        unmatched = len(targets) * num_queries - matched
        own = (float(sum(counts)), matched + self.no_object_weight * unmatched)
        # Numbers become arguments of kernels; a tensor of them would be copied, and the host would wait.
        masks, class_weight = mean_over_processes(torch.stack([torch.full((), n, device=device) for n in own]))
        return LossTotals(masks.clamp(min=1), class_weight)

    def forward(
        self, predictions: Predictions, targets: list[Target], totals: LossTotals | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute all losses, in float32 whatever the predictions' type and the autocast state.

        Args:
            predictions: the network's output in training.
            targets: one per image, masks of the padded images' size. Images without segments and segments without
                pixels are fine.
            totals: of the whole step, if these are only some of its images; the losses of its parts then add up to the
                step's. None if they are all that this process has.

        Returns:
            Weighted losses, to be summed: "loss_ce", "loss_mask" and "loss_dice" of the last layer, and with "_0",
            "_1", ... those of `predictions.auxiliary` in order.
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
        """Sum of the cross-entropy over all queries; those without a segment should say "no object"."""
        logits = torch.stack([layer.class_logits.float() for layer in layers])  # L B Q K+1
        labels = logits.new_full(logits.shape[:3], self.num_classes, dtype=torch.long)  # L B Q
        labels[pairs.layers, pairs.images, pairs.queries] = torch.cat([t.labels for t in targets])[pairs.segments]
        loss = F.cross_entropy(logits.permute(0, 3, 1, 2), labels, self.no_object_weighting, reduction="none")
        return loss.sum((1, 2))

    def _mask_losses(
        self, layers: Sequence[Predictions], targets: Sequence[Target], pairs: Pairs
    ) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
        """Binary cross-entropy and dice of the matched masks, at points chosen for each."""
        L, M = pairs.queries.shape
        P = self.num_points
        logits = _matched_masks(layers, pairs)
        # Candidates are many times the points that are kept, and memory is tightest here: one layer at a time.
        points = torch.cat([self._choose_points(of_layer) for of_layer in logits.detach()])  # L*M P 2
        sampled = sample_points(logits.flatten(0, 1)[:, None], points).squeeze(1)  # L*M P

        # Targets are read mask by mask, each at the points of all layers, so that every mask is converted once.
        masks = torch.cat([t.masks for t in targets])
        row = (pairs.segments * L + pairs.layers).flatten()  # of a pair, among all segments' layers
        by_segment = points.new_zeros(len(masks) * L, P, 2).index_copy_(0, row, points)
        expected = sample_masks(masks, by_segment.view(len(masks), L * P, 2)).view(-1, P).index_select(0, row)

        cross_entropy = F.binary_cross_entropy_with_logits(sampled, expected, reduction="none").mean(1)
        dice = dice_loss(sampled, expected)
        return cross_entropy.view(L, M).sum(1), dice.view(L, M).sum(1)

    def _choose_points(self, logits: Float[Tensor, "pairs height width"]) -> Float[Tensor, "pairs points 2"]:
        return choose_uncertain_points(
            logits,
            self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
            rand=self.rand,
        )


def dice_loss(logits: Float[Tensor, "rows points"], target: Float[Tensor, "rows points"]) -> Float[Tensor, " rows"]:
    """One minus the soft Dice coefficient; the 1 in both parts of the fraction allows for empty masks."""
    probability = logits.sigmoid()
    overlap = (probability * target).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + target.sum(1) + 1)


def _matched_masks(layers: Sequence[Predictions], pairs: Pairs) -> Float[Tensor, "layers pairs H W"]:
    """Mask logits of the matched queries, in float32.

    From the factors of the masks if they are there: of the hundred masks that layers predict for an image, those
    without a segment have no gradient, and the product needs none of them.
    """
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
    on_device = rows.to(device, non_blocking=True)
    return Pairs(layers, on_device[0], on_device[1], on_device[2], counts)
