"""Test-time augmentation: one image seen at several sizes and mirrored, and one result made from all views.

Semantic scores are averaged at the output size, as Mask2Former's `SemanticSegmentorWithTTA` does. For segments and
objects, where Mask2Former has none, every view's queries are first paired with those of one view, the base.

Legend: B batch, Q queries, K classes, H W spatial, h w spatial at a quarter of the padded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pem_lightning.inference.postprocess import Result, Size, TaskInference, semantic, size_of
from pem_lightning.types import Predictions, UserError

Network = Callable[[Tensor], Predictions]
"""Normalised images [B, 3, H, W] -> predictions; anything with PEM's interface."""


class View(NamedTuple):
    """What the network said to one version of an image.

    Attributes:
        class_logits: of its queries.
        mask_logits: as the network saw the image: mirrored if it was.
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
        self, network: Network, images: Float[Tensor, "B 3 H W"], output_size: Size, *, with_semantic: bool = False
    ) -> list[Result]:
        """Process images of one size.

        Args:
            network: is called once for every view.
            images: normalised. Resizing them, bilinear and antialiased like Pillow's, gives what normalising resized
                images gives, but for Pillow's rounding to bytes.
            output_size: height and width of the wanted results.
            with_semantic: fill `Result.semantic` whatever the task.
        """
        if self.scales == [1.0] and not self.flip:
            return [
                self.inference(Predictions(*one), size_of(images), output_size, with_semantic=with_semantic)
                for one in _one_by_one(network(images))
            ]
        means = [_Mean(self.inference, output_size, with_semantic) for _ in images]
        height, width = size_of(images)
        for scale in self.scales:
            size = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
            resized = images
            if size != (height, width):
                resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
            for flipped in (False, True) if self.flip else (False,):
                predictions = network(resized.flip(-1) if flipped else resized)
                for mean, (classes, masks) in zip(means, _one_by_one(predictions), strict=True):
                    mean.add(View(classes[0], masks[0], size, flipped))
        return [mean.result() for mean in means]


def _one_by_one(predictions: Predictions) -> Iterator[tuple[Tensor, Tensor]]:
    """Class and mask logits of batches of one."""
    return zip(predictions.class_logits.split(1), predictions.mask_logits.split(1), strict=True)


class _Mean:
    """The running mean over the views of one image, of which the first is the base.

    Class and mask probabilities are in the order and at the size of its queries. Their means are kept as logarithms:
    a probability that rounds to 0 or 1 would lose its logit. The common factor, one over the number of views, is left
    out; it changes neither softmax and sigmoid nor the class of the highest score.
    """

    def __init__(self, inference: TaskInference, output_size: Size, with_semantic: bool) -> None:
        self.inference = inference
        self.output_size = output_size
        self.with_queries = inference.task != "semantic"
        self.with_scores = with_semantic or not self.with_queries
        self._base: View | None = None
        self._scores: Float[Tensor, "K H W"] | None = None
        self._classes: Float[Tensor, "Q classes_and_none"]
        self._inside: Float[Tensor, "Q h w"]
        self._outside: Float[Tensor, "Q h w"]

    def add(self, view: View) -> None:
        """Take one view in."""
        if self.with_scores:
            scores = self._semantic(view)
            self._scores = scores if self._scores is None else self._scores.add_(scores)
        if not self.with_queries:
            return
        if self._base is None:
            self._base = view
            self._classes = view.class_logits.float().log_softmax(-1)
            masks = view.mask_logits.float()
            self._inside, self._outside = F.logsigmoid(masks), F.logsigmoid(-masks)
            return
        masks = _masks_at(view, self._base)
        order = _pair(self._base.class_logits, self._base.mask_logits, view.class_logits, masks)
        masks = masks[order]
        self._classes = torch.logaddexp(self._classes, view.class_logits[order].float().log_softmax(-1))
        self._inside = torch.logaddexp(self._inside, F.logsigmoid(masks))
        self._outside = torch.logaddexp(self._outside, F.logsigmoid(-masks))

    def result(self) -> Result:
        """What the task's post-processing makes of the means."""
        result = Result()
        if self._base is not None:
            predictions = Predictions(self._classes[None], (self._inside - self._outside)[None])
            result = self.inference(predictions, self._base.image_size, self.output_size)
        return result if self._scores is None else result._replace(semantic=self._scores.argmax(0).int())

    def _semantic(self, view: View) -> Float[Tensor, "K H W"]:
        height, width = size_of(view.mask_logits)
        scores = semantic(
            view.class_logits,
            view.mask_logits,
            padded_size=(4 * height, 4 * width),
            image_size=view.image_size,
            output_size=self.output_size,
            resize_first=self.inference.resize_first,
        )
        return scores.flip(-1) if view.flipped else scores


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
    base_classes, base_masks, classes = base_classes.float(), base_masks.float(), classes.float()
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
