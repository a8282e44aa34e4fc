"""Average precision of instance masks by COCO's evaluator, and a score for single images. K classes, H W spatial."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int32, Int64
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pem_lightning.types import Segment

Detection = tuple[Bool[Tensor, "H W"], int, float]
"""Mask, class and score of one predicted object."""


class Precisions(NamedTuple):
    """Average precisions in [0, 1]: the mean over IoU 0.50, 0.55, ..., 0.95, at 0.50, at 0.75, and the mean for objects
    up to 32², up to 96² and from 96² pixels on. NaN where nothing is annotated."""

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float


class AveragePrecisionResult(NamedTuple):
    """Means over the classes that have annotated objects; by class; and how many objects there are, without crowds."""

    all: Precisions
    by_class: tuple[Precisions, ...]
    num_objects: Int64[np.ndarray, " K"]


class AveragePrecision(Metric):
    """COCO's mask AP over a data set (`pycocotools.cocoeval`), the same with any number of processes.

    The 100 most confident objects per image and class count; crowds are neither found nor missed; void does not excuse
    a wrong prediction. The area of an annotated object is its pixels; one without pixels is left out.

    Do not compare with Cityscapes' AP: its evaluator has no limit of 100, ignores small objects and predictions in
    void, and integrates the precision without COCO's 101 recall levels.
    """

    full_state_update = False
    higher_is_better = True

    lines: list[Tensor]
    """A line of JSON per image, with masks as run lengths, in bytes: processes exchange tensors."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("lines", [], dist_reduce_fx="cat")

    def update(
        self,
        instances: Iterable[Detection],
        gt_map: Int32[Tensor, "H W"],
        gt_segments: Sequence[Segment],
        name: str,
    ) -> None:
        """Add one image with a unique name; equal scores are ranked in the order of the names. Stuff is left out."""
        detected: list[dict[str, Any]] = [
            {"category_id": k, "score": score, "segmentation": _run_lengths(mask)} for mask, k, score in instances
        ]
        things = [(gt_map == s.id, s) for s in gt_segments if s.is_thing]
        true: list[dict[str, Any]] = [
            {"category_id": s.class_id, "iscrowd": int(s.is_crowd), "segmentation": _run_lengths(mask)}
            for mask, s in things
            if mask.any()
        ]
        line = json.dumps({"name": name, "size": list(gt_map.shape), "detected": detected, "true": true}) + "\n"
        self.lines.append(torch.frombuffer(bytearray(line.encode()), dtype=torch.uint8).to(self.device))

    def compute(self) -> AveragePrecisionResult:
        """AP per class and averaged over the classes that have annotated objects."""
        lines = dim_zero_cat(self.lines).cpu().numpy().tobytes().splitlines() if len(self.lines) else []
        images = sorted((json.loads(line) for line in lines), key=lambda image: image["name"])
        objects = [entry["category_id"] for image in images for entry in image["true"] if not entry["iscrowd"]]
        num_objects = np.bincount(np.array(objects, np.int64), minlength=self.num_classes)
        classes = np.flatnonzero(num_objects).tolist()
        nothing = Precisions(*[float("nan")] * len(Precisions._fields))
        by_class = [nothing] * self.num_classes
        if not classes:
            return AveragePrecisionResult(nothing, tuple(by_class), num_objects)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
            evaluation = COCOeval(_coco(images, classes, "true"), _coco(images, classes, "detected"), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][..., -1]  # with up to 100 objects per image and class
        for index, class_id in enumerate(classes):
            by_class[class_id] = _average(precision[:, :, [index]])
        return AveragePrecisionResult(_average(precision), tuple(by_class), num_objects)


def _run_lengths(mask: Bool[Tensor, "H W"]) -> dict[str, Any]:
    """COCO's compressed encoding, as JSON holds it."""
    encoded = coco_mask.encode(np.asfortranarray(mask.cpu().numpy()).view(np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def _coco(images: list[dict[str, Any]], classes: list[int], which: str) -> COCO:
    """What COCO's evaluator takes, without a file."""
    coco = COCO()
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images):
        for entry in image[which]:
            more = {"id": len(annotations) + 1, "image_id": image_id}  # an id of 0 would mean "without a match"
            annotations.append({"iscrowd": 0, **entry, **more, "area": int(coco_mask.area(entry["segmentation"]))})
    sizes = [{"id": i, "height": image["size"][0], "width": image["size"][1]} for i, image in enumerate(images)]
    coco.dataset = {"images": sizes, "annotations": annotations, "categories": [{"id": k} for k in classes]}
    coco.createIndex()
    return coco


def _average(precision: Float64[np.ndarray, "thresholds recalls classes areas"]) -> Precisions:
    """Means over what is annotated (the rest is -1); areas are all, small, medium, large."""

    def mean(part: np.ndarray) -> float:
        valid = part[part > -1]
        return float(valid.mean()) if valid.size else float("nan")

    every, small, medium, large = (precision[..., area] for area in range(4))
    return Precisions(mean(every), mean(every[0]), mean(every[5]), mean(small), mean(medium), mean(large))


def instance_f1(instances: Iterable[Detection], gt_map: Int32[Tensor, "H W"], gt_segments: Sequence[Segment]) -> float:
    """F1 score of the objects found in a single image, 2 TP / (2 TP + FP + FN), in [0, 1]; NaN without any object.

    AP looks at the ranking over a whole data set and says little about one image. Here the objects that pictures show
    are matched as in COCO at IoU 0.5: the most confident first, each with the free object of its class that it covers
    best. Predictions with a score below 0.5, or of which at least half lies in their class's crowd, do not count.
    """
    things = {s.id: s for s in gt_segments if s.is_thing}
    areas = {i: n for i, n in _counts(gt_map).items() if i in things}
    free = {i for i in areas if not things[i].is_crowd}
    num_true, hits, wrong = len(free), 0, 0
    confident = (d for d in instances if d[2] >= 0.5)
    for mask, class_id, _ in sorted(confident, key=lambda detection: -detection[2]):
        pixels = _counts(gt_map[mask.to(gt_map.device)])
        area = sum(pixels.values())
        shared = {i: n for i, n in pixels.items() if i in areas and things[i].class_id == class_id}
        ious = {i: n / (area + areas[i] - n) for i, n in shared.items() if i in free}
        best = max(ious, key=lambda i: ious[i], default=None)
        if best is not None and ious[best] >= 0.5:
            free.remove(best)
            hits += 1
        elif not area or sum(n for i, n in shared.items() if things[i].is_crowd) < area / 2:
            wrong += 1
    total = hits + wrong + num_true
    return 2 * hits / total if total else float("nan")


def _counts(ids: Int32[Tensor, "*size"]) -> dict[int, int]:
    """Pixels by id."""
    values, counts = ids.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
