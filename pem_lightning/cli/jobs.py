"""What the commands do with a composed experiment: train, evaluate, predict, export, app."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import logging
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import lightning
from lightning import Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from pem_lightning import __version__
from pem_lightning.app.handlers import Limits, Segmenter, find_port, own_folder
from pem_lightning.callbacks.results import readable
from pem_lightning.callbacks.visualization import log_files
from pem_lightning.checkpoints import (
    Checkpoint,
    check_fits,
    load_network,
    load_weights,
    read_checkpoint,
    refuse_exported,
    show_report,
)
from pem_lightning.cli.build import (
    SHORTER,
    build_datamodule,
    build_export,
    build_module,
    build_predictor,
    build_trainer,
    calibration_images,
    command_line,
    shorter,
)
from pem_lightning.cli.errors import key_of
from pem_lightning.data.check import check_before_training
from pem_lightning.deploy.export import Calibration, Report, export_checkpoint
from pem_lightning.deploy.network import ExportedNetwork, Run, UInt8Network
from pem_lightning.deploy.sessions import Session, open_session
from pem_lightning.files import check_writable, remove_leftovers, write_file
from pem_lightning.inference.optimize import OptimizedNetwork, shorten
from pem_lightning.inference.predictor import fast_network
from pem_lightning.inference.segment_files import segment_files
from pem_lightning.inference.segment_with_ray import Cluster, segment_with_ray
from pem_lightning.installation import install_command, job_command
from pem_lightning.models.backbones import Backbone
from pem_lightning.models.flops import count_parameters
from pem_lightning.processes import Interrupted, leave
from pem_lightning.training.distributed import split_batch
from pem_lightning.training.resume import AtomicCheckpointIO
from pem_lightning.training.signals import requeue
from pem_lightning.types import DatasetInfo, UserError

log = logging.getLogger(__name__)


def train(cfg: DictConfig, checkpoint: Checkpoint | None = None) -> float:
    """Train, from where `checkpoint` stands if there is one; returns the task's best metric in percent, for sweeps."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.weights is not None and cfg.backbone.get("pretrained"):
        raise UserError("weights= and backbone.pretrained= both say where to start from: leave one of them out")
    if checkpoint is not None:
        _check_resumable(cfg, checkpoint)
    tidy_up(Path(cfg.output_dir), checkpoint and checkpoint.step)
    trainer = build_trainer(cfg)
    split = split_batch(cfg.recipe.global_batch_size, trainer.world_size, micro_batch_limit(cfg, trainer.world_size))
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
    if cfg.recipe.get("freeze") is not None and not (checkpoint or cfg.weights or cfg.backbone.get("pretrained")):
        log.warning("recipe.freeze=%s keeps random weights: say weights=...", cfg.recipe.freeze)
    if checkpoint is None:
        check_before_training(datamodule, cfg.dataset.check, cfg.network.get("num_queries"))
    # Lightning's own records of a checkpoint are plain data, too, so that nothing needs to be trusted.
    try:
        with _in_all_processes(trainer):
            trainer.fit(module, datamodule, ckpt_path=checkpoint and str(checkpoint.path), weights_only=True)
    except Interrupted as stop:
        if stop.signal == getattr(signal, "SIGUSR1", None) and trainer.is_global_zero:
            log.warning("%s", requeue())
        raise
    if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        trainer.strategy.checkpoint_io.check()
    scores = [c.best_model_score for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    score = next((s for s in scores if s is not None), trainer.callback_metrics.get(cfg.task.monitor))
    return float("nan") if score is None else float(score)


def micro_batch_limit(cfg: DictConfig, devices: int) -> int | None:
    """The largest micro-batch; with `auto` the module begins with all images and takes fewer if memory is short."""
    limit = cfg.recipe.micro_batch_size
    if limit == "auto" and devices > 1:
        raise UserError(
            "recipe.micro_batch_size=auto is for one device: see what it logs there, and set that number for several"
        )
    if isinstance(limit, int) or limit in (None, "auto"):
        return None if limit == "auto" else limit
    raise UserError(f"recipe.micro_batch_size={limit}: choose a whole number, null for no limit, or auto")


def evaluate(cfg: DictConfig, checkpoint: Checkpoint | None = None) -> float:
    """Evaluate a checkpoint on the validation images; returns the task's metric in percent."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    return _validate(cfg, _take_network(cfg, checkpoint))[cfg.task.monitor]


def _validate(cfg: DictConfig, checkpoint: Checkpoint, network: nn.Module | None = None) -> dict[str, float]:
    """The metrics of a checkpoint, or of another network with its classes, on the validation images."""
    trainer = build_trainer(cfg)
    datamodule = build_datamodule(cfg)
    _check_classes(checkpoint, datamodule.info)
    speed = cfg.inference.precision, cfg.inference.compile
    if network is None and checkpoint.session is not None:
        network = ExportedNetwork(checkpoint.session, *speed)
    # In the layout of training, so that numbers are those of its validation to the last digit.
    module = build_module(cfg, datamodule.info, trainer=trainer, network=network)
    module.evaluated_step = checkpoint.step
    if network is None:
        load_network(module.network, checkpoint)
        module.network = shorten(module.network, **shorter(cfg))
        if speed != ("float32", None):  # else to the digits of training
            module.network = OptimizedNetwork(module.network, *speed)
    if signal.getsignal(signal.SIGTERM) is leave:  # Lightning's own handler would talk to the other processes
        back = LambdaCallback(on_validation_start=lambda *_: signal.signal(signal.SIGTERM, leave))
        trainer.callbacks.append(back)  # type: ignore[attr-defined]
    with _in_all_processes(trainer):
        metrics = trainer.validate(module, datamodule, verbose=False)
    return {name: float(value) for name, value in metrics[0].items()}


def predict(cfg: DictConfig, checkpoint: Checkpoint | None = None) -> float:
    """Segment images, videos or a stream and write the results."""
    checkpoint = _take_network(cfg, checkpoint)
    source = list(cfg.input) if OmegaConf.is_list(cfg.input) else cfg.input
    formats = list(cfg.formats) if OmegaConf.is_list(cfg.formats) else cfg.formats
    if cfg.launcher.name == "ray":
        _predict_with_ray(cfg, checkpoint, source, formats)
        return 0.0
    segment_files(
        build_predictor(cfg, checkpoint),
        source,
        cfg.output,
        save=cfg.save,
        every=cfg.every,
        max_frames=cfg.max_frames,
        show_fps=cfg.show_fps,
        formats=formats,
    )
    return 0.0


def _predict_with_ray(cfg: DictConfig, checkpoint: Checkpoint, source: Any, formats: Any) -> None:
    """Segment images on a Ray cluster; the network travels to the workers, of an exported file its path does."""
    where = cfg.launcher
    gpus = 0.0 if str(cfg.device) == "cpu" and where.gpus is None else where.gpus
    cluster = Cluster(where.address, where.workers, where.cpus, gpus)
    files = [checkpoint.path, *checkpoint.path.parent.glob(f"{glob.escape(checkpoint.path.stem)}.bin")]  # OpenVINO's
    keys = ("network", "task", "inference", "classes", "batch_size", "ema", "save", "formats")
    config = cast(dict, OmegaConf.to_container(cfg, resolve=True))
    decisive = [__version__, config["recipe"]["eval_transform"], *(config[key] for key in keys)]
    parts = [json.dumps(decisive).encode(), *(path.read_bytes() for path in files)]
    if checkpoint.session is not None:
        session = open_session(checkpoint.path.absolute(), threads=cluster.cpus)
        checkpoint = checkpoint._replace(session=session)
    segment_with_ray(
        partial(build_predictor, cfg, checkpoint),
        source,
        cfg.output,
        cfg.task.name,
        checkpoint.info,
        save=cfg.save,
        formats=formats,
        settings=hashlib.sha256(b"".join(parts)).hexdigest(),
        cluster=cluster,
    )


def export(cfg: DictConfig, checkpoint: Checkpoint | None = None) -> float:
    """Write a checkpoint's network as a file for another runtime; returns the file's metric in percent, or NaN."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = _take_network(cfg, checkpoint)
    refuse_exported(checkpoint.path)
    options, output = build_export(cfg, Path(str(cfg.checkpoint)))  # of a network that ships the name
    check_writable(output.parent)
    if cfg.evaluate not in ("auto", True, False):
        raise UserError(f"evaluate={cfg.evaluate}: choose auto, true or false")
    int8 = options.precision == "int8"
    calibration = _calibration(cfg, checkpoint, options.size) if int8 else None
    before = _validate(cfg, checkpoint) if cfg.evaluate is True or (int8 and cfg.evaluate == "auto") else None

    def measure(session: Session) -> dict[str, float]:
        return _validate(cfg, checkpoint, ExportedNetwork(session))

    report = export_checkpoint(
        _as_configured(cfg, checkpoint),
        output,
        options,
        calibration=calibration,
        measure=None if before is None else measure,
    )
    for name, text in _report_lines(cfg, report, before):
        print(f"{name:12} {text}")
    after = report.metadata.quality
    if before is None or after is None:
        return float("nan")
    if (drop := before[cfg.task.monitor] - after[cfg.task.monitor]) > cfg.max_drop:
        log.warning(
            "%s is %.2f below the checkpoint's, more than max_drop=%s: try more images (calibration=300), "
            "accuracy_control=true (format=openvino), or precision=float16",
            cfg.task.monitor.removeprefix("val/"),
            drop,
            cfg.max_drop,
        )
    return after[cfg.task.monitor]


def app(cfg: DictConfig, checkpoint: Checkpoint | None = None) -> float:
    """Serve a page that segments photographs and videos, until a signal ends it."""
    if find_spec("gradio") is None:
        raise UserError(f"the page needs the package gradio: {install_command('app')}")
    port = find_port(cfg.host, cfg.port)
    trained = _take_network(cfg, checkpoint)
    how = cfg.inference

    def make_network(precision: str) -> nn.Module:
        return fast_network(trained, cfg.network, precision, how.compile, cfg.device, **shorter(cfg))

    limits = Limits(cfg.max_megabytes, cfg.max_pixels, cfg.max_seconds)
    segmenter = Segmenter(build_predictor(cfg, trained), make_network, how.precision, limits)
    with own_folder() as folder:
        from pem_lightning.app.page import serve

        serve(segmenter, cfg.host, port, folder)
    return 0.0


def _as_configured(cfg: DictConfig, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the task's rules and the size of images that the command line wants."""
    config = cast(dict, OmegaConf.to_container(cfg, resolve=True))
    recipe = {**checkpoint.config["recipe"], "eval_transform": config["recipe"]["eval_transform"]}
    ours = {key: config[key] for key in ("network", "backbone", "task", "inference")}
    kept = checkpoint.config.keys() - {"trainer", "logger", "callbacks", "output_dir", "job"}
    overrides = [o for o in command_line() if o in checkpoint.overrides or key_of(o).split(".")[0] in kept]
    overrides = [o for o in overrides if key_of(o).removeprefix("inference.") not in SHORTER]  # the file has done it
    return checkpoint._replace(config={**checkpoint.config, **ours, "recipe": recipe}, overrides=overrides)


def _calibration(cfg: DictConfig, checkpoint: Checkpoint, size: tuple[int, int] | None) -> Calibration:
    """What int8 needs."""
    count = cfg.calibration
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"calibration={count}: give a number of images from 1 on, e.g. 64")

    def measure(run: Run) -> float:
        return _validate(cfg, checkpoint, UInt8Network(run))[cfg.task.monitor]

    images = calibration_images(cfg, count, size)
    return Calibration(images, measure if cfg.accuracy_control else None, float(cfg.max_drop))


def _report_lines(cfg: DictConfig, report: Report, before: Mapping[str, float] | None) -> Iterator[tuple[str, str]]:
    """What is said about an exported file."""
    metadata = report.metadata
    yield "wrote", f"{' and '.join(readable(path) for path in report.files)}, {report.megabytes:.1f} MB"
    if report.deviation is not None:
        yield "deviation", f"{report.deviation:.1e} of the largest logit, {report.sign_flips:.1e} of the signs"
    if (pixels := metadata.checks.get("pixels")) is not None:
        yield "pixels", f"{100 * pixels:.4f} % differ"
    if report.milliseconds is not None:
        yield "time", f"{report.milliseconds:.0f} ms, PyTorch {report.pytorch_milliseconds:.0f} ms"
    after = metadata.quality
    if before is not None and after is not None:
        for name in dict.fromkeys((cfg.task.monitor, "val/mIoU")):
            if name in before:
                change = f"{after[name] - before[name]:+.2f}"
                yield name.removeprefix("val/"), f"{after[name]:.2f}, the checkpoint's {before[name]:.2f} ({change})"
    if metadata.results is None:
        yield (
            "predict",
            f"{job_command('predict')} {shlex.quote(f'checkpoint={readable(report.files[0])}')} input=IMAGE",
        )


@contextmanager
def _in_all_processes(trainer: Trainer) -> Iterator[None]:
    """Pass an interruption on to the processes that Lightning has started, which may not have got the signal."""
    try:
        yield
    except Interrupted:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        raise


def _take_network(cfg: DictConfig, checkpoint: Checkpoint | None) -> Checkpoint:
    """Take the network as it was trained, whatever conf/ says today, unless the command line does."""
    checkpoint = checkpoint or read_checkpoint(cfg.checkpoint)
    if checkpoint.raw is not None:
        averaged = "averaged weights (ema=false takes the last step's own)"
        log.info("%s: using its %s", checkpoint.path, averaged if cfg.ema else "last step's own weights")
        if not cfg.ema:
            checkpoint = checkpoint._replace(network=checkpoint.raw)
    asked_for = {key_of(o).split(".")[0] for o in set(command_line()) - set(checkpoint.overrides)}
    changed = asked_for & {"network", "backbone", "ablation", "decoder_layers", "num_queries"}
    shortened = {f"inference.{key}" for key, value in shorter(cfg).items() if value is not None}
    if checkpoint.session is not None and (changed or shortened or not cfg.ema):
        key = min(changed | shortened, default="ema")
        raise UserError(f"{key}= cannot change {checkpoint.path}, which is exported: export the checkpoint with it")
    if not changed:
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


def _check_resumable(cfg: DictConfig, checkpoint: Checkpoint) -> None:
    if not checkpoint.resumable:
        raise UserError(f"{checkpoint.path} has nothing but weights: start a new training from them by weights=")
    frozen = checkpoint.config["recipe"].get("freeze")
    if frozen != cfg.recipe.get("freeze"):  # the optimiser has no state for what was frozen
        raise UserError(
            f"{checkpoint.path} was trained with recipe.freeze={frozen or 'null'}: go on with that, or start a new "
            "training by weights="
        )
    trained = checkpoint.config["recipe"].get("global_batch_size")
    if trained != cfg.recipe.global_batch_size:
        log.warning("global_batch_size was %s: the data do not go on where they were", trained)


@rank_zero_only
def tidy_up(folder: Path, step: int | None) -> None:
    """Make a run's folder ready: without half-written files, and with logs that end where training begins.

    Args:
        folder: the run's.
        step: where a resumed run goes on; None for a new run.
    """
    remove_leftovers(folder)
    earlier = log_files(folder / "csv")
    if step is None:
        for path in earlier[:-1]:
            path.unlink()
    elif merged := _merge_logs(earlier, step):
        target = write_file(folder / "csv" / f"metrics_before_step_{step:07d}.csv", merged)
        for path in earlier:
            if path != target:
                path.unlink(missing_ok=True)


def _merge_logs(paths: Sequence[Path], step: int) -> str:
    """One csv log of several, with the rows of the first `step` steps; later files win. Empty if there is nothing."""
    rows: dict[int, dict[str, str]] = {}
    for path in filter(Path.is_file, paths):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                # A row that a kill or a full disk cut off has too few fields, or too many.
                if None in row or None in row.values() or not row["step"].isdigit() or int(row["step"]) >= step:
                    continue
                rows.setdefault(int(row["step"]), {}).update({k: v for k, v in row.items() if v})
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({name for row in rows.values() for name in row}), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[number] for number in sorted(rows))
    return text.getvalue()
