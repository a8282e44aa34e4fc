"""What limits a trained semantic PEM: the classes of its queries, their masks, or the features that masks are made of.

Validation images are segmented three times: as the network does; with the true class of one query for each class in the
image, the one whose mask fits best; and by a linear classifier of the mask features, trained here on training crops.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from pem_lightning.checkpoints import load_network
from pem_lightning.cli.build import build_datamodule
from pem_lightning.cli.errors import compose
from pem_lightning.cli.overrides import quote, take_over
from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.metrics import MeanIoU
from pem_lightning.models.pem import PEM, padded_size
from pem_lightning.preprocess import normalize
from pem_lightning.types import IGNORE_INDEX, UserError
from scripts.benchmark import common
from scripts.benchmark.common import Times

STEPS, BATCH = 2000, 8192  # of the classifier's training, in pixels
WAYS = ("as it is", "true class of the best mask", "linear classifier of the mask features")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="of task=semantic")
    parser.add_argument("--root", type=Path, required=True, help="of the data set that it was trained on")
    parser.add_argument("--images", type=common.positive, default=100, help="training crops for the classifier")
    parser.add_argument("--pixels", type=common.positive, default=4000, help="of each")


@torch.no_grad()
def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Returns a table of mIoU and IoU by class.

    Raises:
        UserError: the checkpoint is of another task, or cannot be used.
    """
    torch.manual_seed(0)
    how = [f"checkpoint={quote(options.checkpoint)}", f"dataset.root={quote(options.root)}", "dataset.num_workers=0"]
    overrides, checkpoint = take_over("evaluate", how)
    cfg = compose("evaluate", overrides)
    if checkpoint is None or cfg.task.name != "semantic":
        raise UserError(f"{options.checkpoint} is of task={cfg.task.name}: readout is for semantic segmentation")
    network = instantiate(checkpoint.config["network"], num_classes=checkpoint.info.num_classes).eval()
    load_network(network, checkpoint)
    data = build_datamodule(cfg)
    classes = checkpoint.info.num_classes
    common.say(f"features of {options.images} training crops")
    classify = fit_linear(*sample_features(network, data, options.images, options.pixels), classes)
    metrics = {way: MeanIoU(classes) for way in WAYS}
    common.say(f"{len(data.val_dataset)} validation images")
    for index in range(len(data.val_dataset)):
        sample = data.val_dataset[index]
        truth = sample.class_map()
        features, classes_of_queries, masks = predict(network, sample.image)
        best = best_queries(masks > 0.5, truth, classes)
        scores = (
            torch.einsum("qc,qhw->chw", classes_of_queries, masks),
            torch.einsum("qc,qhw->chw", best, masks),
            enlarge(classify(features.permute(1, 2, 0)).permute(2, 0, 1), sample.image.shape[1:]),
        )
        for way, score in zip(WAYS, scores, strict=True):
            metrics[way].update(score.argmax(0)[None], truth[None])
    found = {way: metric.compute() for way, metric in metrics.items()}
    rows = [(way, *(f"{100 * iou:.1f}" for iou in (one.miou, *one.iou_per_class))) for way, one in found.items()]
    title = f"{checkpoint.path}: percent of {len(data.val_dataset)} validation images."
    return f"{title}\n\n{common.table(('', 'mIoU', *checkpoint.info.class_names), rows)}\n", {}


def decode_pixels(network: PEM, image: UInt8[Tensor, "3 H W"]) -> tuple[Tensor, list[Tensor]]:
    """What masks are a product of, [1, C, h, w] at a quarter of the padded size, and the decoder's levels."""
    images = normalize(image)[None]
    (height, width), (full_height, full_width) = images.shape[2:], padded_size(*images.shape[2:])
    padded = F.pad(images, (0, full_width - width, 0, full_height - height))
    decoded: tuple[Tensor, list[Tensor]] = network.pixel_decoder(network.backbone(padded))
    return decoded


def predict(network: PEM, image: Tensor) -> tuple[Tensor, Float[Tensor, "Q K"], Float[Tensor, "Q H W"]]:
    """Mask features [C, h, w], probabilities of classes without "no object", and of the pixels of masks."""
    features, levels = decode_pixels(network, image)
    out = network.transformer_decoder(features, levels)
    masks = enlarge(out.mask_logits[0], image.shape[1:]).sigmoid()
    return features[0], out.class_logits[0].softmax(-1)[:, :-1], masks


def enlarge(maps: Float[Tensor, "N h w"], size: torch.Size) -> Float[Tensor, "N H W"]:
    """From a quarter of the padded size to the image's."""
    full = tuple(4 * side for side in maps.shape[1:])
    return F.interpolate(maps[None], full, mode="bilinear", align_corners=False)[0][:, : size[0], : size[1]]


def best_queries(masks: Bool[Tensor, "Q H W"], truth: Int64[Tensor, "H W"], classes: int) -> Float[Tensor, "Q K"]:
    """1 where a query's mask has the largest IoU of all with a class that is in the image."""
    there = F.one_hot(truth.clamp(max=classes), classes + 1)[..., :-1].flatten(0, 1).float()  # [pixels, K]
    flat = masks.flatten(1).float()
    common_pixels = flat @ there
    iou = common_pixels / (flat.sum(1)[:, None] + there.sum(0) - common_pixels).clamp(min=1)
    best = F.one_hot(iou.argmax(0), len(masks)).T.float()
    return best * (there.sum(0) > 0)


def sample_features(network: PEM, data: SegmentationDataModule, images: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Mask features [N, C] at random labelled pixels of training crops, and their classes [N]."""
    dataset = data.train_dataset
    features, labels = [], []
    for index in torch.randperm(len(dataset))[:images].tolist():
        sample = dataset[index]
        truth = sample.class_map()
        maps = enlarge(decode_pixels(network, sample.image)[0][0], truth.shape)
        chosen = torch.randint(truth.numel(), (pixels,))
        chosen = chosen[truth.flatten()[chosen] != IGNORE_INDEX]
        features.append(maps.flatten(1)[:, chosen].T)
        labels.append(truth.flatten()[chosen])
    return torch.cat(features), torch.cat(labels)


@torch.enable_grad()
def fit_linear(features: Float[Tensor, "N C"], labels: Int64[Tensor, " N"], classes: int) -> Callable[[Tensor], Tensor]:
    """A linear classifier by cross entropy, of standardised features."""
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    linear = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(features), (BATCH,))
        loss = F.cross_entropy(linear((features[chosen] - mean) / deviation), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda x: linear((x - mean) / deviation)
