import pytest
import torch

from pem_lightning.benchmark.training.equality import compare_plans, compare_steps
from pem_lightning.benchmark.training.lineup import Plan, make_networks
from pem_lightning.benchmark.training.settings import TrainingSettings, draw_batch
from pem_lightning.benchmark.weights import random_weights
from pem_lightning.types import UserError

SETTINGS = TrainingSettings(("stdc1",), (64, 96), segments=3, num_points=64, device="cpu")


def test_both_paths_compute_the_same():
    plans = [Plan("straightforward", "stdc1"), Plan("ours", "stdc1"), Plan("ours", "stdc1", compile="default")]
    said = []
    rows = compare_plans(plans, make_networks(SETTINGS), draw_batch(SETTINGS), SETTINGS, said.append)
    assert said == ["comparing losses and gradients with stdc1 straightforward float32"]
    assert [row["name"] for row in rows] == ["stdc1 straightforward float32 without oneDNN", "stdc1 ours float32"]
    ours = rows[1]
    assert ours["loss"] > 1
    assert ours["loss_difference"] < 1e-5
    assert ours["largest_difference"] < 1e-4
    assert ours["gradient_norm"] > 1
    assert ours["gradient_norm_difference"] < 0.01
    assert ours["gradient_difference"] < 0.1  # a prototype that rounding moved shows


@pytest.mark.slow
def test_what_computes_something_else_is_not_timed():
    networks = iter([random_weights("stdc1").network] * 2 + [random_weights("stdc1", seed=1).network])
    with pytest.raises(UserError, match=r"^stdc1 ours float32 computes something else than .* times would say nothing"):
        compare_plans([Plan("ours", "stdc1")], lambda backbone: next(networks), draw_batch(SETTINGS), SETTINGS)


def test_differences_are_relative():
    expected = {"a": torch.tensor(2.0), "b": torch.tensor(2.0)}, {"w": torch.tensor([3.0, 4.0]), "v": torch.zeros(1)}
    actual = {"a": torch.tensor(2.1), "b": torch.tensor(1.9)}, {"w": torch.tensor([4.0, 3.0]), "v": torch.zeros(1)}
    found = compare_steps(actual, expected)
    assert found["loss"] == pytest.approx(4)
    assert found["loss_difference"] == pytest.approx(0, abs=1e-6)
    assert found["largest_difference"] == pytest.approx(0.05)
    assert found["gradient_norm"] == pytest.approx(5)
    assert found["gradient_norm_difference"] == pytest.approx(0, abs=1e-6)
    assert found["gradient_difference"] == pytest.approx(2**0.5 / 5)
    without = expected[0], {"w": expected[1]["w"]}
    assert compare_steps(without, expected)["gradient_difference"] == float("inf")  # a gradient is missing
