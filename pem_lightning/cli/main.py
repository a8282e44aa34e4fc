"""Where Hydra meets Lightning: the three jobs, from a composed experiment to a result."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, cast

import hydra
import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, open_dict

from pem_lightning.checkpoints import (
    Checkpoint,
    check_fits,
    load_network,
    load_weights,
    read_checkpoint,
    show_report,
)
from pem_lightning.cli.build import (
    build_datamodule,
    build_module,
    build_predictor,
    build_trainer,
    command_line,
)
from pem_lightning.cli.errors import (
    CONF,
    check_composes,
    key_of,
    take_over_choices,
    user_error_behind,
)
from pem_lightning.cli.overrides import stay_in_resumed_run, tidy_up
from pem_lightning.cli.sweeps import plan_sweep, run_job, run_sweep
from pem_lightning.files import check_writable
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.inference.segment_files import segment_files
from pem_lightning.models.backbones import Backbone
from pem_lightning.models.flops import count_parameters
from pem_lightning.training.distributed import split_batch
from pem_lightning.training.resume import AtomicCheckpointIO
from pem_lightning.types import DatasetInfo, UserError

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float:
    """Train; returns the best value of the task's metric in percent, for sweeps."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    _check_one_start(cfg)
    checkpoint = _checkpoint_to_resume(cfg)
    trainer = build_trainer(cfg)
    split = split_batch(cfg.recipe.global_batch_size, trainer.world_size, cfg.recipe.micro_batch_size)
    datamodule = build_datamodule(cfg, split.per_device)
    module = build_module(cfg, datamodule.info, trainer=trainer, micro_batches=split.micro_batches)
    if checkpoint is not None:
        check_fits(module.network, checkpoint)
        log.info("resuming %s at step %d", checkpoint.path, checkpoint.step)
    elif cfg.weights is not None:
        report = load_weights(module.network, str(cfg.weights), datamodule.info)
        if trainer.is_global_zero:
            show_report(report)
    elif cfg.backbone.get("pretrained"):  # only here: whoever has a checkpoint has the weights
        cast(Backbone, module.network.backbone).load_pretrained(cfg.backbone.pretrained)
    size = count_parameters(module.network) / 1e6
    log.info(
        "PEM, %s, %.2f M parameters, on %s in %s",
        cfg.backbone.name,
        size,
        trainer.strategy.root_device,
        trainer.precision,
    )
    if cfg.backbone.norm == "frozen" and not (checkpoint or cfg.weights or cfg.backbone.get("pretrained")):
        log.warning(
            "frozen batch normalisation expects pretrained weights, this run starts from random ones: "
            "say weights=..., or backbone.norm=batch, which learns better"
        )
    # Lightning's own records of a checkpoint are plain data, too, so that nothing needs to be trusted.
    trainer.fit(module, datamodule, ckpt_path=checkpoint and str(checkpoint.path), weights_only=True)
    if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        trainer.strategy.checkpoint_io.check()
    scores = [c.best_model_score for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    score = next((s for s in scores if s is not None), trainer.callback_metrics.get(cfg.task.monitor))
    return float("nan") if score is None else float(score)


def evaluate(cfg: DictConfig) -> float:
    """Evaluate a checkpoint on the validation images; returns the task's metric in percent."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = _take_network(cfg)
    trainer = build_trainer(cfg)
    datamodule = build_datamodule(cfg)
    _check_classes(checkpoint, datamodule.info)
    # In the layout of training, so that numbers are those of its validation to the last digit.
    module = build_module(cfg, datamodule.info, trainer=trainer)
    load_network(module.network, checkpoint)
    if cfg.inference.precision != "float32" or cfg.inference.compile is not None:  # else to the digits of training
        module.network = OptimizedNetwork(module.network, cfg.inference.precision, cfg.inference.compile)
    metrics = trainer.validate(module, datamodule, verbose=False)
    return float(metrics[0][cfg.task.monitor])


def predict(cfg: DictConfig) -> float:
    """Segment images, videos or a stream and write the results."""
    predictor = build_predictor(cfg, _take_network(cfg))
    segment_files(
        predictor,
        cfg.input,
        cfg.output,
        save=cfg.save,
        every=cfg.every,
        max_frames=cfg.max_frames,
        show_fps=cfg.show_fps,
    )
    return 0.0


def _take_network(cfg: DictConfig) -> Checkpoint:
    """Read the checkpoint; the network is the trained one, whatever conf/ says today, unless the command line does."""
    checkpoint = read_checkpoint(cfg.checkpoint)
    if checkpoint.raw is not None:
        averaged = "averaged weights (averaged_weights=false takes the last step's own)"
        log.info("%s: using its %s", checkpoint.path, averaged if cfg.averaged_weights else "last step's own weights")
        if not cfg.averaged_weights:
            checkpoint = checkpoint._replace(network=checkpoint.raw)
    asked_for = {key_of(o).split(".")[0] for o in set(command_line()) - set(checkpoint.overrides)}
    if not asked_for & {"network", "backbone", "ablation", "decoder_layers", "num_queries"}:
        with open_dict(cfg):
            cfg.network = checkpoint.config["network"]
            cfg.backbone = checkpoint.config["backbone"]
    return checkpoint


def _check_classes(checkpoint: Checkpoint, info: DatasetInfo) -> None:
    if checkpoint.info.class_names != info.class_names:
        raise UserError(
            f"{checkpoint.path} was trained on the {checkpoint.info.num_classes} classes of {checkpoint.info.name}, "
            f"which are not the {info.num_classes} of dataset={info.name}: choose a data set with the same classes"
        )


def _check_one_start(cfg: DictConfig) -> None:
    if cfg.weights is not None and cfg.backbone.get("pretrained"):
        raise UserError("weights= and backbone.pretrained= both say where to start from: leave one of them out")


def _checkpoint_to_resume(cfg: DictConfig) -> Checkpoint | None:
    """Read the checkpoint to go on from, and make the run's folder ready."""
    checkpoint = None
    if cfg.resume is not None:
        checkpoint = read_checkpoint(cfg.resume)
        if checkpoint.step >= cfg.trainer.max_steps > 0:
            raise UserError(
                f"{checkpoint.path} is trained to step {checkpoint.step} of {cfg.trainer.max_steps} already: "
                "raise recipe.max_steps to train on"
            )
        if not checkpoint.resumable:
            raise UserError(f"{checkpoint.path} has nothing but weights: start a new training from them by weights=")
        trained = checkpoint.config["recipe"].get("global_batch_size")
        if trained != cfg.recipe.global_batch_size:
            log.warning("global_batch_size was %s: the data do not go on where they were", trained)
    tidy_up(Path(cfg.output_dir), checkpoint and checkpoint.step)
    return checkpoint


JOBS: dict[str, Callable[[DictConfig], float]] = {"train": train, "evaluate": evaluate, "predict": predict}


def main(job: str) -> None:
    """Run one of `JOBS` from the command line, or a sweep. A user's mistake ends in one line and exit code 2."""

    def task(cfg: DictConfig) -> float:
        """What Hydra calls with the composed experiment."""
        # Lightning calls a function of PyTorch's that PyTorch has renamed; nobody else can mend it.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning.*")
        # A checkpoint has the weights after the step that it is of, as it should.
        warnings.filterwarnings(
            "ignore", message="Using ModelCheckpoint with manual optimization", module="lightning.*"
        )
        # A resumed run's folders are not empty, and its earlier log has another name by then (see `tidy_up`).
        for expected in ("Experiment logs directory", "Checkpoint directory"):
            warnings.filterwarnings("ignore", message=expected, module="lightning.*")
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return run_job(JOBS[job], cfg)
        try:
            return JOBS[job](cfg)
        except Exception as error:
            message = user_error_behind(error)
            if message is None:
                raise
            _fail(message)

    try:
        if job != "train":
            sys.argv[1:] = take_over_choices(sys.argv[1:])
        sweep = plan_sweep(job, sys.argv[1:])
        if sweep is None:
            cfg = check_composes(job, sys.argv[1:])
            sys.argv[1:] = stay_in_resumed_run(cfg, sys.argv[1:])
            check_writable(Path(cfg.hydra.run.dir))
        else:
            sys.argv[1:] = sweep.arguments
    except UserError as error:
        _fail(str(error))
    run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=job)(task)
    if sweep is None:
        run()
    elif code := run_sweep(job, sweep, run):
        sys.exit(code)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
