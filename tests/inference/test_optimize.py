"""The optimised network: the same function with fused normalisations, precision in, float32 out."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pem_lightning import build_pem
from pem_lightning.inference.optimize import OptimizedNetwork, fuse_batch_norms, shorten
from pem_lightning.types import UserError
from tests.models.randomize import TinyBackbone, randomize


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return randomize(build_pem("stdc1", num_classes=3, num_queries=6, num_layers=1, hidden_channels=64)).eval()


# ResNet-50 is fused in the tests against the reference algorithm.
@pytest.mark.parametrize(
    ("backbone", "norm"), [("stdc1", "batch"), ("resnet18", "frozen"), ("efficientnet_lite0", "batch")]
)
def test_fused_is_the_same_function_without_normalisation(backbone, norm):
    torch.manual_seed(0)
    network = randomize(build_pem(backbone, backbone_norm=norm, num_classes=3, num_queries=6, num_layers=1)).double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = fuse_batch_norms(network)
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = network.eval()(images), fused(images)
    torch.testing.assert_close(actual.class_logits, expected.class_logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    left = [name for name, m in fused.named_modules() if hasattr(m, "running_mean")]
    # The one of PEM-CA comes before its convolution, whose padding it must not reach.
    assert left == ["transformer_decoder.layers.0.cross_attention.feature_norm"]
    assert not any(p.requires_grad for p in fused.parameters())
    assert not fused.training


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Standardized(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / self.weight.std()


def test_normalisations_that_do_not_follow_and_subclasses_are_left_alone():
    first = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)
    network = nn.Sequential(*first, nn.Conv2d(4, 4, 1), NormAct(4), Standardized(4, 4, 1), nn.BatchNorm2d(4)).eval()
    fused, images = fuse_batch_norms(network), torch.randn(1, 3, 8, 8)
    assert [type(m) for m in fused] == [type(m) for m in network]
    assert torch.equal(fused(images), network(images))


def test_float32_is_the_network_up_to_rounding(network):
    images = torch.randn(2, 3, 50, 64)
    expected, actual = network(images), OptimizedNetwork(network)(images)
    torch.testing.assert_close(actual.class_logits, expected.class_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-3)
    assert actual.mask_logits.is_contiguous(memory_format=torch.channels_last)
    assert not actual.mask_logits.requires_grad


def test_short_precision_is_near_and_comes_out_as_float32(network):
    images = torch.randn(1, 3, 64, 96)
    expected, actual = network(images), OptimizedNetwork(network, "bfloat16")(images)
    assert actual.class_logits.dtype == actual.mask_logits.dtype == torch.float32
    difference = (actual.mask_logits - expected.mask_logits).abs().mean() / expected.mask_logits.abs().mean()
    assert 1e-4 < difference < 0.1  # the precision really is short, and the answer is not garbage
    assert next(network.parameters()).dtype == torch.float32


def test_deformable_attention_in_every_precision():
    torch.manual_seed(0)
    sizes = {"pyramid_channels": 64, "hidden_channels": 64, "num_queries": 6, "num_layers": 1}
    network = build_pem("stdc1", pixel_decoder="msdeform", num_classes=3, **sizes).eval()
    for layer in network.pixel_decoder.layers:
        torch.nn.init.normal_(layer.attention.offsets.weight, std=0.05)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = network(images)
        for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.06), ("float16", 0.03)):
            actual = OptimizedNetwork(network, precision)(images)
            assert actual.mask_logits.dtype == torch.float32
            assert (actual.mask_logits - expected.mask_logits).norm() < tolerance * expected.mask_logits.norm()


COMPILED = """
import torch
from torch import nn
from torch.nn.functional import avg_pool2d
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.models.transformer_decoder import TransformerDecoder

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.BatchNorm2d(16))
        self.decoder = TransformerDecoder(16, 16, num_classes=3, num_queries=6, channels=16, num_layers=1, num_heads=2)

    def forward(self, images):
        x = self.features(images)
        return self.decoder(x, [avg_pool2d(x, 8), avg_pool2d(x, 4), avg_pool2d(x, 2)])

torch.manual_seed(0)
network, images = Small().eval(), torch.randn(1, 3, 64, 96)
expected, actual = network(images), OptimizedNetwork(network, compile="default")(images)
torch.testing.assert_close(actual.class_logits, expected.class_logits, rtol=0, atol=1e-4)
torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-3)
"""


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    sizes = {"num_queries": 6, "num_layers": 4, "channels": 32, "hidden_channels": 32, "pyramid_channels": 32}
    return randomize(build_pem(TinyBackbone(), num_classes=3, mask_channels=16, **sizes)).double().eval()


@torch.no_grad()
def test_early_exit_is_the_prediction_of_that_layer(deep):
    """Of the learned queries for 0; the full depth is the network itself."""
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    full = deep(images)
    deep.transformer_decoder.auxiliary = "always"
    wanted = [*deep(images).auxiliary, full]
    deep.transformer_decoder.auxiliary = "training"
    before = len(deep.state_dict())
    for layers, expected in enumerate(wanted):
        found = shorten(deep, layers)(images)
        torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.mask_logits, expected.mask_logits, rtol=0, atol=1e-9)
    assert torch.equal(found.mask_logits, full.mask_logits)
    assert len(deep.state_dict()) == before
    assert not torch.equal(wanted[2].mask_logits, wanted[3].mask_logits)
    assert shorten(deep) is deep


@torch.no_grad()
def test_early_exit_computes_less(deep):
    """Also of the levels that no layer looks at any more; fusing and other precisions come after it."""
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    one = shorten(deep, 1)
    assert len(one.transformer_decoder.layers) == len(one.transformer_decoder.input_projections) == 1
    expected, found = one(images), OptimizedNetwork(one.float())(images.float())
    torch.testing.assert_close(found.mask_logits, expected.mask_logits.float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("layers", [-1, 5, 1.5, True, "two"])
def test_early_exit_after_a_layer_that_there_is_not(deep, layers):
    with pytest.raises(UserError, match=f"inference.decoder_layers={layers}: choose 0 to 4"):
        shorten(deep, layers)


@torch.no_grad()
def test_queries_in_another_order_give_the_same_in_that_order(deep):
    images, order = torch.randn(1, 3, 64, 96, dtype=torch.float64), torch.randperm(6).tolist()
    expected, found = deep(images), shorten(deep, queries=order)(images)
    torch.testing.assert_close(found.class_logits, expected.class_logits[:, order], rtol=0, atol=1e-9)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits[:, order], rtol=0, atol=1e-9)


@torch.no_grad()
def test_queries_that_are_left_out_are_gone(deep):
    """What is learned of the others is as it was: their predictions before the first layer."""
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected, found = shorten(deep, 0)(images), shorten(deep, 0, [4, 1])(images)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits[:, [4, 1]], rtol=0, atol=1e-9)
    assert shorten(deep, queries=[4, 1])(images).class_logits.shape == (1, 2, 4)
    assert deep.transformer_decoder.query_features.num_embeddings == 6


@pytest.mark.parametrize("queries", [[], [6], [-1], [1, 1], [True], ["a"], "12", 3])
def test_queries_that_there_are_not(deep, queries):
    with pytest.raises(UserError, match="give different numbers from 0 to 5"):
        shorten(deep, queries=queries)


def test_early_exit_needs_deep_supervision(deep):
    alone = copy.deepcopy(deep)
    alone.transformer_decoder.auxiliary = "never"
    with pytest.raises(UserError, match=r"inference\.decoder_layers=3 needs deep supervision"):
        shorten(alone, 3)
    assert len(shorten(alone, 4).transformer_decoder.layers) == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled():
    """In a process of its own: the compiler cannot look through the tests' checks of shapes."""
    one = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # more would start processes that import PyTorch
    subprocess.run([sys.executable, "-c", COMPILED], env=one, check=True, cwd=Path(__file__).parents[2], timeout=900)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half"}, "precision=half: choose float32"),
        ({"compile": "fast"}, "compile=fast: choose null"),
        ({"compile": "default"}, r"install g\+\+"),
    ],
)
def test_impossible_options_are_refused(network, options, message, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without a compiler
    with pytest.raises(UserError, match=message):
        OptimizedNetwork(network, **options)


def test_copies_are_compiled_as_their_original(network, monkeypatch):
    """PyTorch leaves compiled code out of a copy, which would be slower without a word."""
    compiled = []
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(options))
    optimized = OptimizedNetwork(network, compile="default")
    for copied in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert copied.compile_mode == "default"
    assert compiled == [{"mode": "default", "dynamic": False}] * 3
    copy.deepcopy(OptimizedNetwork(network))
    assert len(compiled) == 3
