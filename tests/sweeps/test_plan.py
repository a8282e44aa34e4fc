"""A sweep is checked as a whole before its first job."""

import importlib.util
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from pem_lightning.cli.errors import CONF, check_composes, explain, job_folder, sweep_name
from pem_lightning.cli.sweeps import plan_sweep
from pem_lightning.types import UserError

SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
HAS_PLUGINS = importlib.util.find_spec("hydra_plugins") is not None
needs_plugins = pytest.mark.skipif(not HAS_PLUGINS, reason="needs requirements-sweep.txt")


def added(sweep, key):
    return [a.split("=", 1)[1] for a in sweep.arguments if a.startswith(f"{key}=")][-1]


@pytest.mark.parametrize("name", [pytest.param(s, marks=needs_plugins if s == "optuna" else ()) for s in SWEEPS])
def test_every_shipped_sweep_is_one_without_m(name):
    """All values of all its keys compose, and it says where its folders go."""
    sweep = plan_sweep("train", [f"sweep={name}"])
    assert sweep.directory.parts[:2] == ("multirun", name)
    assert sweep.arguments[0] == f"sweep={name}"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "scale").glob("*.yaml")))
def test_a_scale_is_no_sweep_and_goes_with_every_job(name):
    """What a checkpoint was trained at is taken over by its evaluation, hence only what all jobs know."""
    assert plan_sweep("train", [f"scale={name}"]) is None
    for job in ("train", "evaluate", "predict"):
        cfgs = (check_composes(job, choice) for choice in ([], [f"scale={name}"]))
        plain, scaled = (OmegaConf.to_container(cfg, resolve=False) for cfg in cfgs)
        assert {key for key in plain if plain[key] != scaled[key]} - {"hydra"} == {"dataset", "recipe"}


def test_sweeps_vary_and_leave_the_experiment_alone():
    """Evaluation does not take `sweep=` over, so that it must not say what evaluation needs."""
    for path in (CONF / "sweep").glob("*.yaml"):
        assert set(OmegaConf.load(path)) <= {"defaults", "hydra"}, path


@pytest.mark.parametrize("name", [s for s in SWEEPS if s != "optuna"])
def test_ready_sweeps_suit_any_data_set(name):
    sweep = plan_sweep("train", [f"sweep={name}", "dataset=cityscapes", "seed=0,1,2"])
    assert "seed" not in added(sweep, "hydra.job.config.override_dirname.exclude_keys")


def test_what_the_papers_sweeps_vary():
    papers = [name for name in SWEEPS if name.startswith("paper_")]
    values = {name: check_composes("train", [f"sweep={name}"]).hydra.sweeper.params for name in papers}
    attention = set(values["paper_attention"].ablation.split(","))
    decoder = set(values["paper_pixel_decoder"].ablation.split(","))
    everything = values["paper_ablations"].ablation.split(",")
    assert attention & decoder == {"prototype"}
    assert sorted(everything) == sorted(path.stem for path in (CONF / "ablation").glob("*.yaml"))
    assert attention | decoder | {"no_deep_supervision"} == set(everything)
    assert values["paper_depth"].decoder_layers == "range(1,10)"


@pytest.mark.parametrize(
    "launcher", [pytest.param(n, marks=needs_plugins) for n in ("slurm", "joblib", "submitit_local")]
)
def test_every_launcher_composes(launcher):
    cfg = check_composes("train", [f"hydra/launcher={launcher}"])
    assert cfg.hydra.launcher._target_.startswith("hydra_plugins.")
    if launcher == "slurm":
        assert cfg.hydra.launcher._target_.endswith("SlurmLauncher")
        assert (cfg.hydra.launcher.gpus_per_node, cfg.hydra.launcher.max_num_timeout) == (1, 5)


@pytest.mark.parametrize("choice", ["hydra/launcher/joblib", "hydra/launcher/submitit_slurm", "hydra/sweeper/optuna"])
def test_a_missing_package_is_named(choice):
    """As Hydra words it where its plugins are not installed."""
    group = choice.rsplit("/", 1)[0]
    error = HydraException(f"In 'train': Could not find '{choice}'\n\nAvailable options in '{group}':\n\tbasic\n")
    assert explain(error, "train") == f"{choice} needs an optional package: pip install -r requirements-sweep.txt"


def test_single_runs_are_no_sweeps():
    assert plan_sweep("train", ["seed=1"]) is None
    assert plan_sweep("train", ["sweep=paper_depth", "--cfg", "job"]) is None


def test_the_users_own_values_win():
    sweep = plan_sweep("train", ["sweep=paper_attention", "ablation=no_csm", "seed=0,1"])
    assert added(sweep, "hydra.job.config.override_dirname.exclude_keys") == "['ablation','sweep']"


def test_folders_of_a_plain_sweep():
    sweep = plan_sweep("train", ["-m", "backbone=stdc1,stdc2"])
    assert sweep.directory.parts[:2] == ("multirun", "synthetic_panoptic_stdc1")
    assert Path(added(sweep, "hydra.sweep.dir").strip("'")) == sweep.directory
    sweep = plan_sweep("train", ["seed=1", "-m", "hydra.sweep.dir=here"])
    assert sweep.directory == Path("here")
    assert sweep.arguments[:3] == ["-m", "seed=1", "hydra.sweep.dir=here"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "backbone=stdc1,stcd2"], r"there is no backbone=stcd2 \(did you mean stdc2\?\)"),
        (["sweep=paper_attention", "recipe.max_step=1,2"], r"there is no key recipe\.max_step "),
        (["sweep=paper_attention", "ablation=no_csm,nothing"], r"there is no ablation=nothing"),
        (["-m", "task=panoptic,semantic", "dataset=semantic_folder"], r"dataset=semantic_folder has no task=panoptic"),
        (["sweep=paper_atention"], r"there is no sweep=paper_atention \(did you mean paper_attention\?\)"),
        (["-m", "seed=choice(1"], r"cannot read 'seed=choice\(1'"),
        (["-m", "seed=0,1", "resume=last"], r"resume= is for single runs"),
    ],
)
def test_a_mistake_anywhere_is_found_first(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_sweep("train", arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("", "3"),
        ("ablation-no_csm_seed-0", "3_ablation-no_csm_seed-0"),
        ("ablation-[no_csm,no_masking]", "3_ablation-no_csm+no_masking"),
        ("dataset.root-'/a b/c'", "3_dataset.root--ab-c"),
        ("x" * 300, "3_" + "x" * 120),
    ],
)
def test_names_of_job_folders(overrides, name):
    assert job_folder(3, overrides) == name
    assert OmegaConf.create({"o": overrides, "name": "${job_folder:3,${o}}"}).name == name


def test_names_of_sweep_folders():
    assert sweep_name(["seed=1", "sweep=[paper_depth,paper_queries]"], "else") == "paper_depth+paper_queries"
    assert sweep_name(["seed=1"], "else") == "else"
