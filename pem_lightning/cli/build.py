"""From a composed experiment to its parts: trainer, data module, module, predictor."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from pem_lightning.callbacks import ExactResume
from pem_lightning.checkpoints import Checkpoint
from pem_lightning.data import SegmentationDataModule
from pem_lightning.deploy.export import SUFFIXES, ExportOptions
from pem_lightning.images import resize
from pem_lightning.inference.optimize import check_compile
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.predictor import Predictor, fast_network
from pem_lightning.installation import job_command
from pem_lightning.training.distributed import PlainSyncBatchNorm
from pem_lightning.training.module import PEMModule
from pem_lightning.training.optim import freeze
from pem_lightning.training.resume import AtomicCheckpointIO
from pem_lightning.types import DatasetInfo, UserError, did_you_mean

log = logging.getLogger(__name__)

_DECIDED_BY_RECIPE = {
    "accumulate_grad_batches": "micro_batch_size",
    "gradient_clip_val": "gradient_clip",
    "gradient_clip_algorithm": "gradient_clip",
}
"""Arguments of Lightning's that `PEMModule` does itself -> the recipe's key for it."""

_INSTEAD_OF_CALLBACKS: dict[type, str] = {
    lightning_callbacks.LearningRateFinder: f"compare some: {job_command('train')} -m "
    "recipe.optimizer.lr=3e-4,7e-4,1e-3 recipe.max_steps=500",
    lightning_callbacks.BatchSizeFinder: "recipe.micro_batch_size=auto finds what fits the GPU",
    lightning_callbacks.GradientAccumulationScheduler: "set recipe.micro_batch_size",
    lightning_callbacks.StochasticWeightAveraging: "set recipe.ema_decay, e.g. 0.9998",
}
"""Lightning's callbacks that need its automatic optimisation or change the recipe's batch -> what to do."""


def build_trainer(cfg: DictConfig) -> Trainer:
    """Make the trainer with its callbacks and loggers; `precision: auto` is decided here.

    Raises:
        UserError: there is no GPU, the recipe decides what is set here, Lightning does not know a value, or SLURM's
            tasks are not the trainer's devices.
    """
    for key, instead in _DECIDED_BY_RECIPE.items():
        if cfg.trainer.get(key) is not None:
            raise UserError(f"trainer.{key} would change the recipe behind its back: set recipe.{instead} instead")
    settings: dict[str, Any] = {}
    has_gpu = torch.cuda.is_available()
    if cfg.trainer.accelerator == "auto" and not has_gpu:  # Lightning would take Apple's GPU, which has no float64
        settings["accelerator"] = "cpu"
    on_gpu = has_gpu and cfg.trainer.accelerator != "cpu"
    if cfg.trainer.accelerator in ("gpu", "cuda") and not has_gpu:
        raise UserError("trainer.accelerator=gpu, but torch finds no GPU here: choose trainer=cpu or trainer=auto")
    if cfg.trainer.precision == "auto":
        settings["precision"] = "16-mixed" if on_gpu else "32-true"
    if on_gpu and cfg.trainer.deterministic is True:
        log.warning(
            "trainer.deterministic=true: taking warn, as CUDA has no deterministic backward pass of grid_sample"
        )
        settings["deterministic"] = "warn"
    if batches := cfg.trainer.get("overfit_batches"):  # Lightning would replace our samplers by its own
        settings |= {"overfit_batches": 0.0, "limit_train_batches": batches}
        settings |= {"limit_val_batches": cfg.trainer.get("limit_val_batches") or batches}
    plugins = [*instantiate(cfg.trainer.get("plugins") or []), AtomicCheckpointIO()]
    settings["sync_batchnorm"] = on_gpu and bool(cfg.trainer.sync_batchnorm)  # which PyTorch has on GPUs only
    if settings["sync_batchnorm"]:  # Lightning applies it when there are several processes
        plugins.append(PlainSyncBatchNorm())
    loggers = _instantiate_all(cfg.logger)
    callbacks = [ExactResume(), *_instantiate_all(cfg.callbacks)]
    for callback in callbacks:
        for kind, instead in _INSTEAD_OF_CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"{kind.__name__} does not work with this training: {instead}")
    try:
        trainer: Trainer = instantiate(
            cfg.trainer, callbacks=callbacks, logger=loggers or False, plugins=plugins, **settings
        )
    except InstantiationException as error:
        if "SLURM_NTASKS" in os.environ and "SLURM" in str(error.__cause__):
            raise UserError(_slurm_hint(cfg)) from error
        if isinstance(error.__cause__, ValueError):  # its message lists the values there are
            raise UserError(f"trainer: {error.__cause__}") from error
        raise
    if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) != trainer.world_size:
        raise UserError(_slurm_hint(cfg))
    return trainer


def _slurm_hint(cfg: DictConfig) -> str:
    """What to do if SLURM's tasks are not the trainer's devices, one each."""
    return (
        f"SLURM has {os.environ['SLURM_NTASKS']} tasks, which are not trainer.devices={cfg.trainer.devices} on "
        f"trainer.num_nodes={cfg.trainer.num_nodes}, one each: make them equal with --ntasks-per-node and --nodes, and "
        "start with srun (see scripts/slurm.sh); in a shell or notebook say SLURM_JOB_NAME=interactive python ..."
    )


def build_datamodule(cfg: DictConfig, batch_size: int | None = None) -> SegmentationDataModule:
    """Make the data module; `batch_size` training images per device and step, None for all of the recipe's."""
    return instantiate(cfg.dataset.datamodule, batch_size=batch_size or cfg.recipe.global_batch_size)


def build_module(
    cfg: DictConfig,
    info: DatasetInfo,
    *,
    trainer: Trainer | None = None,
    micro_batches: int = 1,
    network: nn.Module | None = None,
) -> PEMModule:
    """Make network (unless it is given), losses and optimiser for a data set's classes.

    The trainer decides on the memory format.

    Raises:
        UserError: the network cannot be compiled, or laid out in memory, as asked.
    """
    check_compile("recipe.compile", cfg.recipe.compile)
    network = instantiate(cfg.network, num_classes=info.num_classes) if network is None else network
    given = cfg.recipe.get("class_weights")
    weights = {"weight_by_class": weights_by_class(given, info)} if given else {}
    if cfg.job == "train":
        freeze(network, cfg.recipe.get("freeze"))
    return PEMModule(
        network=network,
        criterion=instantiate(cfg.criterion, num_classes=info.num_classes, _convert_="all", **weights),
        inference=TaskInference(cfg.task.name, info.thing_classes, **cfg.task.inference),
        info=info,
        parameter_groups=instantiate(cfg.recipe.parameter_groups),
        optimizer=instantiate(cfg.recipe.optimizer),
        schedule=instantiate(cfg.recipe.schedule),
        record={"config": cast(dict, OmegaConf.to_container(cfg, resolve=True)), "overrides": command_line()},
        micro_batches=micro_batches,
        fit_memory=cfg.recipe.micro_batch_size == "auto",
        channels_last=trainer is not None and wants_channels_last(cfg, trainer, network),
        compile=cfg.recipe.compile if cfg.job == "train" else None,
        gradient_clip=float(cfg.recipe.gradient_clip or 0),
        **_views(cfg),
    )


def weights_by_class(given: Any, info: DatasetInfo) -> list[float]:
    """By class index, from `recipe.class_weights`; 1 for classes that it does not name.

    Raises:
        UserError: it names a class that there is not, or a weight is no positive number.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"recipe.class_weights={given}: give weights by class name, e.g. {{{info.class_names[0]}: 2}}")
    for name, weight in given.items():
        if name not in info.class_names:
            hint = did_you_mean(str(name), info.class_names)
            raise UserError(f"recipe.class_weights: there is no class {name}{hint}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"recipe.class_weights: {name} has the weight {weight}: give a number above 0")
    return [float(given.get(name, 1)) for name in info.class_names]


def wants_channels_last(cfg: DictConfig, trainer: Trainer, network: nn.Module) -> bool:
    """Which memory format to train in; `auto` takes the faster one, which is channels-last on tensor cores and CPUs.

    Raises:
        UserError: the setting is unknown, or the network cannot be trained in it.
    """
    setting, device = cfg.recipe.channels_last, trainer.strategy.root_device
    if setting not in ("auto", True, False):
        raise UserError(f"recipe.channels_last={setting}: choose auto, true or false")
    if setting == "auto":
        return prefers_channels_last(network, device, mixed=str(trainer.precision).endswith("-mixed"))
    if setting and device.type == "cpu" and not prefers_channels_last(network, device):
        raise UserError(
            "recipe.channels_last=true: PyTorch crashes when it trains this network's narrow strided 1x1 convolutions "
            "on a CPU in this format: choose auto or false"
        )
    return bool(setting)


def prefers_channels_last(network: nn.Module, device: torch.device, mixed: bool = False) -> bool:
    """Whether a network is trained faster in channels-last, and can be; `mixed` means mixed precision."""
    return mixed if device.type != "cpu" else not any(map(_crashes_in_channels_last, network.modules()))


def _crashes_in_channels_last(module: nn.Module) -> bool:
    """Whether PyTorch 2.13's backward pass on CPUs writes past its memory. PEM's own backbones have no such layer."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < 16
    )


def build_predictor(cfg: DictConfig, checkpoint: Checkpoint) -> Predictor:
    """Make a predictor for a checkpoint, as the command line wants it."""
    how = cfg.inference
    return Predictor.from_parts(
        fast_network(checkpoint, cfg.network, how.precision, how.compile, cfg.device, **shorter(cfg)),
        checkpoint.info,
        TaskInference(cfg.task.name, checkpoint.info.thing_classes, **cfg.task.inference),
        resize=instantiate(cfg.recipe.eval_transform),
        device=cfg.device,
        classes=cfg.classes,
        batch_size=cfg.batch_size,
        **_views(cfg),
    )


def shorter(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of `shorten`."""
    given = OmegaConf.to_container(cfg.inference, resolve=True)
    return {key: cast(dict, given).get(key) for key in SHORTER}


SHORTER = ("decoder_layers", "queries")
"""Keys of `inference` that an exported file has done already."""


def build_export(cfg: DictConfig, checkpoint: Path) -> tuple[ExportOptions, Path]:
    """What to export, and the file's name.

    Raises:
        UserError: a value is impossible, or the name contradicts the format.
    """
    formats = {suffix: name for name, suffix in SUFFIXES.items()}
    given = None if cfg.output is None else Path(str(cfg.output))
    by_name = None if given is None else formats.get(given.suffix.lower())
    chosen = by_name or "onnx" if cfg.format == "auto" else cfg.format
    size, results = cfg.size, cfg.results
    if size is not None:
        sides = list(size) if isinstance(size, ListConfig) else []
        if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):
            raise UserError(f"size={size}: give height and width in pixels, e.g. [512,1024], or null for any size")
        size = sides[0], sides[1]
    if results not in (False, None, "panoptic", "semantic"):
        raise UserError(f"results={results}: choose false, panoptic or semantic")
    options = ExportOptions(str(chosen), str(cfg.precision), size, str(cfg.deform), results or None)
    suffix = SUFFIXES[options.format]
    if given is None:
        return options, checkpoint.with_suffix(suffix)
    if given.is_dir() or str(cfg.output).endswith(("/", os.sep)):
        return options, given / f"{checkpoint.stem}{suffix}"
    if by_name == options.format:
        return options, given
    if by_name is not None or given.suffix.lower() in _NOT_EXPORTED:
        raise UserError(f"output={given} does not end in {suffix}, as files of format={options.format} do")
    return options, given.with_name(f"{given.name}{suffix}")


_NOT_EXPORTED = (".ckpt", ".pt", ".pth", ".safetensors", ".bin", ".engine", ".trt", ".plan")
"""Endings of other files with networks."""


def calibration_images(cfg: DictConfig, count: int, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """RGB images of the training set as evaluation shows them to the network, uint8 [1, H, W, 3].

    Args:
        cfg: the experiment.
        count: how many, evenly spread over the set; all if it has fewer.
        size: height and width that they are resized to; None keeps evaluation's.

    Raises:
        UserError: an image cannot be read.
    """
    datamodule = build_datamodule(cfg)
    datamodule.prepare_data()
    dataset = datamodule.make_dataset("train", datamodule.eval_transform)
    count = min(count, len(dataset))
    for number in range(count):
        image = dataset[number * len(dataset) // count].image.permute(1, 2, 0).numpy()
        yield np.ascontiguousarray(image if size is None else resize(image, size))[None]


def _views(cfg: DictConfig) -> dict[str, Any]:
    """The settings of `TestTimeAugmentation` and `TiledInference`."""
    tile = cfg.inference.tile
    tiles = {"tile": list(tile) if isinstance(tile, ListConfig) else tile, "overlap": cfg.inference.overlap}
    try:
        scales = tuple(float(scale) for scale in cfg.inference.scales)
        return {"scales": scales, "flip": bool(cfg.inference.flip), **tiles}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"inference.scales={cfg.inference.scales}: give a list of numbers, e.g. [0.75,1.0,1.25]"
        ) from error


def _instantiate_all(group: DictConfig) -> list[Any]:
    return [instantiate(node) for node in group.values() if node is not None]


def command_line() -> list[str]:
    """The overrides that the experiment was composed with."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
