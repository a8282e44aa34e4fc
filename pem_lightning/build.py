"""From a composed experiment to its parts: trainer, data module, module, predictor."""

from __future__ import annotations

from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf

from pem_lightning.checkpoints import Checkpoint, load_network
from pem_lightning.data import SegmentationDataModule
from pem_lightning.errors import UserError
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.inference.predictor import Predictor
from pem_lightning.inference.task import TaskInference
from pem_lightning.module import PEMModule
from pem_lightning.types import DatasetInfo


def build_trainer(cfg: DictConfig) -> Trainer:
    """Make the trainer with its callbacks and loggers; `precision: auto` is decided here.

    Raises:
        UserError: a GPU is asked for where there is none.
    """
    settings: dict[str, Any] = {}
    has_gpu = torch.cuda.is_available()
    if cfg.trainer.accelerator in ("gpu", "cuda") and not has_gpu:
        raise UserError("trainer.accelerator=gpu, but torch finds no GPU here: choose trainer=cpu or trainer=auto")
    if cfg.trainer.precision == "auto":
        settings["precision"] = "16-mixed" if has_gpu and cfg.trainer.accelerator != "cpu" else "32-true"
    loggers = _instantiate_all(cfg.logger)
    callbacks = _instantiate_all(cfg.callbacks)
    if not loggers:  # Lightning refuses to watch the learning rate for nobody
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False, **settings)


def build_datamodule(cfg: DictConfig, world_size: int) -> SegmentationDataModule:
    """Make the data module; the recipe's batch is shared out between devices.

    Raises:
        UserError: it cannot be shared out evenly, or leaves a device with less than two images.
    """
    total = cfg.recipe.batch_size
    if total < 2 * world_size:
        # Context-based self-modulation normalises one value per image and channel over the batch.
        raise UserError(f"recipe.batch_size={total} is too small: batch normalisation needs two images per device")
    if total % world_size:
        raise UserError(
            f"recipe.batch_size={total} cannot be shared out between {world_size} devices: choose a multiple"
        )
    return instantiate(cfg.dataset.datamodule, batch_size=total // world_size)


def build_module(cfg: DictConfig, info: DatasetInfo) -> PEMModule:
    """Make network, losses and optimiser for a data set's classes."""
    return PEMModule(
        network=instantiate(cfg.network, num_classes=info.num_classes),
        criterion=instantiate(cfg.criterion, num_classes=info.num_classes),
        inference=TaskInference(cfg.task.name, info.thing_classes, **cfg.task.inference),
        info=info,
        parameter_groups=instantiate(cfg.recipe.parameter_groups),
        optimizer=instantiate(cfg.recipe.optimizer),
        schedule=instantiate(cfg.recipe.schedule),
        record={"config": _plain(cfg), "overrides": command_line()},
        **_views(cfg),
    )


def build_predictor(cfg: DictConfig, checkpoint: Checkpoint) -> Predictor:
    """Make a predictor for a checkpoint, as the command line wants it."""
    network = instantiate(cfg.network, num_classes=checkpoint.info.num_classes)
    load_network(network, checkpoint)
    return Predictor.from_parts(
        OptimizedNetwork(network, cfg.inference.precision, cfg.inference.compile),
        checkpoint.info,
        TaskInference(cfg.task.name, checkpoint.info.thing_classes, **cfg.task.inference),
        resize=instantiate(cfg.recipe.eval_transform),
        device=cfg.device,
        classes=cfg.classes,
        batch_size=cfg.batch_size,
        **_views(cfg),
    )


def _views(cfg: DictConfig) -> dict[str, Any]:
    """The settings of `TestTimeAugmentation`."""
    try:
        return {"scales": tuple(float(scale) for scale in cfg.inference.scales), "flip": bool(cfg.inference.flip)}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"inference.scales={cfg.inference.scales}: give a list of numbers, e.g. [0.75,1.0,1.25]"
        ) from error


def _instantiate_all(group: DictConfig) -> list[Any]:
    return [instantiate(node) for node in group.values() if node is not None]


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def command_line() -> list[str]:
    """The overrides that the experiment was composed with."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
