"""Every shipped config composes and instantiates; mistakes on the command line become one line that names the cure."""

import json
from itertools import product
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import OmegaConf
from torch import nn

from pem_lightning.callbacks import (
    ConfusionMatrix,
    Curves,
    PredictionPanels,
    Results,
    SavePredictions,
    Throughput,
    WorstImages,
)
from pem_lightning.cli.build import build_datamodule, build_module, build_trainer, wants_channels_last
from pem_lightning.cli.errors import CONF, check_composes, key_of, take_over_choices, user_error_behind
from pem_lightning.data import CITYSCAPES
from pem_lightning.models.pem import PEM
from pem_lightning.types import UserError
from tests.checkpoint_files import write_checkpoint


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose(job="train", *overrides):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(job, ["output_dir=unused", *overrides])


PAIRS = [pair for pair in product(choices("dataset"), choices("task")) if "_".join(pair) in choices("recipe")]


def root_of(dataset, folder):
    """Where a data set's files are; those that describe its classes themselves get two."""
    (folder / "classes.yaml").write_text("[road, car]")
    categories = [{"id": 7, "name": "road", "isthing": 0}, {"id": 9, "name": "car", "isthing": 1}]
    (folder / "annotations").mkdir()
    content = {"images": [], "annotations": [], "categories": categories}
    (folder / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    return f"dataset.root={folder}"


def test_every_data_set_has_a_task_and_every_recipe_a_data_set():
    assert {dataset for dataset, _ in PAIRS} == set(choices("dataset"))
    assert {"_".join(pair) for pair in PAIRS} == set(choices("recipe"))


def test_top_level_files_are_defaults_lists_and_nothing_else():
    for path in CONF.glob("*.yaml"):
        assert list(OmegaConf.load(path)) == ["defaults"], path


@pytest.mark.parametrize(("dataset", "task"), PAIRS)
@pytest.mark.parametrize("backbone", [b for b in choices("backbone") if b != "timm"])  # see tests/models/test_timm.py
def test_every_network_instantiates(dataset, task, backbone):
    cfg = compose("train", f"dataset={dataset}", f"task={task}", f"backbone={backbone}")
    with torch.device("meta"):
        network = instantiate(cfg.network, num_classes=19)
    assert isinstance(network, PEM)


@pytest.mark.parametrize(("dataset", "task"), PAIRS)
@pytest.mark.parametrize("job", ["train", "evaluate", "predict"])
def test_every_experiment_instantiates(job, dataset, task, tmp_path):
    root = root_of(dataset, tmp_path)
    cfg = compose(job, f"dataset={dataset}", f"task={task}", "backbone=resnet18", "network.num_layers=1", root)
    cfg.output_dir = str(tmp_path)
    trainer = build_trainer(cfg)
    datamodule = build_datamodule(cfg)
    module = build_module(cfg, datamodule.info)
    assert trainer.max_steps == cfg.recipe.max_steps
    assert datamodule.task == task == module.inference.task
    classes = datamodule.info.num_classes
    assert classes == {"ade20k": 150, "coco_panoptic": 2, "semantic_folder": 2}.get(dataset, 19)
    assert module.criterion.num_classes == classes
    assert any(layer.out_features == classes + 1 for layer in module.modules() if isinstance(layer, nn.Linear))
    optimizer = module.optimizer(module.parameter_groups(module.network))
    scheduler = module.schedule(optimizer)
    rates = {round(group["lr"], 9) for group in optimizer.param_groups}
    assert max(rates) == cfg.recipe.optimizer.lr == scheduler.base_lrs[0] or max(rates) == max(scheduler.base_lrs)


@pytest.mark.parametrize("logger", choices("logger"))
@pytest.mark.parametrize("trainer", ["auto", "cpu"])
def test_every_logger_and_cpu_trainer_instantiates(logger, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cfg = compose("train", f"logger={logger}", f"trainer={trainer}")
    cfg.output_dir = str(tmp_path)
    built = build_trainer(cfg)
    assert len(built.loggers) == {"none": 0, "csv": 1, "tensorboard": 2, "wandb": 3}[logger]
    kinds = {type(c) for c in built.callbacks}
    assert {Curves, PredictionPanels, Results, Throughput} <= kinds
    assert (LearningRateMonitor in kinds) == bool(built.loggers)  # it needs one


@pytest.mark.parametrize("trainer", ["gpu", "ddp"])
def test_gpu_trainers_compose(trainer):
    assert compose("train", f"trainer={trainer}").trainer.accelerator == "gpu"


def test_recipe_and_backbone_follow_the_pair():
    cfg = compose("train", "task=panoptic", "dataset=cityscapes")
    assert (cfg.backbone.name, cfg.recipe.max_steps, cfg.recipe.global_batch_size) == ("resnet50", 90000, 32)
    assert list(cfg.recipe.train_transform.crop_size) == [512, 1024]
    assert cfg.recipe.train_transform.shortest_edges == [int(x * 0.1 * 1024) for x in range(5, 21)]
    assert (cfg.recipe.optimizer.lr, cfg.recipe.gradient_clip, cfg.criterion.num_points) == (7e-4, 0.01, 12544)
    assert compose("train", "dataset=cityscapes", "backbone=stdc2").network.backbone == "stdc2"
    assert compose().backbone.name == "stdc1"
    assert compose("train", "task=semantic").task.inference.resize_first is False


@pytest.mark.parametrize(("task", "edge"), [("panoptic", 640), ("semantic", 512)])
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


def test_tasks_have_the_same_settings():
    """What a checkpoint's experiment overrides for one task must exist when it is evaluated as another."""
    settings = [set(compose("train", f"task={task}").task.inference) for task in choices("task")]
    assert settings[0] == settings[1] == settings[2]


@pytest.mark.parametrize("job", ["train", "evaluate", "predict"])
def test_test_time_augmentation_is_set_on_the_command_line(job):
    cfg = compose(job, "inference.scales=[1,1.5]", "inference.flip=true")
    module = build_module(cfg, CITYSCAPES)
    assert (module.augmentation.scales, module.augmentation.flip) == ([1.5, 1.0], True)
    plain = build_module(compose(job), CITYSCAPES).augmentation
    assert (plain.scales, plain.flip) == ([1.0], False)
    for scales in ("[large]", "1.5"):
        with pytest.raises(UserError, match=r"inference\.scales=.*give a list of numbers"):
            build_module(compose(job, f"inference.scales={scales}"), CITYSCAPES)


def test_an_evaluation_does_all_it_can(tmp_path):
    cfg = compose("evaluate", f"save_predictions={tmp_path}/saved")
    cfg.output_dir = str(tmp_path)
    callbacks = build_trainer(cfg).callbacks
    assert {ConfusionMatrix, PredictionPanels, Results, SavePredictions, WorstImages} <= {type(c) for c in callbacks}
    places = [type(c) for c in callbacks if isinstance(c, ConfusionMatrix | WorstImages | Results)]
    assert places[-1] is Results  # which says where the others' files are
    assert next(c for c in callbacks if isinstance(c, SavePredictions)).directory == tmp_path / "saved"


def test_a_callback_can_be_switched_off(tmp_path):
    cfg = compose("train", "callbacks.panels=null")
    cfg.output_dir = str(tmp_path)
    assert not any(isinstance(c, PredictionPanels) for c in build_trainer(cfg).callbacks)


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
        (["dataset=nowhere"], r"there is no dataset=nowhere; choose one of: ade20k, cityscapes, .*, synthetic"),
        (["dataset=semantic_folder"], r"dataset=semantic_folder has no task=panoptic: choose task=semantic$"),
        (["recipe=ade20k_panotic"], r"there is no recipe=ade20k_panotic \(did you mean ade20k_panoptic\?\)"),
        (["bakbone=stdc1"], r"there is no key bakbone \(did you mean backbone\?\)"),
        (["panoptic"], r"'panoptic' is no override: write key=value"),
        (["task=[a"], r"cannot read 'task=\[a' \(.*\): write key=value"),
    ],
)
def test_mistakes_become_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        check_composes("train", arguments)
    assert "\n" not in str(caught.value)


def test_right_arguments_pass():
    check_composes("train", ["task=semantic", "+recipe.extra=1", "~callbacks.panels", "--cfg", "job"])


@pytest.mark.parametrize(
    ("override", "key"), [("a.b=1", "a.b"), ("+a=1=2", "a"), ("~a", "a"), ("++a.b=", "a.b"), ("a@b=c", "a")]
)
def test_key_of(override, key):
    assert key_of(override) == key


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


def test_loading_takes_the_devices_share_of_the_batch():
    assert build_datamodule(compose()).batch_size == 4
    assert build_datamodule(compose(), batch_size=2).batch_size == 2


def test_the_user_error_behind_a_chain_is_found():
    wrapper = RuntimeError("wrapper")
    wrapper.__cause__ = UserError("the cure")
    assert user_error_behind(wrapper) == "the cure"
    from_worker = UserError("Caught UserError in worker 0.\nTraceback\npem_lightning.errors.UserError: the cure\n")
    assert user_error_behind(from_worker) == "the cure"
    assert user_error_behind(RuntimeError("bug")) is None


def test_entry_points_are_thin():
    for name in ("train", "evaluate", "predict"):
        assert len((Path(CONF).parent / f"{name}.py").read_text().splitlines()) < 10


def test_older_checkpoints_are_understood(tmp_path):
    """Their command lines say `batch_size`; today's are told the new name."""
    path = write_checkpoint(tmp_path / "a.ckpt", nn.Linear(1, 1), ("recipe.batch_size=2", "task=semantic"))
    taken = take_over_choices([f"checkpoint={path}"])
    assert taken == ["recipe.global_batch_size=2", "task=semantic", f"checkpoint={path}"]
    with pytest.raises(UserError, match=r"did you mean recipe\.global_batch_size\?"):
        check_composes("train", ["recipe.batch_size=2"])


@pytest.mark.parametrize(("setting", "wanted"), [("auto", True), ("true", True), ("false", False)])
def test_memory_format_on_the_cpu(setting, wanted):
    cfg = compose("train", f"recipe.channels_last={setting}", "trainer=cpu", "trainer.precision=bf16-mixed")
    assert wants_channels_last(cfg, build_trainer(cfg), nn.Conv2d(64, 64, 1, 2)) == wanted


def test_an_unknown_memory_format_is_refused():
    cfg = compose("train", "recipe.channels_last=yes_please", "trainer=cpu")
    with pytest.raises(UserError, match="choose auto, true or false"):
        wants_channels_last(cfg, build_trainer(cfg), nn.Conv2d(64, 64, 1, 2))


def test_what_crashes_in_channels_last_is_not_trained_so():
    cfg = compose("train", "trainer=cpu")
    trainer = build_trainer(cfg)
    assert not wants_channels_last(cfg, trainer, nn.Sequential(nn.Conv2d(8, 16, 1, 2)))
    assert wants_channels_last(cfg, trainer, nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.Conv2d(8, 16, 1)))
    cfg.recipe.channels_last = True
    with pytest.raises(UserError, match="choose auto or false"):
        wants_channels_last(cfg, trainer, nn.Sequential(nn.Conv2d(8, 16, 1, 2)))


def test_where_a_training_started_from_is_not_taken_over(tmp_path):
    """Evaluation has no such key, and the weights are in the checkpoint."""
    overrides = ("weights=a.pth", "seed=3", "resume=b.ckpt", "task=semantic")
    path = write_checkpoint(tmp_path / "a.ckpt", nn.Linear(1, 1), overrides)
    assert take_over_choices([f"checkpoint={path}"]) == ["seed=3", "task=semantic", f"checkpoint={path}"]
    assert compose("train").weights is None
    assert "weights" not in compose("evaluate", "checkpoint=a")
