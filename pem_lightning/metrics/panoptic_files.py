"""Panoptic quality of prediction files against ground truth files: panopticapi's evaluation, without panopticapi."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch.utils.data import Dataset

from pem_lightning.data.coco import PanopticPairs
from pem_lightning.metrics.panoptic_quality import PanopticQuality, PanopticResult, QualityAverage
from pem_lightning.processes import WorkerLoader
from pem_lightning.types import DatasetInfo, UserError


class FilesEvaluation(NamedTuple):
    """Panoptic quality of two files, as fractions of 1; `notes` tell what does not count, or counts surprisingly."""

    info: DatasetInfo
    quality: PanopticResult
    num_images: int
    notes: tuple[str, ...]

    def groups(self) -> dict[str, QualityAverage]:
        """The averages by panopticapi's names."""
        return {"All": self.quality.all, "Things": self.quality.things, "Stuff": self.quality.stuff}

    def to_dict(self) -> dict[str, Any]:
        """The layout of panopticapi's results: "All", "Things", "Stuff" and, by category id, "per_class".

        As there, a class that does not occur has quality 0; its counts tell. A group without classes has None.
        """
        quality = self.quality
        per_class = {
            str(c.category_id): {
                "name": c.name,
                "isthing": int(c.is_thing),
                **_qualities(quality.pq_per_class[k], quality.sq_per_class[k], quality.rq_per_class[k], 0.0),
                "iou_sum": float(quality.iou_sum[k]),
                "tp": int(quality.true_positives[k]),
                "fp": int(quality.false_positives[k]),
                "fn": int(quality.false_negatives[k]),
            }
            for k, c in enumerate(self.info.classes)
        }
        groups = {
            name: {**_qualities(group.pq, group.sq, group.rq, None), "n": group.num_classes}
            for name, group in self.groups().items()
        }
        return {**groups, "per_class": per_class, "images": self.num_images, "notes": list(self.notes)}


def _qualities(pq: float, sq: float, rq: float, undefined: float | None) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: undefined if x != x else float(x) for name, x in (("pq", pq), ("sq", sq), ("rq", rq))}


def evaluate_panoptic_files(
    gt_json: str | Path,
    pred_json: str | Path,
    gt_folder: str | Path | None = None,
    pred_folder: str | Path | None = None,
    workers: int = 0,
) -> FilesEvaluation:
    """Compare two files in the COCO panoptic format by panopticapi's rules; shows a progress bar.

    As in panopticapi, areas of true segments are the JSON's, and those of predictions their pixels. Where the JSON has
    no areas, which panopticapi does not accept, pixels are counted. Predicted images that the ground truth does not
    have are ignored. PNGs are by default in the folder named like the JSON. The number of worker processes does not
    change the result; 0 works in this one.

    Raises:
        UserError: a file is missing or broken, or the two do not fit each other.
    """
    folders = (Path(folder) if folder else None for folder in (gt_folder, pred_folder))
    pairs = PanopticPairs(Path(gt_json), Path(pred_json), *folders)
    loader = WorkerLoader(_Scores(pairs), batch_size=None, num_workers=min(workers, len(pairs)), collate_fn=_unchanged)
    total: PanopticQuality | None = None
    stale, unlisted = 0, 0
    for score in track(loader, "Comparing", len(pairs), transient=True):
        if isinstance(score, UserError):
            raise score
        metric, stale_areas, has_unlisted = score
        if total is None:
            total = metric
        else:
            total.merge_state(metric)
        stale += stale_areas
        unlisted += has_unlisted
    assert total is not None  # there is at least one pair
    notes = list(pairs.notes)
    if stale:
        notes.append(f"{gt_json}: {stale} segment(s) have another area than pixels in the PNG; the area counts")
    if unlisted:
        notes.append(f"{gt_json}: {unlisted} image(s) have ids in the PNG of no counted segment; they are not void")
    return FilesEvaluation(pairs.info, total.compute(), len(pairs), tuple(notes))


class _Scores(Dataset[tuple[PanopticQuality, int, bool] | UserError]):
    """The comparisons as a data set, so that a loader's processes share them and keep their order.

    An item is one image's metric, how many of its areas are not pixels, and whether it has unlisted ids. An error is
    returned, because a loader would wrap it into its process's traceback.
    """

    def __init__(self, pairs: PanopticPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[PanopticQuality, int, bool] | UserError:
        metric = PanopticQuality(self.pairs.info.num_classes, self.pairs.info.thing_classes)
        try:
            pair = self.pairs[index]
        except UserError as error:
            return error
        pred_map, gt_map = torch.from_numpy(pair.pred_map), torch.from_numpy(pair.gt_map)
        try:
            metric.update(pred_map, pair.pred_segments, gt_map, pair.gt_segments, gt_areas=pair.areas)
        except ValueError as error:  # an impossible area; the pairs let nothing else through
            return UserError(f"{self.pairs.gt_json}, image {pair.image_id!r}: {error}: give its number of pixels there")
        return metric, pair.stale_areas, pair.has_unlisted


def _unchanged(item: Any) -> Any:
    return item
