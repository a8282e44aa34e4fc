"""Weights & Biases. The package is imported by the first call that needs it."""

from __future__ import annotations

import logging
import netrc
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from jaxtyping import UInt8
from lightning.pytorch.loggers import WandbLogger

from pem_lightning.callbacks.loggers import Guarded, Panel, RunStart, Tracker, flat, readable
from pem_lightning.callbacks.shown import Segmentation, photograph
from pem_lightning.inference.visualize import find_regions, index_map
from pem_lightning.types import DatasetInfo

log = logging.getLogger(__name__)

STEP = "trainer/global_step"
"""The x axis of everything."""

SUMMARIES = {"val/*": "max", "train/loss*": "min", "train/grad_norm": "last", "lr/*": "last"}
"""What the table of runs shows of a curve."""

DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Under either of these names `wandb login` keeps a key, by its version."""

MAX_MASK = 255
"""A mask has 8 bits."""


class WeightsAndBiases(Guarded, Tracker, WandbLogger):
    """Lightning's logger, offline by itself when nobody is logged in; shows predictions with masks and boxes to toggle.

    Args:
        save_dir: the run's folder; everything goes into its `wandb/`.
        resumed_from: the checkpoint of a resumed run; the run that the folder has goes on, then.
        offline: decides by itself when it is not given.
        kwargs: of `WandbLogger` and `wandb.init`.
    """

    def __init__(
        self, save_dir: str | Path, *, resumed_from: str | None = None, offline: bool | None = None, **kwargs: Any
    ) -> None:
        if offline is None:
            offline = os.environ.get("WANDB_MODE") in ("offline", "disabled") or not _has_key()
        if offline:
            os.environ.setdefault("WANDB_MODE", "offline")
        if resumed_from and kwargs.get("id") is None:
            kwargs["id"] = next((_id_of(folder) for folder in reversed(_folders(save_dir))), None)
        super().__init__(save_dir=save_dir, offline=offline, **kwargs)
        self._directory = Path(save_dir)
        self._keep_offline = partial(super().__init__, save_dir=save_dir, offline=True, mode="offline", **kwargs)

    @property
    def experiment(self) -> Any:
        """The tracked run; it is kept offline if the server cannot be reached, or refuses it, when it starts."""
        try:
            return super().experiment
        except Exception as error:  # of wandb's many kinds
            if self._offline:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("wandb: THE RUN IS KEPT OFFLINE, the server does not take it (%s)", reason)
            self._keep_offline()
            return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars; Lightning counts steps from 0, the reader of a curve counts those that are done."""
        super().log_metrics(metrics, step if step is None else step + 1)

    def record_start(self, start: RunStart) -> None:
        """Settings by names such as `recipe.optimizer.lr`, the package's code, axes and summaries."""
        self.log_hyperparams({**dict(flat(start.config)), "overrides": list(start.overrides)})
        for name, summary in SUMMARIES.items():
            self.experiment.define_metric(name, step_metric=STEP, summary=summary)
        package = Path(__file__).resolve().parents[1]
        code = f"source-{package.name}"
        self.experiment.log_code(str(package), name=code, include_fn=lambda path: path.endswith(".py"))
        if (words := self.closing_words()) is not None:
            log.warning(
                "wandb: offline, as asked for or for want of a login or a server: upload the run later with: %s",
                words[1],
            )

    def record_panel(self, panel: Panel, info: DatasetInfo, step: int) -> None:
        """The photograph with class masks, masks of single segments and boxes of things, of truth and prediction."""
        import wandb

        labels = {0: "(none)", **dict(enumerate(info.class_names, start=1))}
        masks: dict[str, Any] = {}
        boxes: dict[str, Any] = {}
        for name, segmentation in (("prediction", panel.what.prediction), ("ground_truth", panel.what.truth)):
            classes, segments = _masks(segmentation)
            if len(labels) <= MAX_MASK + 1:
                masks[name] = {"mask_data": classes, "class_labels": labels}
            if any(segment.is_thing for segment in segmentation[1]):
                masks[f"{name}_segments"] = {"mask_data": segments, "class_labels": _SEGMENT_LABELS}
                boxes[name] = {"box_data": _boxes(segmentation, info), "class_labels": labels}
        image = wandb.Image(photograph(panel.what), masks=masks, boxes=boxes or None, caption=panel.name)
        self._log(f"panels/{panel.name}", image, step)

    def record_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """One table for every validation."""
        import wandb

        # A browser cannot read the NaN of a class that does not occur.
        data = [[None if value != value else value for value in row.values()] for row in rows]
        self._log(name, wandb.Table(columns=list(rows[0]), data=data, allow_mixed_types=True), step)

    def record_picture(self, name: str, picture: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """As an image."""
        import wandb

        self._log(name, wandb.Image(picture), step)

    def closing_words(self) -> tuple[str, str] | None:
        """How to upload an offline run: all parts of one that was resumed, in their order."""
        if not self._offline or self._experiment is None:
            return None
        parts = [folder for folder in _folders(self._directory) if _id_of(folder) == self.version]
        return ("upload", shlex.join(["wandb", "sync", *map(readable, parts)])) if parts else None

    def _log(self, name: str, value: Any, step: int) -> None:
        self.experiment.log({name: value, STEP: step})


_SEGMENT_LABELS = {0: "(none)", **{i: f"segment {i}" for i in range(1, MAX_MASK + 1)}}


def _masks(segmentation: Segmentation) -> tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h w"]]:
    """Class by pixel and number of the segment by pixel, 0 for none; segments past the 255th are left out."""
    ids, segments = segmentation
    index = index_map(ids.numpy(), [segment.id for segment in segments])
    classes = np.array([0, *(segment.class_id + 1 for segment in segments)])
    return classes[index].astype(np.uint8), np.where(index <= MAX_MASK, index, 0).astype(np.uint8)


def _boxes(segmentation: Segmentation, info: DatasetInfo) -> list[dict[str, Any]]:
    """The things' boxes in pixels, with scores where there are some."""
    ids, segments = segmentation
    regions = find_regions(index_map(ids.numpy(), [segment.id for segment in segments]), len(segments))
    boxes = []
    for segment, region in zip(segments, regions, strict=True):
        if region is None or not segment.is_thing:
            continue
        left, top, right, bottom = region.box
        box = {
            "position": {"minX": left, "minY": top, "maxX": right, "maxY": bottom},
            "domain": "pixel",
            "class_id": segment.class_id + 1,
            "box_caption": info.classes[segment.class_id].name,
        }
        boxes.append(box if segment.score is None else box | {"scores": {"score": round(segment.score, 3)}})
    return boxes


def _folders(save_dir: str | Path) -> list[Path]:
    """The parts of the run in a folder, online or not, in the order of their start."""
    folders = (path.parent for path in Path(save_dir).glob("wandb/*run-*/run-*.wandb"))
    return sorted(folders, key=lambda folder: folder.name.removeprefix("offline-"))


def _id_of(folder: Path) -> str:
    return next(folder.glob("run-*.wandb")).stem.removeprefix("run-")


def _has_key() -> bool:
    """Whether wandb will find a key. Asking `wandb.login` would start a session that cannot go offline any more."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = DEFAULT_HOSTS if server is None else (urlparse(server).hostname or "",)
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
        return any(known.authenticators(host) is not None for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False
