"""Hungarian matching of queries to segments (DETR; on sampled points as in Mask2Former).

Legend: L decoder layers, B batch, Q queries, K classes, N segments of an image (padded to the largest number),
H W spatial, P points.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pem_lightning.losses.point_sampling import UniformSource, sample_masks, sample_points
from pem_lightning.types import Predictions, Target

LARGEST_LOGIT = 1e4
"""Logits are cut off here: no meaningful one is larger, and costs of such logits cannot overflow when summed."""


class Match(NamedTuple):
    """The matched pairs of one image, on the CPU, in the order of the queries."""

    queries: Int64[Tensor, " pairs"]
    segments: Int64[Tensor, " pairs"]


class HungarianMatcher:
    """Finds the cheapest one-to-one assignment of queries to segments.

    The cost of a pair is the weighted sum of minus the probability of the segment's class, binary cross-entropy and
    dice loss between the masks, at P points that all pairs of an image share; float32 and always finite. All layers are
    matched with a single transfer from the device, and their points drawn at once: `[L, B, P, 2]`.
    """

    def __init__(
        self, class_weight: float, mask_weight: float, dice_weight: float, num_points: int, rand: UniformSource
    ) -> None:
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.num_points, self.rand = num_points, rand
        self._warned = False

    @torch.no_grad()
    def __call__(self, layers: Sequence[Predictions], targets: Sequence[Target]) -> list[list[Match]]:
        """Return `matches[layer][image]`, each with as many pairs as segments, or queries if these are fewer."""
        device = layers[0].mask_logits.device
        counts = [len(target.labels) for target in targets]
        labels = pad_sequence([target.labels for target in targets], batch_first=True)  # B N
        points = self.rand((len(layers), len(targets), self.num_points, 2), device)  # L B P 2
        costs, finite = [], []
        with torch.autocast(device.type, enabled=False):
            of_images = zip(targets, points.transpose(0, 1).flatten(1, 2), strict=True)
            sampled = [sample_masks(t.masks, where.expand(len(t.masks), -1, -1)) for t, where in of_images]
            target_points = pad_sequence(sampled, batch_first=True).unflatten(2, (len(layers), -1))  # B N L P
            for i, layer in enumerate(layers):
                cost, is_finite = self._cost(layer, points[i], labels, target_points[:, :, i])
                costs.append(cost)
                finite.append(is_finite)
            # The flag travels with the costs: read by itself, it would make the host wait once more.
            numbers = torch.cat([torch.stack(costs).flatten(), torch.stack(finite).all()[None].float()]).cpu()
        if not numbers[-1] and not self._warned:
            self._warned = True
            warnings.warn(
                "Predictions contain NaN or infinity. Matching goes on with finite values in their place, the loss "
                "will not be finite. If this keeps happening, lower the learning rate or train in bf16 or 32 bit.",
                RuntimeWarning,
                stacklevel=2,
            )
        matrices = numbers[:-1].view(len(layers), *costs[0].shape)
        return [
            [
                Match(*map(torch.from_numpy, linear_sum_assignment(cost[:, :n].numpy())))
                for cost, n in zip(images, counts, strict=True)
            ]
            for images in matrices
        ]

    def _cost(
        self,
        layer: Predictions,
        points: Float[Tensor, "batch points 2"],
        labels: Int64[Tensor, "batch segments"],
        target: Float[Tensor, "batch segments points"],
    ) -> tuple[Float[Tensor, "batch queries segments"], Bool[Tensor, ""]]:
        """Compute the cost of every pair, and whether the predictions are finite."""
        both = (layer.class_logits.float(), sample_points(layer.mask_logits.float(), points))
        # One pass over each; a NaN is both the smallest and the largest.
        is_finite = torch.stack([x for logits in both for x in logits.aminmax()]).isfinite().all()
        class_logits, logits = (x.nan_to_num(nan=0.0).clamp_(-LARGEST_LOGIT, LARGEST_LOGIT) for x in both)

        label_of_pair = labels[:, None].expand(-1, logits.shape[1], -1)  # B Q N
        # The loss is -log p; the cost -p is of the same scale as the masks' costs and works better.
        class_cost = -class_logits.softmax(-1).gather(2, label_of_pair)
        return (
            self.class_weight * class_cost
            + self.mask_weight * pairwise_cross_entropy(logits, target)
            + self.dice_weight * pairwise_dice(logits, target)
        ), is_finite


def pairwise_cross_entropy(
    logits: Float[Tensor, "batch queries points"], target: Float[Tensor, "batch segments points"]
) -> Float[Tensor, "batch queries segments"]:
    """Binary cross-entropy of every query with every segment, mean over the points.

    -log(1 - sigmoid(x)) = softplus(x) where the target is 0, -log sigmoid(x) = softplus(x) - x where it is 1.
    """
    softplus = F.softplus(logits)
    foreground = (softplus - logits) @ target.mT
    background = softplus @ (1 - target).mT
    return (foreground + background) / logits.shape[-1]


def pairwise_dice(
    logits: Float[Tensor, "batch queries points"], target: Float[Tensor, "batch segments points"]
) -> Float[Tensor, "batch queries segments"]:
    """Dice loss of every query with every segment; the 1 in numerator and denominator allows for empty masks."""
    probability = logits.sigmoid()
    overlap = probability @ target.mT  # B Q N
    total = probability.sum(-1)[:, :, None] + target.sum(-1)[:, None, :]
    return 1 - (2 * overlap + 1) / (total + 1)
