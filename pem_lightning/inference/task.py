"""From the network's predictions to the result of a task."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, TypedDict

from jaxtyping import Int32
from torch import Tensor

from pem_lightning.inference.postprocess import Instance, Size, instances, panoptic, semantic_map
from pem_lightning.types import Predictions, Segment


class Sizes(TypedDict):
    """The sizes between which post-processing moves masks."""

    padded_size: Size
    image_size: Size
    output_size: Size


def size_of(x: Tensor) -> Size:
    """Height and width, the last two axes."""
    height, width = x.shape[-2:]
    return height, width


class Result(NamedTuple):
    """What was found in one image; fields that the task does not fill are empty.

    Attributes:
        semantic: class index of every pixel.
        panoptic: segment id of every pixel, `VOID_ID` where no segment is.
        segments: what the ids mean.
        instances: objects, which may overlap.
    """

    semantic: Int32[Tensor, "height width"] | None = None
    panoptic: Int32[Tensor, "height width"] | None = None
    segments: tuple[Segment, ...] = ()
    instances: tuple[Instance, ...] = ()

    def cpu(self) -> Result:
        """The same on the CPU."""
        return self._replace(
            semantic=None if self.semantic is None else self.semantic.cpu(),
            panoptic=None if self.panoptic is None else self.panoptic.cpu(),
            instances=tuple(i._replace(mask=i.mask.cpu()) for i in self.instances),
        )


class TaskInference:
    """Post-processing with a task's settings.

    Args:
        task: "panoptic", "semantic" or "instance".
        thing_classes: the classes whose objects are separate segments.
        resize_first: see `postprocess.semantic`.
        object_mask_threshold: see `postprocess.panoptic`.
        overlap_threshold: see `postprocess.panoptic`.
        top_k: see `postprocess.instances`.
    """

    def __init__(
        self,
        task: str,
        thing_classes: Collection[int],
        *,
        resize_first: bool = True,
        object_mask_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        top_k: int = 100,
    ) -> None:
        self.task = task
        self.thing_classes = frozenset(thing_classes)
        self.resize_first = resize_first
        self.object_mask_threshold = object_mask_threshold
        self.overlap_threshold = overlap_threshold
        self.top_k = top_k

    def __call__(
        self, predictions: Predictions, image_size: Size, output_size: Size, *, with_semantic: bool = False
    ) -> Result:
        """Process one image.

        Args:
            predictions: of a batch of one image.
            image_size: height and width of what the network was given.
            output_size: height and width of the wanted result.
            with_semantic: fill `Result.semantic` whatever the task.
        """
        class_logits, mask_logits = predictions.class_logits[0], predictions.mask_logits[0]
        height, width = size_of(mask_logits)
        at = Sizes(padded_size=(4 * height, 4 * width), image_size=image_size, output_size=output_size)
        result = Result()
        if with_semantic or self.task == "semantic":
            class_map = semantic_map(class_logits, mask_logits, resize_first=self.resize_first, **at)
            result = result._replace(semantic=class_map)
        if self.task == "panoptic":
            id_map, segments = panoptic(
                class_logits,
                mask_logits,
                thing_classes=self.thing_classes,
                object_mask_threshold=self.object_mask_threshold,
                overlap_threshold=self.overlap_threshold,
                **at,
            )
            result = result._replace(panoptic=id_map, segments=tuple(segments))
        if self.task == "instance":
            found = instances(class_logits, mask_logits, thing_classes=self.thing_classes, top_k=self.top_k, **at)
            result = result._replace(instances=tuple(found))
        return result
