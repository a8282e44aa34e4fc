"""Networks of segmentation_models_pytorch, trained for `camvid` on what PEM is trained on, by a plain loop.

    python scripts/benchmark/camvid_baselines.py train|test NETWORK FOLDER THREADS OVERRIDES...

A training keeps its state in FOLDER and goes on from there; the results are written there, too. Backbone, weights,
images, crops, batches, optimiser, schedule and average are those of PEM's experiment. The loss is theirs: cross entropy
of every labelled pixel, without clipping.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from jaxtyping import Float, Int64
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel

from pem_lightning.checkpoints.pretrained import read_weights
from pem_lightning.cli.build import build_datamodule, prefers_channels_last
from pem_lightning.cli.errors import compose
from pem_lightning.cli.overrides import literal_paths
from pem_lightning.data import SegmentationDataModule
from pem_lightning.data.sampler import EndlessSampler, SeededDataset
from pem_lightning.files import replace_file, write_file
from pem_lightning.metrics import MeanIoU
from pem_lightning.models.backbones.efficientnet_lite import EfficientNetLite, InvertedResidual, SeparableBlock
from pem_lightning.models.layers import IMAGE_MEAN, IMAGE_STD
from pem_lightning.models.pem import padded_size
from pem_lightning.preprocess import normalize
from pem_lightning.processes import Interrupted, WorkerLoader, stop_in_order
from pem_lightning.training.ema import update_average
from pem_lightning.training.optim import freeze
from pem_lightning.training.resume import seed_step
from pem_lightning.training.signals import StopSignals
from pem_lightning.types import IGNORE_INDEX, Sample, UserError
from scripts.benchmark import common

ENCODER = "tu-tf_efficientnet_lite0"
ARCHITECTURES = {"fpn": "FPN", "deeplabv3plus": "DeepLabV3Plus", "segformer": "Segformer", "upernet": "UPerNet"}
"""By the names of the command line."""
FUSABLE = {
    "EfficientNetFeatures": EfficientNetLite.fusable,
    "DepthwiseSeparableConv": SeparableBlock.fusable,
    "InvertedResidual": InvertedResidual.fusable,
}
"""timm's blocks -> their convolutions and normalisations, which have the names of ours."""
CHECKPOINT = "last.pt"
SAVE_SECONDS = 60.0
SAY_SECONDS = 30.0


def import_library() -> Any:
    """segmentation_models_pytorch; raises `UserError` if it cannot be imported."""
    try:
        import segmentation_models_pytorch
    except Exception as error:  # a torchvision for another torch raises RuntimeError
        names = ", ".join(ARCHITECTURES)
        cure = "python -m pip install -r requirements-bench.txt"
        raise UserError(f"{names} need segmentation_models_pytorch: {cure}, or choose --networks pem") from error
    return segmentation_models_pytorch


def compose_experiment(overrides: Sequence[str]) -> DictConfig:
    """PEM's experiment, which everything is taken from."""
    return compose("train", [*literal_paths(overrides), "output_dir=unused"])


class EncoderDecoder(nn.Module):
    """A network of segmentation_models_pytorch, fed like PEM. Its encoder is called `backbone`, as in PEM."""

    input_scale: Tensor
    input_shift: Tensor

    def __init__(self, name: str, num_classes: int, weights: str | None) -> None:
        super().__init__()
        network = getattr(import_library(), ARCHITECTURES[name])(ENCODER, encoder_weights=None, classes=num_classes)
        self.backbone, self.decoder, self.head = network.encoder, network.decoder, network.segmentation_head
        # From ImageNet's normalisation to (pixel - 127.5) / 127.5, as in `EfficientNetLite`.
        scale, shift = ([v / 127.5 for v in IMAGE_STD], [v / 127.5 - 1 for v in IMAGE_MEAN])
        for key, values in (("input_scale", scale), ("input_shift", shift)):
            self.register_buffer(key, torch.tensor(values)[:, None, None], persistent=False)
        if weights is not None:
            state = read_weights(weights).state
            self.backbone.model.load_state_dict({key.removeprefix("backbone."): v for key, v in state.items()})

    def features(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Of the encoder, from the finest to the coarsest, of images whose sides 32 divides."""
        return self.backbone(torch.addcmul(self.input_shift, images, self.input_scale))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K H W"]:
        """Logits at the size of normalised images of any size, which are padded as PEM pads them."""
        height, width = images.shape[2:]
        full_height, full_width = padded_size(height, width)
        padded = F.pad(images, (0, full_width - width, 0, full_height - height))
        return self.head(self.decoder(self.features(padded)))[..., :height, :width]


def fuse_encoder(network: EncoderDecoder) -> EncoderDecoder:
    """A copy for inference: timm's normalisations with activation, which `fuse_batch_norms` leaves, are fused."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for block in network.backbone.modules():
        for conv_name, norm_name in FUSABLE.get(type(block).__name__, ()):
            conv, norm = getattr(block, conv_name), getattr(block, norm_name)
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            setattr(block, norm_name, norm.act)
    return network


def collate(samples: Sequence[Sample]) -> tuple[Float[Tensor, "B 3 H W"], Int64[Tensor, "B H W"]]:
    """Normalised crops and their classes."""
    return torch.stack([normalize(s.image) for s in samples]), torch.stack([s.class_map() for s in samples])


def training_batches(
    cfg: DictConfig, start: int = 0, collate_fn: Callable[[Sequence[Sample]], Any] = collate
) -> Iterator[Any]:
    """The batches that PEM's training sees from a step on, without an end."""
    data = build_datamodule(cfg)
    data.setup("fit")
    sampler = EndlessSampler(len(data.train_dataset), cfg.seed, batch_size=data.batch_size, start=start)
    options = {"batch_size": data.batch_size, "sampler": sampler, "collate_fn": collate_fn}
    return iter(WorkerLoader(SeededDataset(data.train_dataset), **options, num_workers=data.num_workers))


class Training:
    """What a training consists of, which `save` and `load` keep: after a kill it goes on from its last file."""

    def __init__(self, name: str, cfg: DictConfig) -> None:
        lightning.seed_everything(cfg.seed, verbose=False)
        num_classes = build_datamodule(cfg).info.num_classes
        self.network = EncoderDecoder(name, num_classes, cfg.weights).train()
        freeze(self.network, cfg.recipe.get("freeze"))
        channels_last = prefers_channels_last(self.network, torch.device("cpu"))
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.decay = cfg.recipe.ema_decay
        self.average = None if self.decay is None else AveragedModel(self.network)
        self.optimizer = instantiate(cfg.recipe.optimizer)(instantiate(cfg.recipe.parameter_groups)(self.network))
        self.schedule = instantiate(cfg.recipe.schedule)(self.optimizer)
        self.step = 0
        self.seconds = 0.0

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated: the average if there is one."""
        return self.network if self.average is None else self.average.module

    def _parts(self) -> dict[str, Any]:
        parts = {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts if self.average is None else {**parts, "average": self.average}

    def save(self, path: Path) -> None:
        """Write all of it."""
        states = {name: part.state_dict() for name, part in self._parts().items()}
        with replace_file(path, durable=True) as file:
            torch.save({**states, "step": self.step, "seconds": self.seconds}, file)

    def load(self, path: Path) -> None:
        """Read it."""
        states = torch.load(path, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(states[name])
        self.step, self.seconds = states["step"], states["seconds"]

    def learn(self, images: Float[Tensor, "B 3 H W"], classes: Int64[Tensor, "B H W"]) -> Tensor:
        """One step; returns the loss."""
        logits = self.network(images.contiguous(memory_format=self.layout))
        loss = F.cross_entropy(logits, classes, ignore_index=IGNORE_INDEX)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            update_average(self.average, self.network, self.decay)
        self.step += 1
        return loss.detach()


def train(name: str, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train to the end, from where the folder's file stands, and validate; returns `evaluate`'s numbers and minutes."""
    cfg = compose_experiment(overrides)
    training, path = Training(name, cfg), folder / CHECKPOINT
    if path.is_file():
        training.load(path)
        common.say(f"{name}: going on at step {training.step}")
    if training.step < cfg.recipe.max_steps:
        signals = StopSignals()
        signals.install()
        try:
            run_steps(name, training, cfg, path, signals)
        finally:
            signals.remove()
    return {**evaluate(training.result, build_datamodule(cfg)), "minutes": training.seconds / 60}


def run_steps(name: str, training: Training, cfg: DictConfig, path: Path, signals: StopSignals) -> None:
    """Train to the last step; save now and then, at the end, and before a signal raises `Interrupted`."""
    first, last = training.step, cfg.recipe.max_steps
    batches = training_batches(cfg, first)
    began = said = saved = marked = time.monotonic()
    while training.step < last:
        batch = next(batches)
        seed_step(cfg.seed, training.step, 0)
        loss = training.learn(*batch)
        now = time.monotonic()
        training.seconds, marked = training.seconds + now - marked, now
        at_end = training.step == last
        if now - said >= SAY_SECONDS or at_end:
            to_go = timedelta(seconds=round((now - began) / (training.step - first) * (last - training.step)))
            common.say(f"{name}: step {training.step}/{last}  loss {float(loss):.3f}  {to_go} to go")
            said = now
        if now - saved >= SAVE_SECONDS or at_end or signals.received:
            training.save(path)
            saved = marked = time.monotonic()
        if signals.received:
            raise Interrupted(signals.received)


def load_trained(name: str, folder: Path, overrides: Sequence[str]) -> nn.Module:
    """The trained network, in evaluation mode and in PyTorch's own memory format."""
    training = Training(name, compose_experiment(overrides))
    training.load(folder / CHECKPOINT)
    return training.result.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def test(name: str, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Evaluate the trained network on the split that `overrides` choose."""
    return evaluate(load_trained(name, folder, overrides), build_datamodule(compose_experiment(overrides)))


@torch.no_grad()
def evaluate(network: nn.Module, data: SegmentationDataModule) -> dict[str, Any]:
    """mIoU, and IoU by class, in percent, of whole frames, by the metric that PEM is evaluated with."""
    network.eval()
    data.setup("validate")
    metric = MeanIoU(data.info.num_classes)
    for batch in data.val_dataloader():
        for image, sample in zip(batch.images, batch.samples, strict=True):
            metric.update(class_map(network(normalize(image)[None]), sample.panoptic.shape), sample.class_map()[None])
    found = metric.compute()
    iou = dict(zip(data.info.class_names, (100 * found.iou_per_class).tolist(), strict=True))
    return {"miou": 100 * found.miou, "iou": {name: None if value != value else value for name, value in iou.items()}}


def class_map(logits: Float[Tensor, "B K h w"], size: Sequence[int]) -> Int64[Tensor, "B H W"]:
    """The most likely class of every pixel, at a size."""
    if logits.shape[2:] != tuple(size):
        logits = F.interpolate(logits, tuple(size), mode="bilinear")
    return logits.argmax(1)


def main(job: str, name: str, folder: str, threads: str, *overrides: str) -> int:
    """Run `train` or `test` and write what it returns to FOLDER/<job>.json; returns the exit code."""
    torch.set_num_threads(int(threads))
    try:
        result = {"train": train, "test": test}[job](name, Path(folder), overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_file(Path(folder) / f"{job}.json", json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    with stop_in_order():
        sys.exit(main(*sys.argv[1:]))
