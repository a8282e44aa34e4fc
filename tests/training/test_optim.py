import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pem_lightning import build_pem
from pem_lightning.checkpoints import rename_official_key
from pem_lightning.training.optim import cosine_schedule, parameter_groups


def values_by_name(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    listed = [(names[p], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(dict(listed)) == len(listed), "a parameter is listed twice"
    return dict(listed)


def test_authors_groups(reference):
    official = json.loads((reference / "pem" / "optimizer_city_pan_r50.json").read_text())
    base_lr = official["base_lr"]
    with torch.device("meta"):
        model = build_pem(backbone="resnet50", num_classes=19)
    groups = parameter_groups(model, lr=base_lr)
    assert values_by_name(model, groups) == {
        rename_official_key(name): (pytest.approx(base_lr * multiplier), decay)
        for name, (multiplier, decay) in official["params"].items()
    }
    sizes = Counter(tuple(values) for values in official["params"].values()).values()
    assert sorted(len(group["params"]) for group in groups) == sorted(sizes)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.backbone_like = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.queries = nn.Embedding(5, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.backbone_like.weight
        self.pos_embed = nn.Parameter(torch.zeros(1, 4))
        self.class_embed = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_rules_on_a_small_model():
    model = Small()
    found = values_by_name(model, parameter_groups(model, lr=1.0, weight_decay=0.2, backbone_lr_multiplier=0.5))
    assert found == {
        "backbone.0.weight": (0.5, 0.2),
        "backbone.0.bias": (0.5, 0.2),
        "backbone.1.weight": (0.5, 0.0),
        "backbone.1.bias": (0.5, 0.0),
        "backbone_like.weight": (1.0, 0.2),
        "backbone_like.bias": (1.0, 0.2),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (1.0, 0.0),
        "queries.weight": (1.0, 0.0),
        "pos_embed": (1.0, 0.0),
        "class_embed.weight": (1.0, 0.2),
        "class_embed.bias": (1.0, 0.2),
    }


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 4), ({"backbone_lr_multiplier": 1.0}, 2), ({"backbone_lr_multiplier": 1.0, "weight_decay": 0.0}, 1)],
)
def test_as_few_groups_as_possible(settings, count):
    assert len(parameter_groups(Small(), lr=1.0, **settings)) == count


def test_a_wrapped_module_keeps_its_backbone_and_exempts_its_own_parameters():
    class Exempting(Small):
        def no_weight_decay(self):
            return {"backbone.0.weight"}

    model = nn.Sequential(Exempting())
    found = values_by_name(model, parameter_groups(model, lr=1.0, weight_decay=0.2))
    assert (found["0.backbone.0.weight"], found["0.backbone.0.bias"]) == ((0.1, 0.0), (0.1, 0.2))


def optimizer(lr=1.0):
    return torch.optim.AdamW(parameter_groups(Small(), lr=lr), lr=lr)


def rates(scheduler, iterations):
    """Learning rates of all groups, as used in each iteration."""
    used = []
    for _ in range(iterations):
        used.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize("name", ["city_pan_r50", "ade_pan_r50"])
def test_authors_schedule(reference, name):
    expected = json.loads((reference / "pem" / "lr_schedule.json").read_text())[name]
    base, end = expected["base_lr"], expected["end_lr"]
    scheduler = cosine_schedule(optimizer(base), max_iterations=expected["max_iter"], end_lr=end)
    for iteration, lr in expected["lr_used_at_iter"].items():
        factor = scheduler.lr_lambdas[0](int(iteration))
        found = [factor * base for base in scheduler.base_lrs]
        # The last value of a decay to zero is a difference of nearly equal numbers.
        assert max(found) == pytest.approx(lr, rel=1e-9, abs=1e-15)
        assert min(found) == pytest.approx(lr / 10, rel=1e-9, abs=1e-16)


def test_scheduler_steps_through_its_function_and_stays_at_the_end():
    scheduler = cosine_schedule(optimizer(), max_iterations=10, end_lr=0.1)
    for t, lrs in enumerate(rates(scheduler, 14)):
        lr = 0.1 + 0.45 * (1 + math.cos(math.pi * min(t, 10) / 10))
        assert lrs == pytest.approx([lr * base for base in scheduler.base_lrs])


@settings(max_examples=15, deadline=None)
@given(warmup=st.integers(1, 30))
def test_warmup_rises_linearly_to_the_decay(warmup):
    plain = cosine_schedule(optimizer(), max_iterations=50).lr_lambdas[0]
    warm = cosine_schedule(optimizer(), max_iterations=50, warmup_iterations=warmup, warmup_factor=0.01).lr_lambdas[0]
    assert warm(0) == pytest.approx(0.01)
    assert warm(warmup) == plain(warmup)
    assert warm(50) == plain(50)
    steps = [warm(t + 1) - warm(t) for t in range(warmup)]
    assert steps == pytest.approx([steps[0]] * warmup)
