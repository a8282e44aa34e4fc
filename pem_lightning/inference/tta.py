"""Test-time augmentation: one image seen at several sizes and mirrored, and one result made from all views.

Semantic scores are averaged at the output size, as Mask2Former's `SemanticSegmentorWithTTA` does. For segments and
objects, where Mask2Former has none, every view's queries are first paired with those of one view, the base.

Q queries, K classes, H W spatial, h w spatial at a quarter of the padded size; no letter for the batch, which is 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pem_lightning.errors import UserError
from pem_lightning.inference.postprocess import Size, semantic
from pem_lightning.inference.task import Result, TaskInference, size_of
from pem_lightning.types import Predictions

Network = Callable[[Tensor], Predictions]
"""Normalised images [B, 3, H, W] -> predictions; anything with PEM's interface."""


class View(NamedTuple):
    """What the network said to one version of the image.

    Attributes:
        class_logits: of its only image.
        mask_logits: of its only image, as the network saw it: mirrored if it was.
        image_size: of the version, without padding.
        flipped: whether it was mirrored.
    """

    class_logits: Float[Tensor, "Q classes_and_none"]
    mask_logits: Float[Tensor, "Q h w"]
    image_size: Size
    flipped: bool


class TestTimeAugmentation:
    """Stands between a network and the post-processing of a task.

    With the only scale 1 and no flip it does nothing else than calling both. Views are computed one after the other;
    beside the current one only the running means are held.

    Args:
        inference: what makes the result of the task.
        scales: sizes of the views, relative to that of the image. The largest is the base, because its masks have the
            finest grid: the others lose no detail when they are brought to it.
        flip: see every size also mirrored.

    Raises:
        UserError: there is no scale, or one is not above 0.
    """

    __test__ = False  # pytest takes it for a test by its name

    def __init__(self, inference: TaskInference, scales: Sequence[float] = (1.0,), flip: bool = False) -> None:
        if not scales or min(scales) <= 0:
            raise UserError(f"inference.scales={list(scales)}: give one or more numbers above 0, e.g. [0.75,1.0,1.25]")
        self.inference = inference
        self.scales = sorted(scales, reverse=True)
        self.flip = flip

    def __call__(
        self, network: Network, images: Float[Tensor, "1 3 H W"], output_size: Size, *, with_semantic: bool = False
    ) -> Result:
        """Process one image.

        Args:
            network: is called once for every view.
            images: normalised. Resizing them, bilinear and antialiased like Pillow's, gives what normalising resized
                images gives, but for Pillow's rounding to bytes.
            output_size: height and width of the wanted result.
            with_semantic: fill `Result.semantic` whatever the task.
        """
        if self.scales == [1.0] and not self.flip:
            return self.inference(network(images), size_of(images), output_size, with_semantic=with_semantic)
        scores: Tensor | None = None
        mean: _MeanPredictions | None = None
        with_queries = self.inference.task != "semantic"
        for view in self._views(network, images):
            if with_semantic or not with_queries:
                scores = self._semantic(view, output_size) + (0 if scores is None else scores)
            if with_queries:
                mean = mean or _MeanPredictions(view)
                mean.add(view)
        result = Result()
        if mean is not None:
            result = self.inference(mean.predictions(), mean.image_size, output_size)
        # the sum has the argmax of the mean
        return result if scores is None else result._replace(semantic=scores.argmax(0))

    def _views(self, network: Network, images: Float[Tensor, "1 3 H W"]) -> Iterator[View]:
        """The largest first, as it is."""
        height, width = size_of(images)
        for scale in self.scales:
            size = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
            resized = images
            if size != (height, width):
                resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
            for flipped in (False, True) if self.flip else (False,):
                predictions = network(resized.flip(-1) if flipped else resized)
                yield View(predictions.class_logits[0], predictions.mask_logits[0], size, flipped)

    def _semantic(self, view: View, output_size: Size) -> Float[Tensor, "K H W"]:
        height, width = size_of(view.mask_logits)
        scores = semantic(
            view.class_logits,
            view.mask_logits,
            padded_size=(4 * height, 4 * width),
            image_size=view.image_size,
            output_size=output_size,
            resize_first=self.inference.resize_first,
        )
        return scores.flip(-1) if view.flipped else scores


class _MeanPredictions:
    """The running mean of class and mask probabilities, in the order and at the size of the base view's queries.

    Means are kept as logarithms: a probability that rounds to 0 or 1 would lose its logit.
    """

    def __init__(self, base: View) -> None:
        self.base = base
        self.image_size = base.image_size
        self._classes = torch.full_like(base.class_logits, -torch.inf, dtype=torch.float32)
        self._inside = torch.full_like(base.mask_logits, -torch.inf, dtype=torch.float32)
        self._outside = self._inside.clone()

    def add(self, view: View) -> None:
        """Bring a view's queries in order and add their probabilities."""
        masks = _masks_at(view, self.base)
        order = _pair(self.base.class_logits.float(), self.base.mask_logits.float(), view.class_logits.float(), masks)
        masks = masks[order]
        self._classes = torch.logaddexp(self._classes, view.class_logits[order].float().log_softmax(-1))
        self._inside = torch.logaddexp(self._inside, F.logsigmoid(masks))
        self._outside = torch.logaddexp(self._outside, F.logsigmoid(-masks))

    def predictions(self) -> Predictions:
        """The means as logits, ready for the ordinary post-processing."""
        # softmax and sigmoid of these are the means: a common factor, the number of views, drops out
        return Predictions(self._classes[None], (self._inside - self._outside)[None])


def _pair(
    base_classes: Float[Tensor, "Q classes_and_none"],
    base_masks: Float[Tensor, "Q h w"],
    classes: Float[Tensor, "Q classes_and_none"],
    masks: Float[Tensor, "Q h w"],
) -> Int64[Tensor, " Q"]:
    """Which query of a view belongs to each of the base view's, by Hungarian matching.

    Two queries are alike by the Bhattacharyya coefficient of their class probabilities plus the Dice coefficient of
    their mask probabilities; both are 1 for equals and only for them.
    """
    with torch.autocast(masks.device.type, enabled=False):  # sums over so many cells overflow float16
        alike = base_classes.softmax(-1).sqrt() @ classes.softmax(-1).sqrt().T
        a, b = base_masks.sigmoid().flatten(1), masks.sigmoid().flatten(1)
        alike += 2 * (a @ b.T) / (a.square().sum(1)[:, None] + b.square().sum(1)).clamp(min=1e-6)
    _, order = linear_sum_assignment(alike.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(classes.device)


def _masks_at(view: View, base: View) -> Float[Tensor, "Q h w"]:
    """A view's mask logits where the base's are, turned back and resized bilinearly."""
    masks = view.mask_logits.float()
    for axis, length in enumerate(size_of(base.mask_logits), start=1):
        # Centres of the base's cells, 4 pixels wide; first in its pixels, then in the view's, then in the view's cells.
        centers = 4 * torch.arange(length, device=masks.device, dtype=torch.float64) + 2
        own, others = base.image_size[axis - 1], view.image_size[axis - 1]
        if view.flipped != base.flipped and axis == 2:
            centers = own - centers
        masks = _sample(masks, axis, centers * others / own / 4 - 0.5)
    return masks


def _sample(maps: Float[Tensor, "Q _ _"], axis: int, places: Float[Tensor, " length"]) -> Float[Tensor, "Q _ _"]:
    """Values between the cells of an axis, linearly; beyond its ends those of the ends."""
    last = maps.shape[axis] - 1
    places = places.clamp(0, last)
    left = places.long()
    weight = (places - left).to(maps.dtype)
    weight = weight[:, None] if axis == 1 else weight
    right = (left + 1).clamp(max=last)
    return torch.lerp(maps.index_select(axis, left), maps.index_select(axis, right), weight)
