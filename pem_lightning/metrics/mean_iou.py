"""Mean intersection over union with the rules of Cityscapes' pixel-level evaluation.

K classes
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64, Integer
from torch import Tensor
from torchmetrics import Metric


class MeanIoUResult(NamedTuple):
    """Semantic quality of a whole data set, all in [0, 1].

    Attributes:
        miou: mean over the classes that occur in ground truth or prediction; NaN where none does.
        iou_per_class: NaN for classes that do not occur.
        pixel_accuracy: fraction of labelled pixels that have the right class; NaN without labelled pixels.
        confusion: pixel counts, true class by predicted class; the last column counts labelled pixels that were
            predicted as none of the classes.
    """

    miou: float
    iou_per_class: Float64[np.ndarray, " K"]
    pixel_accuracy: float
    confusion: Int64[np.ndarray, "K K+1"]


class MeanIoU(Metric):
    """Mean IoU over a data set, from one confusion matrix of whole numbers that is summed over images and processes.

    Unlabelled pixels do not count at all. The evaluators that published numbers come from agree on that and on the IoU
    of every class that the ground truth has. They differ in what classes that it lacks do to the mean:

    - Here and in cityscapesScripts, one that is predicted counts with IoU 0; one that is not is left out.
    - MIT's scene parsing evaluation (ADE20K) counts both with IoU 0: its mean is always over 150 classes.
    - detectron2's SemSegEvaluator (Mask2Former, PEM) leaves both out; older versions do as is done here.

    No published number depends on it, because the ground truth of both validation sets has all classes (the rarest of
    ADE20K's 150 is in 3 of its 2000 images); parts of them and other data sets may lack some.

    Args:
        num_classes: K.
        ignore_label: value of unlabelled pixels.
    """

    full_state_update = False
    higher_is_better = True

    confusion: Tensor

    def __init__(self, num_classes: int, ignore_label: int = 255) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.add_state("confusion", torch.zeros(num_classes, num_classes + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Integer[Tensor, "*size"], target: Integer[Tensor, "*size"]) -> None:
        """Adds one image or a batch.

        Args:
            prediction: class of every pixel. Any value that is not a class, such as 255, is wrong wherever the
                target is labelled.
            target: true class of every pixel, or the ignore label.

        Raises:
            ValueError: a target is neither a class nor the ignore label.
        """
        K = self.num_classes
        target = target.to(prediction.device)
        labelled = target != self.ignore_label
        true, predicted = target[labelled].long(), prediction[labelled].long()
        strays = true[(true < 0) | (true >= K)]
        if len(strays):
            raise ValueError(f"target {strays[0].item()} is neither a class 0..{K - 1} nor {self.ignore_label}")
        predicted = torch.where((predicted >= 0) & (predicted < K), predicted, K)
        counts = torch.bincount(true * (K + 1) + predicted, minlength=K * (K + 1)).view(K, K + 1)
        self.confusion += counts.to(self.confusion.device)

    def compute(self) -> MeanIoUResult:
        """IoU per class, averaged over the classes that occurred."""
        confusion = self.confusion.cpu().numpy()
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
