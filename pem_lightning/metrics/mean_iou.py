"""Mean intersection over union with the rules of Cityscapes' pixel-level evaluation. K classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64, Integer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from pem_lightning.types import IGNORE_INDEX


class MeanIoUResult(NamedTuple):
    """Semantic quality of a whole data set, in [0, 1]; NaN for classes that do not occur and without labelled pixels.

    `confusion` counts labelled pixels, true class by predicted class; its last column is for predictions of no class.
    """

    miou: float
    iou_per_class: Float64[np.ndarray, " K"]
    pixel_accuracy: float
    confusion: Int64[np.ndarray, "K K+1"]


class MeanIoU(MulticlassConfusionMatrix):
    """Mean IoU over a data set, from one confusion matrix that is summed over images and processes.

    Evaluators agree on the IoU of every class that the ground truth has, but not on the mean where it lacks some:

    - Here and in cityscapesScripts, a class that is only predicted counts with IoU 0; one in neither is left out.
    - MIT's scene parsing evaluation (ADE20K) counts both with IoU 0: its mean is always over 150 classes.
    - detectron2's SemSegEvaluator (Mask2Former, PEM) leaves both out; older versions do as is done here.

    The validation sets of Cityscapes and ADE20K have all classes, so that no published number depends on it.
    """

    higher_is_better = True

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        # One class more stands for predictions of none.
        super().__init__(num_classes + 1, validate_args=False)
        self.unlabelled = ignore_index

    def update(self, prediction: Integer[Tensor, "*size"], target: Integer[Tensor, "*size"]) -> None:
        """Add one image or a batch. A predicted value that is no class, such as 255, is wrong where there is a label.

        Raises:
            ValueError: a target is neither a class nor `ignore_index`.
        """
        K = self.num_classes - 1
        target, prediction = target.to(self.device), prediction.to(self.device)
        labelled = target != self.unlabelled
        true, predicted = target[labelled].long(), prediction[labelled].long()
        strays = true[(true < 0) | (true >= K)]
        if len(strays):
            raise ValueError(f"target {strays[0].item()} is neither a class 0..{K - 1} nor {self.unlabelled}")
        super().update(torch.where((predicted >= 0) & (predicted < K), predicted, K), true)

    def compute(self) -> MeanIoUResult:  # type: ignore[override]
        """IoU per class, averaged over the classes that occurred."""
        confusion = super().compute()[:-1].cpu().numpy()
        hits = confusion.diagonal()
        union = confusion.sum(1) + confusion.sum(0)[:-1] - hits
        occurs, total = union > 0, confusion.sum()
        iou = np.where(occurs, hits / np.maximum(union, 1), np.nan)
        return MeanIoUResult(
            miou=float(iou[occurs].mean()) if occurs.any() else float("nan"),
            iou_per_class=iou,
            pixel_accuracy=float(hits.sum() / total) if total else float("nan"),
            confusion=confusion,
        )
