"""Every shipped config composes and instantiates; mistakes on the command line become one line that names the cure."""

from itertools import product
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pem_lightning.callbacks import Curves, PredictionPanels, Results
from pem_lightning.config import CONF, check_composes, key_of, user_error_behind
from pem_lightning.errors import UserError
from pem_lightning.networks.pem import PEM
from pem_lightning.run import build_datamodule, build_module, build_trainer


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose(job="train", *overrides):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(job, ["output_dir=unused", *overrides])


PAIRS = list(product(choices("dataset"), choices("task")))


def test_top_level_files_are_defaults_lists_and_nothing_else():
    for path in CONF.glob("*.yaml"):
        assert list(OmegaConf.load(path)) == ["defaults"], path


@pytest.mark.parametrize(("dataset", "task"), PAIRS)
@pytest.mark.parametrize("backbone", choices("backbone"))
def test_every_network_instantiates(dataset, task, backbone):
    cfg = compose("train", f"dataset={dataset}", f"task={task}", f"backbone={backbone}")
    with torch.device("meta"):
        network = instantiate(cfg.network, num_classes=19)
    assert isinstance(network, PEM)


@pytest.mark.parametrize(("dataset", "task"), PAIRS)
@pytest.mark.parametrize("job", ["train", "evaluate", "predict"])
def test_every_experiment_instantiates(job, dataset, task, tmp_path):
    cfg = compose(job, f"dataset={dataset}", f"task={task}", "backbone=resnet18", "network.num_layers=1")
    cfg.output_dir = str(tmp_path)
    trainer = build_trainer(cfg)
    datamodule = build_datamodule(cfg, world_size=1)
    module = build_module(cfg, datamodule.info)
    assert trainer.max_steps == cfg.recipe.max_steps
    assert datamodule.task == task == module.inference.task
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
    assert len(built.loggers) == {"none": 0, "csv": 1}.get(logger, 2)
    assert {Curves, PredictionPanels, Results} <= {type(c) for c in built.callbacks}


@pytest.mark.parametrize("trainer", ["gpu", "ddp"])
def test_gpu_trainers_compose(trainer):
    assert compose("train", f"trainer={trainer}").trainer.accelerator == "gpu"


def test_recipe_and_backbone_follow_the_pair():
    cfg = compose("train", "task=panoptic", "dataset=cityscapes")
    assert (cfg.backbone.name, cfg.recipe.max_steps, cfg.recipe.batch_size) == ("resnet50", 90000, 32)
    assert list(cfg.recipe.train_transform.crop_size) == [512, 1024]
    assert cfg.recipe.train_transform.shortest_edges == [int(x * 0.1 * 1024) for x in range(5, 21)]
    assert (cfg.recipe.optimizer.lr, cfg.recipe.gradient_clip, cfg.criterion.num_points) == (7e-4, 0.01, 12544)
    assert compose("train", "dataset=cityscapes", "backbone=stdc2").network.backbone == "stdc2"
    assert compose().backbone.name == "stdc1"
    assert compose("train", "task=semantic").task.inference.resize_first is False


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
        (["task=panoptc"], r"there is no task=panoptc \(did you mean panoptic\?\); choose one of: panoptic, semantic"),
        (["dataset=nowhere"], r"there is no dataset=nowhere; choose one of: cityscapes, synthetic"),
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


def test_batch_is_shared_out_evenly():
    assert build_datamodule(compose(), world_size=2).batch_size == 2
    with pytest.raises(UserError, match=r"recipe\.batch_size=4 .* 3 devices"):
        build_datamodule(compose(), world_size=3)


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
