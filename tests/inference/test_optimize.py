"""The optimised network: precision in, float32 out, and one line for a wrong option."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pem_lightning import build_pem
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.types import UserError
from tests.models.randomize import randomize


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return randomize(build_pem("stdc1", num_classes=3, num_queries=6, num_layers=3)).eval()


def test_float32_is_the_network_up_to_rounding(network):
    images = torch.randn(2, 3, 50, 96)
    expected, actual = network(images), OptimizedNetwork(network)(images)
    torch.testing.assert_close(actual.class_logits, expected.class_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-3)
    assert not actual.mask_logits.requires_grad


def test_short_precision_is_near_and_comes_out_as_float32(network):
    images = torch.randn(1, 3, 64, 96)
    expected, actual = network(images), OptimizedNetwork(network, "bfloat16")(images)
    assert actual.class_logits.dtype == actual.mask_logits.dtype == torch.float32
    difference = (actual.mask_logits - expected.mask_logits).abs().mean() / expected.mask_logits.abs().mean()
    assert 1e-4 < difference < 0.1  # the precision really is short, and the answer is not garbage
    assert next(network.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.06), ("float16", 0.03)])
def test_deformable_attention_in_every_precision(precision, tolerance):
    torch.manual_seed(0)
    arguments = {"pixel_decoder": "msdeform", "pyramid_channels": 64, "num_queries": 6, "num_layers": 1}
    network = build_pem("stdc1", num_classes=3, **arguments).eval()
    for layer in network.pixel_decoder.layers:
        torch.nn.init.normal_(layer.attention.offsets.weight, std=0.05)
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        expected, actual = network(images), OptimizedNetwork(network, precision)(images)
    assert actual.mask_logits.dtype == torch.float32
    assert (actual.mask_logits - expected.mask_logits).norm() < tolerance * expected.mask_logits.norm()


def test_channels_last_from_end_to_end(network):
    optimized = OptimizedNetwork(network)
    mask_logits = optimized(torch.randn(1, 3, 64, 96)).mask_logits
    assert mask_logits.is_contiguous(memory_format=torch.channels_last)


COMPILED = """
import torch
from pem_lightning import build_pem
from pem_lightning.inference.optimize import OptimizedNetwork

torch.manual_seed(0)
network = build_pem("stdc1", num_classes=3, num_queries=6, num_layers=1).eval()
images = torch.randn(1, 3, 64, 96)
expected, actual = network(images), OptimizedNetwork(network, compile="default")(images)
torch.testing.assert_close(actual.class_logits, expected.class_logits, rtol=0, atol=1e-4)
torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-3)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled():
    """In a process of its own: the compiler cannot look through the tests' checks of shapes."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parents[2], timeout=300)


def test_compilation_without_a_compiler_is_refused(network, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install g\\+\\+"):
        OptimizedNetwork(network, compile="default")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "half"}, "precision=half: choose float32"), ({"compile": "fast"}, "compile=fast: choose null")],
)
def test_wrong_options_are_refused_with_the_choices(network, options, message):
    with pytest.raises(UserError, match=message):
        OptimizedNetwork(network, **options)
