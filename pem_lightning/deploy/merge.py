"""Logits to maps inside the exported graph, for programs that have no code for it. The rules of `postprocess`.

All masks are held at the image's size, so this takes more memory and time than `postprocess`.

Legend: B batch, Q queries, K classes, M kept queries, N segments, H W the image, h w a quarter of the padded size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, UInt8
from torch import Tensor, nn

from pem_lightning.inference.fast_argmax import STRIDE
from pem_lightning.types import VOID_ID, UserError

OUTPUTS = {"semantic": ("classes",), "panoptic": ("panoptic", "segments"), None: ("class_logits", "mask_logits")}
"""Names of a file's outputs by its results."""


class SemanticGraph(nn.Module):
    """A graph of logits, and `semantic_map` after it."""

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: UInt8[Tensor, "B H W 3"]) -> tuple[Int32[Tensor, "B H W"]]:
        """Return the class of every pixel."""
        class_logits, mask_logits = self.logits(images)
        weights = class_logits.softmax(-1)[:, :, :-1].transpose(1, 2)  # B K Q
        masks = _at_image_size(mask_logits, images).sigmoid()
        scores = weights @ masks.flatten(2)
        return (scores.argmax(1).to(torch.int32).unflatten(1, (images.shape[1], images.shape[2])),)


class PanopticGraph(nn.Module):
    """A graph of logits, and `panoptic` after it; for one image at once.

    Args:
        logits: the graph before.
        thing_classes, object_mask_threshold, overlap_threshold: see `postprocess.panoptic`.
        num_classes: K.
    """

    is_thing: Tensor

    def __init__(
        self,
        logits: nn.Module,
        thing_classes: Collection[int],
        num_classes: int,
        object_mask_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
    ) -> None:
        super().__init__()
        self.logits, self.overlap_threshold = logits, overlap_threshold
        self.object_mask_threshold = object_mask_threshold
        things = torch.tensor([i in thing_classes for i in range(num_classes + 1)])
        self.register_buffer("is_thing", things, persistent=False)

    def forward(
        self, images: UInt8[Tensor, "1 H W 3"]
    ) -> tuple[Int32[Tensor, "H W"], Float[Tensor, "N id_class_score"]]:
        """Return segment ids, 0 where no segment is, and of every segment the id, the class and the score."""
        class_logits, mask_logits = self.logits(images)
        none = class_logits.shape[2] - 1
        scores, labels = class_logits[0].softmax(-1).max(-1)
        certain = (labels != none) & (scores > self.object_mask_threshold)
        first = torch.arange(class_logits.shape[1], device=images.device) == 0
        kept = (certain | first).nonzero().squeeze(1)  # the first query keeps lists from being empty
        certain, scores, labels = certain[kept], scores[kept], labels[kept]  # M
        probability = _at_image_size(mask_logits[:, kept], images)[0].sigmoid()  # M H W
        own = probability >= 0.5
        # A query that is not certain never wins against one that is.
        winner = (probability * torch.where(certain, scores, -1.0)[:, None, None]).argmax(0)
        inside = probability.gather(0, winner[None]) >= 0.5  # 1 H W, whether a pixel lies in its winner's own mask
        numbers = torch.arange(kept.shape[0], device=images.device)
        wins = winner == numbers[:, None, None]
        won, whole, visible = (x.sum((1, 2), dtype=torch.int32).float() for x in (wins, own, wins & inside))
        good = certain & (visible > 0) & (won / whole >= self.overlap_threshold)

        # Stuff of one class is one segment, which its first query opens.
        same = (labels == labels[:, None]) & good  # M M
        opened_by = torch.where(self.is_thing[labels], numbers, same.to(torch.int32).argmax(1))
        opens = good & (opened_by == numbers)
        ids = torch.where(good, opens.to(torch.int32).cumsum(0)[opened_by], VOID_ID).to(torch.int32)
        table = torch.stack((ids.float(), labels.float(), scores), dim=1)
        return torch.where(inside[0], ids[winner], VOID_ID), table[opens.nonzero().squeeze(1)]


def merge(
    logits: nn.Module,
    results: str | None,
    *,
    thing_classes: Collection[int],
    num_classes: int,
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> nn.Module:
    """Add to a graph of logits what gives `results`; None leaves it as it is.

    Raises:
        UserError: the results are unknown.
    """
    if results is None:
        return logits
    if results == "semantic":
        return SemanticGraph(logits)
    if results == "panoptic":
        return PanopticGraph(logits, thing_classes, num_classes, object_mask_threshold, overlap_threshold)
    raise UserError(f"results={results}: choose false, panoptic or semantic")


def _at_image_size(mask_logits: Float[Tensor, "B M h w"], images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B M H W"]:
    full = F.interpolate(mask_logits, scale_factor=float(STRIDE), mode="bilinear", align_corners=False)
    return full[:, :, : images.shape[1], : images.shape[2]]
