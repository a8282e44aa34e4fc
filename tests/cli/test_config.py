"""Every shipped config composes and instantiates; mistakes on the command line become one line that names the cure."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from omegaconf import OmegaConf
from torch import nn

from pem_lightning.callbacks import ConfusionMatrix, PredictionPanels, Results, SavePredictions, WorstImages
from pem_lightning.cli import errors
from pem_lightning.cli.build import build_datamodule, build_module, build_trainer, wants_channels_last
from pem_lightning.cli.errors import explain, folder_name, user_error_behind
from pem_lightning.cli.jobs import micro_batch_limit
from pem_lightning.data import CITYSCAPES
from pem_lightning.installation import CONF
from pem_lightning.models.backbones import BACKBONES
from pem_lightning.models.pem import PEM
from pem_lightning.types import UserError
from tests.jobs import compose

HAS_PLUGINS = importlib.util.find_spec("hydra_plugins") is not None
needs_plugins = pytest.mark.skipif(not HAS_PLUGINS, reason="needs requirements-sweep.txt")


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


TASKS = ("instance", "panoptic", "semantic")
SEMANTIC = ("camvid", "semantic_folder")
PAIRS = [(d, t) for d in choices("dataset") for t in TASKS if d not in SEMANTIC or t == "semantic"]


def root_of(folder):
    """A data set's folder, with the files that describe its classes."""
    (folder / "classes.yaml").write_text("[road, car]")
    categories = [{"id": 7, "name": "road", "isthing": 0}, {"id": 9, "name": "car", "isthing": 1}]
    (folder / "annotations").mkdir()
    content = {"images": [], "annotations": [], "categories": categories}
    (folder / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    content["annotations"] = [{"id": 1, "image_id": 5, "category_id": 9, "segmentation": [[0, 0, 9, 0, 9, 9]]}]
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return f"dataset.root={folder}"


@pytest.mark.parametrize("backbone", BACKBONES)  # timm's: see tests/models/test_timm.py
def test_every_backbone_is_a_choice(backbone):
    cfg = compose("train", "dataset=ade20k", f"backbone={backbone}")
    assert cfg.backbone.norm in ("frozen", "batch")
    assert cfg.weights == (backbone if backbone.startswith("efficientnet") else None)
    with torch.device("meta"):
        assert isinstance(instantiate(cfg.network, num_classes=19), PEM)


@pytest.mark.parametrize(("dataset", "task"), PAIRS)
def test_every_experiment_instantiates(dataset, task, tmp_path):
    cfg = compose("train", f"dataset={dataset}", f"task={task}", "backbone=resnet18", "decoder_layers=1")
    OmegaConf.update(cfg, *root_of(tmp_path).split("="))
    cfg.output_dir = str(tmp_path)
    trainer = build_trainer(cfg)
    datamodule = build_datamodule(cfg)
    with torch.device("meta"):
        module = build_module(cfg, datamodule.info)
    assert trainer.max_steps == cfg.recipe.max_steps
    assert datamodule.task == task == module.inference.task
    things = 2 if task == "instance" else 3  # and the background
    classes = {"ade20k": 150, "coco_panoptic": 2, "coco_instances": things, "semantic_folder": 2, "cityscapes": 19}
    classes["camvid"] = 11
    assert datamodule.info.num_classes == module.criterion.num_classes
    assert datamodule.info.num_classes == classes.get(dataset, datamodule.info.num_classes)
    optimizer = module.optimizer(module.parameter_groups(module.network))
    assert max(module.schedule(optimizer).base_lrs) == cfg.recipe.optimizer.lr
    for job in ("evaluate", "predict", "export") if task == "semantic" else ():  # the task that all data sets have
        other = compose(job, f"dataset={dataset}", f"task={task}", "backbone=resnet18", "decoder_layers=1")
        assert other.network == cfg.network
        assert "weights" not in other


def test_without_cuda_the_cpu_is_taken_and_not_apples_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = compose("train", "logger=none", "callbacks=none")
    cfg.output_dir = str(tmp_path)
    assert build_trainer(cfg).strategy.root_device.type == "cpu"


@pytest.mark.parametrize("logger", choices("logger"))
def test_every_logger_instantiates(logger, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cfg = compose("train", f"logger={logger}", "trainer=cpu", "callbacks.panels=null")
    cfg.output_dir = str(tmp_path)
    trainer = build_trainer(cfg)
    assert len(trainer.loggers) == {"none": 0, "csv": 1, "tensorboard": 2, "wandb": 3}[logger]
    kinds = {type(c) for c in trainer.callbacks}
    assert Results in kinds
    assert PredictionPanels not in kinds


def test_an_evaluation_does_all_it_can(tmp_path):
    cfg = compose("evaluate", f"save_predictions={tmp_path}/saved")
    cfg.output_dir = str(tmp_path)
    callbacks = build_trainer(cfg).callbacks
    assert {ConfusionMatrix, PredictionPanels, Results, SavePredictions, WorstImages} <= {type(c) for c in callbacks}


@pytest.mark.parametrize("trainer", ["gpu", "ddp"])
def test_gpu_trainers_compose(trainer):
    assert compose("train", f"trainer={trainer}").trainer.accelerator == "gpu"


@pytest.mark.parametrize("task", TASKS)
def test_the_papers_numbers_for_cityscapes(task):
    cfg = compose("train", "dataset=cityscapes", f"task={task}")
    assert (cfg.backbone.name, cfg.recipe.max_steps, cfg.recipe.global_batch_size) == ("resnet50", 90000, 32)
    assert list(cfg.recipe.train_transform.crop_size) == [512, 1024]
    assert cfg.recipe.train_transform.shortest_edges == [int(x * 0.1 * 1024) for x in range(5, 21)]
    assert (cfg.recipe.optimizer.lr, cfg.recipe.gradient_clip, cfg.criterion.num_points) == (7e-4, 0.01, 12544)


@pytest.mark.parametrize(("task", "edge"), [("panoptic", 640), ("instance", 640), ("semantic", 512)])
def test_the_papers_numbers_for_ade20k(task, edge):
    cfg = compose("train", "dataset=ade20k", f"task={task}")
    recipe = cfg.recipe
    assert (cfg.backbone.name, cfg.backbone.norm, recipe.global_batch_size) == ("resnet50", "frozen", 32)
    assert (recipe.max_steps, recipe.optimizer.lr, recipe.schedule.end_lr) == (160000, 4e-4, 1e-6)
    assert recipe.train_transform.crop_size == [edge, edge]
    assert recipe.train_transform.shortest_edges == [int(x * 0.1 * edge) for x in range(5, 21)]
    assert (recipe.train_transform.max_size, recipe.train_transform.pad) == (4 * edge, True)
    assert (recipe.eval_transform.shortest_edge, recipe.eval_transform.max_size) == (edge, 4 * edge)
    assert (recipe.gradient_clip, cfg.criterion.num_points) == (0.01, 12544)


def test_choices_that_other_choices_make():
    assert compose().backbone.name == "stdc1"
    assert compose("train", "backbone=efficientnet_lite0", "weights=null").weights is None
    assert compose("train", "dataset=cityscapes", "backbone=stdc2").network.backbone == "stdc2"
    own = compose("train", "dataset=coco_panoptic")
    assert (own.backbone.name, own.weights) == ("efficientnet_lite0",) * 2
    assert (own.recipe.max_steps, own.recipe.global_batch_size, own.recipe.ema_decay) == (2000, 4, 0.98)
    for dataset, masks, lr in (("coco_instances", "pyramid", 5e-4), ("semantic_folder", "levels", 1.5e-3)):
        other = compose("train", f"dataset={dataset}")
        rates = {part: {**own.recipe[part], "lr": lr} for part in ("optimizer", "parameter_groups")}
        assert (other.recipe, other.backbone) == ({**own.recipe, **rates, "mask_features": masks}, own.backbone)
        assert other.network.mask_features == masks
    assert compose("train", "dataset=camvid").network.mask_features == "levels"
    assert compose("train", "dataset=coco_panoptic", "recipe=ade20k_panoptic").recipe.max_steps == 160000
    camvid = compose("train", "dataset=camvid")
    assert (camvid.task.name, camvid.backbone.name, camvid.weights) == ("semantic", *["efficientnet_lite0"] * 2)
    assert (camvid.recipe.eval_transform.shortest_edge, camvid.recipe.eval_transform.max_size) == (360, 1440)
    assert compose("train", "dataset=camvid", "task=panoptic", "backbone=stdc1").task.name == "panoptic"
    # What a checkpoint overrides for one task must exist when it is evaluated as another.
    settings = [set(compose("train", f"task={task}").task.inference) for task in TASKS]
    assert settings[0] == settings[1] == settings[2]
    plain, scaled = (
        OmegaConf.to_container(compose("train", *o), resolve=False) for o in ([], ["scale=synthetic_small"])
    )
    assert {key for key in plain if plain[key] != scaled[key]} == {"dataset", "recipe"}


@pytest.mark.parametrize(
    "name", [pytest.param(s, marks=needs_plugins if s == "optuna" else ()) for s in choices("sweep")]
)
def test_sweeps_vary_and_leave_the_experiment_alone(name):
    assert set(OmegaConf.load(CONF / "sweep" / f"{name}.yaml")) <= {"defaults", "hydra"}
    hydra = errors.compose("train", [f"sweep={name}", "dataset=cityscapes"]).hydra
    assert Path(hydra.sweep.dir).parts[:2] == ("multirun", name)
    if name in ("paper_ablations", "paper_attention"):
        values = hydra.sweeper.params.ablation.split(",")
        assert set(values) <= set(choices("ablation"))
        assert name == "paper_attention" or {*values, "mask_levels"} == set(choices("ablation"))


@pytest.mark.parametrize(
    "launcher", [pytest.param(n, marks=needs_plugins) for n in ("slurm", "joblib", "submitit_local")]
)
def test_every_launcher_composes(launcher):
    launcher = errors.compose("train", [f"hydra/launcher={launcher}"]).hydra.launcher
    assert launcher._target_.startswith("hydra_plugins.")


@pytest.mark.parametrize("launcher", choices("launcher"))
def test_every_launcher_of_predict_composes(launcher):
    cfg = compose("predict", "checkpoint=x", "input=y", f"launcher={launcher}")
    assert cfg.launcher.name == launcher
    assert compose("predict", "checkpoint=x", "input=y").launcher == {"name": "local"}


@pytest.mark.parametrize("choice", ["hydra/launcher/joblib", "hydra/launcher/submitit_slurm", "hydra/sweeper/optuna"])
def test_a_missing_package_is_named(choice):
    """As Hydra words it where its plugins are not installed."""
    group = choice.rsplit("/", 1)[0]
    error = HydraException(f"In 'train': Could not find '{choice}'\n\nAvailable options in '{group}':\n\tbasic\n")
    assert explain(error, "train") == f"{choice} needs an optional package: pip install -r requirements-sweep.txt"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("3_", "3"),
        ("3_ablation-no_csm_seed-0", "3_ablation-no_csm_seed-0"),
        ("3_ablation-[no_csm,no_masking]", "3_ablation-no_csm+no_masking"),
        ("3_dataset.root-'/a b/c'", "3_dataset.root--ab-c"),
        ("x" * 300, "x" * 120),
    ],
)
def test_names_of_job_folders(text, name):
    assert OmegaConf.create({"text": text, "name": "${folder_name:${text}}"}).name == name == folder_name(text)


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_test_time_augmentation_is_set_on_the_command_line(job):
    views = compose(job, "task=semantic", "decoder_layers=1", "inference.scales=[1,1.5]", "inference.flip=true")
    with torch.device("meta"):
        augmentation = build_module(views, CITYSCAPES).augmentation
        assert (sorted(augmentation.scales), augmentation.flip) == ([1.0, 1.5], True)
        for scales in ("[large]", "1.5"):
            with pytest.raises(UserError, match=r"inference\.scales=.*give a list of numbers"):
                build_module(compose(job, "decoder_layers=1", f"inference.scales={scales}"), CITYSCAPES)


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_tiles_are_set_on_the_command_line(job):
    with torch.device("meta"):
        assert build_module(compose(job, "decoder_layers=1"), CITYSCAPES).tiled.tile is None
        tiles = compose(job, "decoder_layers=1", "inference.tile=[512,1024]", "inference.overlap=64")
        tiled = build_module(tiles, CITYSCAPES).tiled
        assert (tiled.tile, tiled.overlap) == ((512, 1024), 64)
        for setting in ("tile=[32,1024]", "overlap=512"):
            impossible = compose(job, "decoder_layers=1", "inference.tile=[512,1024]", f"inference.{setting}")
            with pytest.raises(UserError, match=rf"inference\.{setting.split('=')[0]}="):
                build_module(impossible, CITYSCAPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["recipe.max_step=3"],
            r"there is no key recipe\.max_step \(did you mean recipe\.max_steps\?\); see .* --cfg job",
        ),
        (
            ["task=panoptc"],
            r"there is no task=panoptc \(did you mean panoptic\?\); choose one of: instance, panoptic",
        ),
        (["dataset=nowhere"], r"there is no dataset=nowhere; choose one of: ade20k, camvid, cityscapes, .*, synthetic"),
        (["recipe=ade20k_panotic"], r"there is no recipe=ade20k_panotic \(did you mean ade20k_panoptic\?\)"),
        (["bakbone=stdc1"], r"there is no key bakbone \(did you mean backbone\?\)"),
        (["backbone=resnet19"], r"there is no backbone=resnet19 .* choose one of: .*resnet101, resnet18"),
        (["panoptic"], r"cannot read 'panoptic' .*: write key=value"),
        (["task=[a"], r"cannot read 'task=\[a' \(.*\): write key=value"),
    ],
)
def test_mistakes_become_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        errors.compose("train", arguments)
    assert "\n" not in str(caught.value)


def test_the_user_error_behind_a_chain_is_found():
    wrapper = RuntimeError("wrapper")
    wrapper.__cause__ = UserError("the cure")
    assert user_error_behind(wrapper) == "the cure"
    from_worker = UserError("Caught UserError in worker 0.\nTraceback\npem_lightning.errors.UserError: the cure\n")
    assert user_error_behind(from_worker) == "the cure"
    assert user_error_behind(UserError("a\nb.png is missing")) == "a b.png is missing"
    assert user_error_behind(RuntimeError("bug")) is None


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ("+trainer.accumulate_grad_batches=2", r"recipe\.micro_batch_size"),
        ("+trainer.gradient_clip_val=1", r"recipe\.gradient_clip"),
    ],
)
def test_what_the_recipe_decides_is_not_set_in_the_trainer(setting, instead):
    with pytest.raises(UserError, match=instead):
        build_trainer(compose("train", setting))


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        ("LearningRateFinder", r"-m recipe\.optimizer\.lr="),
        ("BatchSizeFinder", r"recipe\.micro_batch_size=auto"),
        ("GradientAccumulationScheduler,scheduling:{4:2}", r"recipe\.micro_batch_size"),
        ("StochasticWeightAveraging,swa_lrs:0.1", r"recipe\.ema_decay"),
    ],
)
def test_lightnings_callbacks_that_cannot_work_name_what_does(callback, instead):
    setting = f"+callbacks.more={{_target_:lightning.pytorch.callbacks.{callback}}}"
    with pytest.raises(UserError, match=f"{callback.split(',')[0]} .*{instead}"):
        build_trainer(compose("train", "callbacks=none", "logger=none", setting))


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({"SLURM_NTASKS": "4"}, ()),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, ()),
        ({"SLURM_NTASKS": "1"}, ("trainer.devices=2",)),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}, ()),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, ("trainer.devices=2", "trainer.num_nodes=2")),
    ],
)
def test_tasks_of_slurm_that_are_not_the_devices_are_one_line(monkeypatch, environment, settings):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "jupyter", "SLURM_PROCID": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    cfg = compose("evaluate", "checkpoint=x", "trainer=cpu", "callbacks=none", *settings)
    with pytest.raises(
        UserError, match=r"SLURM has \d tasks, which are not .*--ntasks-per-node.*SLURM_JOB_NAME=interactive"
    ):
        build_trainer(cfg)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    if not settings:
        build_trainer(cfg)


@pytest.mark.parametrize(
    ("batches", "train", "val"), [("+trainer.overfit_batches=1", 1, 1), ("+trainer.limit_val_batches=2", 1.0, 2)]
)
def test_limits_of_batches_keep_our_samplers(batches, train, val):
    trainer = build_trainer(compose("train", "trainer=cpu", "callbacks=none", "logger=none", batches))
    assert (trainer.overfit_batches, trainer.limit_train_batches, trainer.limit_val_batches) == (0.0, train, val)


@pytest.mark.parametrize("debug", choices("debug"))
def test_every_debug_choice_instantiates(debug, tmp_path):
    cfg = compose("train", f"debug={debug}", "trainer=cpu", "callbacks=none", "logger=none", f"output_dir={tmp_path}")
    trainer = build_trainer(cfg)
    assert trainer.max_steps <= 200
    assert trainer.limit_train_batches == (1.0 if debug == "profile" else 1)


def test_deterministic_training_on_cuda_only_warns(monkeypatch):
    """PyTorch has no deterministic backward pass of grid_sample there."""
    given = {}

    def make(node, **more):
        given.update(more)
        return Trainer(accelerator="cpu", logger=False) if "callbacks" in more else []

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("pem_lightning.cli.build.instantiate", make)
    for trainer, expected in (("gpu", "warn"), ("cpu", None)):
        given.clear()
        build_trainer(compose("train", f"trainer={trainer}", "trainer.deterministic=true", "callbacks=none"))
        assert given.get("deterministic") == expected


@pytest.mark.parametrize(("setting", "devices", "limit"), [("auto", 1, None), ("null", 1, None), ("4", 8, 4)])
def test_the_limit_of_micro_batches(setting, devices, limit):
    assert micro_batch_limit(compose("train", f"recipe.micro_batch_size={setting}"), devices) == limit


@pytest.mark.parametrize(("setting", "devices", "message"), [("auto", 2, "for one device"), ("4.5", 1, "whole number")])
def test_limits_of_micro_batches_that_are_refused(setting, devices, message):
    with pytest.raises(UserError, match=message):
        micro_batch_limit(compose("train", f"recipe.micro_batch_size={setting}"), devices)


def test_loading_takes_the_devices_share_of_the_batch():
    assert build_datamodule(compose()).batch_size == 4
    assert build_datamodule(compose(), batch_size=2).batch_size == 2


def test_memory_format_on_the_cpu():
    cfg = compose("train", "trainer=cpu", "trainer.precision=bf16-mixed", "callbacks=none", "logger=none")
    trainer = build_trainer(cfg)

    def wanted(setting, *layers):
        cfg.recipe.channels_last = setting
        return wants_channels_last(cfg, trainer, nn.Sequential(*layers))

    assert [wanted(setting, nn.Conv2d(64, 64, 1, 2)) for setting in ("auto", True, False)] == [True, True, False]
    assert wanted("auto", nn.Conv2d(3, 16, 3, 2), nn.Conv2d(8, 16, 1))
    assert not wanted("auto", nn.Conv2d(8, 16, 1, 2))  # PyTorch crashes
    with pytest.raises(UserError, match="choose auto or false"):
        wanted(True, nn.Conv2d(8, 16, 1, 2))
    with pytest.raises(UserError, match="choose auto, true or false"):
        wanted("yes_please", nn.Conv2d(64, 64, 1, 2))


@needs_plugins
@pytest.mark.parametrize("sweep", ["paper_ablations", "paper_depth"])
def test_the_sweeps_of_make_ablations_compose(sweep):
    _, _, rest = (CONF.parent / "Makefile").read_text().partition("\nSWEEP := ")
    overrides = rest.split("$(ARGS)")[0].replace("\\\n", " ").split()
    assert "scale=synthetic_small" in overrides
    assert (
        compose("train", f"sweep={sweep}", *(o for o in overrides if not o.startswith("seed="))).recipe.max_steps == 300
    )
