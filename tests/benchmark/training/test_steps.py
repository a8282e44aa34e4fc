import pytest
import torch

from pem_lightning.benchmark.timing import Clock
from pem_lightning.benchmark.training.job import count_synchronisations, summarize, time_steps
from pem_lightning.benchmark.training.lineup import Plan, build_all, line_up, make_networks, measure_memory
from pem_lightning.benchmark.training.settings import TrainingSettings, draw_batch
from pem_lightning.benchmark.training.steps import STAGES, paper_config
from pem_lightning.types import UserError

SETTINGS = TrainingSettings(("stdc1",), (64, 96), segments=4, num_points=64, device="cpu")


@pytest.fixture(scope="module")
def network():
    return make_networks(SETTINGS)


@pytest.fixture(scope="module")
def batch():
    return draw_batch(SETTINGS)


@pytest.mark.parametrize("kind", ["straightforward", "ours"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_tells_its_stages_and_learns(kind, precision, network, batch):
    before = {name: value.clone() for name, value in network("stdc1").state_dict().items()}
    step = Plan(kind, "stdc1", precision).build(network("stdc1"), SETTINGS)
    clock = Clock()
    clock.start()
    losses = step.run(batch, clock)
    total, stages = clock.stop()
    assert tuple(stages) == STAGES
    assert all(seconds > 0 for seconds in stages.values())
    assert sum(stages.values()) <= total
    assert len(losses) == 3 * 7
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    after = step.network.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name for name, _ in step.network.named_parameters()} <= changed
    assert any("running_mean" in name for name in changed)
    assert all(parameter.grad is None for parameter in step.network.parameters())
    now = network("stdc1").state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())  # the source is left alone


def test_no_step_is_skipped_once_the_scale_of_the_loss_is_found(network, batch):
    """As in float16, where gradients overflow at smaller scales."""
    step = Plan("ours", "stdc1").build(network("stdc1"), SETTINGS)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
    weight = step.network.transformer_decoder.class_head.weight
    before = weight.detach().clone()
    step.settle(batch)
    assert step.scaler.get_scale() == 2.0**87
    assert not torch.equal(weight, before)  # a first step was skipped, a second one not


def test_both_train_by_the_recipe(network):
    ours, straight = (Plan(kind, "stdc1").build(network("stdc1"), SETTINGS) for kind in ("ours", "straightforward"))
    recipe = paper_config().recipe
    assert ours.clip == straight.clip == recipe.gradient_clip
    values = []
    for step in (ours, straight):
        names = {parameter: name for name, parameter in step.network.named_parameters()}
        groups = step.optimizer.param_groups
        assert {(group["betas"], group["eps"]) for group in groups} == {(tuple(recipe.optimizer.betas), 1e-8)}
        values.append({names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})
    assert values[0] == values[1]
    assert max(values[0].values()) == (recipe.optimizer.lr, recipe.parameter_groups.weight_decay)
    weights = ("class_weight", "mask_weight", "dice_weight", "num_points", "importance_sample_ratio")
    assert all(getattr(ours.criterion, name) == getattr(straight.criterion, name) for name in weights)
    assert straight.describe_optimizer() == f"AdamW, groups: {len(values[0])}"
    assert ours.describe_optimizer().endswith("groups: 4")


def test_everyone_who_is_asked_takes_part_and_meets_the_baseline_of_its_precision():
    plans = line_up(TrainingSettings(("stdc1",), precisions=("float32", "bfloat16"), compile=("none", "default")))
    assert [(plan.name, plan.baseline, plan.is_optional) for plan in plans] == [
        ("stdc1 straightforward float32", "stdc1 straightforward float32", False),
        ("stdc1 ours float32", "stdc1 straightforward float32", False),
        ("stdc1 ours float32 compile=default", "stdc1 straightforward float32", True),
        ("stdc1 straightforward bfloat16", "stdc1 straightforward bfloat16", True),
        ("stdc1 ours bfloat16", "stdc1 straightforward bfloat16", True),
        ("stdc1 ours bfloat16 compile=default", "stdc1 straightforward bfloat16", True),
    ]


def test_who_may_fail_is_skipped_and_who_must_not_is_reported(network, batch, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr("pem_lightning.benchmark.training.steps.OurStep.predict", fail)
    said = []
    steps, skipped = build_all([Plan("ours", "stdc1", compile="default")], network, batch, SETTINGS, said.append)
    assert steps == {}
    assert skipped == {"stdc1 ours float32 compile=default": "RuntimeError: no compiler"}
    assert "skipped stdc1 ours float32 compile=default: RuntimeError: no compiler" in said
    with pytest.raises(RuntimeError, match="no compiler"):
        build_all([Plan("ours", "stdc1")], network, batch, SETTINGS)


def test_ratios_are_taken_within_rounds_and_by_stage(network, batch):
    plans = [Plan(kind, "stdc1") for kind in ("straightforward", "ours")]
    steps = {plan: plan.build(network("stdc1"), SETTINGS) for plan in plans}
    timings = time_steps(steps, batch, rounds=1, warmup=0)
    straight, ours = (summarize(plan, step, timings, batch) for plan, step in steps.items())
    assert straight["ratio"]["median"] == 1
    assert ours["ratio"]["median"] == pytest.approx(ours["rounds_ms"][0] / straight["rounds_ms"][0])
    for stage in STAGES:
        expected = ours["stages_ms"][stage]["median"] / straight["stages_ms"][stage]["median"]
        assert ours["stage_ratios"][stage]["median"] == pytest.approx(expected)
    assert ours["images_per_s"] == pytest.approx(2000 / ours["rounds_ms"][0])
    assert ours["host_synchronisations"] is None
    alone = summarize(plans[1], steps[plans[1]], {plans[1].name: timings[plans[1].name]}, batch)
    assert (alone["ratio"], alone["baseline"], alone["stage_ratios"]) == (None, None, {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts how often the host waits for a GPU: needs one")
def test_synchronisations_are_counted():
    device = torch.device("cuda")
    x = torch.ones(4, device=device)
    assert count_synchronisations(lambda: x + 1, device) == 0
    assert count_synchronisations(lambda: (x.sum().item(), x.cpu()), device) == 2
    assert torch.cuda.get_sync_debug_mode() == 0


def test_nobody_waits_for_a_cpu():
    assert count_synchronisations(lambda: 1 / 0, torch.device("cpu")) is None


def test_memory_of_nobody_is_refused():
    with pytest.raises(UserError, match=r"choose of stdc1 straightforward float32, stdc1 ours float32$"):
        measure_memory(SETTINGS, "nobody")
