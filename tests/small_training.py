"""Networks of few weights, and a training of milliseconds, for what does not depend on the network."""

import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from pem_lightning.data.cityscapes import CITYSCAPES
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.losses import SetCriterion
from pem_lightning.training.module import PEMModule
from pem_lightning.training.optim import cosine_schedule, parameter_groups
from pem_lightning.types import Batch, Predictions, Target

CLIP = 0.01


class Small(nn.Module):
    """A network of two convolutions with PEM's interface."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 4, stride=4)
        self.masks = nn.Conv2d(8, 5, 1)
        self.classes = nn.Linear(8, 20)
        self.seen = []

    def forward(self, images):
        features = self.features(images).relu()
        self.seen.append(features.dtype)
        logits = self.classes(features.mean((2, 3)))[:, None].expand(-1, 5, -1)
        return Predictions(logits, self.masks(features))


class Step(torch.optim.AdamW):
    """Remembers the norm of the gradient that it steps with."""

    norms: tuple[float, ...] = ()

    def step(self, closure=None):
        if closure is not None:
            closure()
        self.norms = (*self.norms, self.norm())
        return super().step()

    def norm(self):
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        return torch.stack(gradients).norm().item() if gradients else 0.0


def train(
    plugins=(),
    fused=False,
    steps=3,
    compile=None,
    channels_last=False,
    ckpt_path=None,
    micro_batches=2,
    fit_memory=False,
    hook=None,
    **settings,
):
    """Train it on four images, in two micro-batches by default; returns module, trainer and the losses."""
    torch.manual_seed(0)
    module = PEMModule(
        network=Small(),
        criterion=SetCriterion(19, num_points=16),
        inference=TaskInference("panoptic", CITYSCAPES.thing_classes),
        info=CITYSCAPES,
        parameter_groups=lambda model: parameter_groups(model, lr=1e-3),
        optimizer=lambda groups: Step(groups, fused=fused),
        schedule=lambda optimizer: cosine_schedule(optimizer, max_iterations=10),
        micro_batches=micro_batches,
        fit_memory=fit_memory,
        gradient_clip=CLIP,
        compile=compile,
        channels_last=channels_last,
    )
    if hook is not None:
        module.network.register_forward_hook(hook)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=list(plugins),
        **settings,
    )
    losses = []
    log = module.log_dict
    module.log_dict = lambda values, **more: (losses.append(values["train/loss"].item()), log(values, **more))
    # Noise: where all points are equally uncertain, rounding would choose.
    images = list(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    targets = [Target(torch.tensor([i]), torch.arange(1024).view(1, 32, 32) > 200 * i) for i in range(4)]
    trainer.fit(module, DataLoader([0] * steps, collate_fn=lambda _: Batch(images, targets, [])), ckpt_path=ckpt_path)
    return module, trainer, losses
