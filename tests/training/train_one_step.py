"""Train a small PEM for one step: python -m tests.training.train_one_step DEVICES FOLDER CASE...

A case is MICRO_BATCHES-NORM, with the norm in "train" or "eval" mode, in float64, or MICRO_BATCHES-NORM-float32-SEED.
Gradients before clipping, losses and the weights after the step go to FOLDER/DEVICES-CASE.pt. The images of the step,
and the points drawn for each, are always the same.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader

from pem_lightning import build_pem
from pem_lightning.data.cityscapes import CITYSCAPES
from pem_lightning.data.sampler import TrainSampler
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.losses import SetCriterion
from pem_lightning.training.module import PEMModule
from pem_lightning.training.optim import cosine_schedule, parameter_groups
from pem_lightning.types import Batch, Target
from tests.models.randomize import TinyBackbone

IMAGES = 4


def image_and_target(number: int) -> tuple[torch.Tensor, Target]:
    """One of the images: random, smooth enough for a network to see something; some have few segments."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 4, 8, generator=generator) * 255
    image = nn.functional.interpolate(coarse, (64, 128), mode="bilinear")[0].to(torch.uint8)
    count = (3, 1, 5, 2)[number % 4]
    masks = nn.functional.interpolate(torch.rand(1, count, 4, 8, generator=generator), (64, 128))[0] > 0.5
    return image, Target(torch.randint(19, (count,), generator=generator), masks)


class PointsByImage:
    """Random points that an image, or one of its pairs, gets whoever computes it and together with whatever else."""

    def __init__(self):
        self.seeds: list[int] = []
        self.pairs: list[tuple[int, int]] = []

    def see(self, targets: list[Target]) -> None:
        self.seeds = [int(target.masks.sum()) for target in targets]
        self.pairs = [(s, i) for s, t in zip(self.seeds, targets, strict=True) for i in range(len(t.labels))]

    def __call__(self, shape, device):
        if len(shape) == 4:  # layers, images, points, 2: the matcher's
            rows = [draw(seed, shape[2:]) for seed in self.seeds]
            return torch.stack(rows).expand(shape).clone()
        rows = [draw(1000 * seed + pair, shape[1:]) for seed, pair in self.pairs]
        return torch.stack(rows).repeat(shape[0] // len(rows), 1, 1)  # layer by layer, or all at once


def draw(seed: int, shape) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 7919 * shape[0]))


class Criterion(SetCriterion):
    def forward(self, predictions, targets, totals=None):
        self.sampling[-1].see(targets)
        return super().forward(predictions, targets, totals)


class SyncedNorm(nn.BatchNorm2d):
    """Stands in for `nn.SyncBatchNorm`, which runs on GPUs only: statistics of all processes' values."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / count  # its gradients add up over processes as well
        centred = x - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        return centred * ((variance + self.eps).rsqrt() * self.weight)[:, None, None] + self.bias[:, None, None]


class SyncOnCPU(TorchSyncBatchNorm):
    def apply(self, model):
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncedNorm
        return model


class Watch(Callback):
    def __init__(self, path: Path, norm: str):
        self.path, self.norm, self.seen = path, norm, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for module in pl_module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self.norm == "eval":
                module.eval()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen["gradients"] = {n: p.grad.clone() for n, p in pl_module.network.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen["losses"] = {k: v.clone() for k, v in trainer.callback_metrics.items()}
        self.seen["weights"] = {k: v.clone() for k, v in pl_module.network.state_dict().items()}
        if trainer.is_global_zero:
            torch.save(self.seen, self.path)


def train(devices: int, folder: Path, case: str) -> None:
    micro_batches, norm, *single = case.split("-")
    dtype = torch.float32 if single else torch.float64
    torch.manual_seed(int(single[1]) if single else 0)
    sizes = {"channels": 64, "mask_channels": 64, "hidden_channels": 128, "pyramid_channels": 64}
    network = build_pem(TinyBackbone(), num_classes=19, num_queries=8, num_layers=2, **sizes).to(dtype)
    network.register_forward_pre_hook(lambda network, images: (images[0].to(dtype),))
    rand = PointsByImage()
    module = PEMModule(
        network=network,
        criterion=Criterion(19, num_points=32, rand=rand),
        inference=TaskInference("panoptic", CITYSCAPES.thing_classes),
        info=CITYSCAPES,
        parameter_groups=lambda model: parameter_groups(model, lr=1e-3),
        optimizer=lambda groups: torch.optim.AdamW(groups, fused=True, eps=1e-4),
        schedule=lambda optimizer: cosine_schedule(optimizer, max_iterations=10),
        micro_batches=int(micro_batches),
        gradient_clip=0.5,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[SyncOnCPU()],
        callbacks=[Watch(folder / f"{devices}-{case}.pt", norm)],
        log_every_n_steps=1,
    )
    data = [image_and_target(number) for number in range(IMAGES)]
    loader = DataLoader(
        Items(data),
        batch_size=IMAGES // devices,
        sampler=TrainSampler(IMAGES, 0, trainer.global_rank, devices),
        collate_fn=lambda items: Batch([image for image, _ in items], [target for _, target in items], []),
    )
    trainer.fit(module, loader)


class Items(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        return self.data[key.item]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[3:]:
        train(int(sys.argv[1]), Path(sys.argv[2]), case)
