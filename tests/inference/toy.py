"""Two classes, and a network that sees them in stripes whatever the image shows."""

import itertools
import time

import torch
import torch.nn.functional as F
from torch import nn

from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.predictor import Predictor
from pem_lightning.types import ClassInfo, DatasetInfo, Predictions

INFO = DatasetInfo("toy", (ClassInfo("car", (0, 0, 142), True, 26), ClassInfo("sky", (70, 130, 180), False, 23)))


class Stripes(nn.Module):
    """Sees one segment per class in vertical stripes of the padded image, sure of all; one more query sees nothing."""

    def __init__(self, classes=(0, 1), seconds=0.0):
        super().__init__()
        self.classes, self.seconds = classes, seconds
        self.inputs = []

    def forward(self, images):
        assert not self.training
        time.sleep(self.seconds)
        self.inputs.append(images)
        height, width = (-(-side // 32) * 8 for side in images.shape[-2:])
        count = len(self.classes)
        masks = torch.full((count + 1, height, width), -9.0)
        for i in range(count):
            masks[i, :, i * width // count : (i + 1) * width // count] = 9
        masks, class_logits = masks.to(images.device), 9 * torch.eye(3, device=images.device)[[*self.classes, 2]]
        return Predictions(class_logits.expand(len(images), -1, -1), masks.expand(len(images), -1, -1, -1))


def predictor(task="panoptic", model=None, info=INFO, device="cpu", **options):
    inference = TaskInference(task, info.thing_classes, resize_first=task != "semantic")
    return Predictor.from_parts(model or Stripes(), info, inference, device=device, **options)


class Objects(nn.Module):
    """Sees a car wherever red has a value of its own, and sky where it is 0; as sure as `certainties` say in turn."""

    def __init__(self, certainties=(1.0,)):
        super().__init__()
        self.certainties = itertools.cycle(certainties)
        self.inputs = []

    def forward(self, images):
        self.inputs.append(images)
        height, width = (-(-side // 32) * 32 for side in images.shape[-2:])
        red = (images[:, :1] * 58.395 + 123.675).round()
        padding = 0, width - images.shape[-1], 0, height - images.shape[-2]
        red = F.pad(red, padding, mode="replicate")[0, 0, 1::4, 1::4]
        values = sorted(set(red.unique().tolist()) | {0.0})
        masks = torch.stack([torch.where(red == value, 9.0, -9.0) for value in values])
        sure = next(self.certainties)
        none = torch.tensor([0.0, 0.0, 1 - sure])
        classes = torch.stack([torch.tensor([value > 0, value == 0, False]) * sure + none for value in values])
        return Predictions(classes.clamp(1e-6).log()[None], masks[None])
