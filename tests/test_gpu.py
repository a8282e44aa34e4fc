"""What only a GPU can show; `scripts/gpu_check.py` runs these beside measurements."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from pem_lightning import build_pem
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.losses import SetCriterion
from pem_lightning.models.deformable_conv import deform_conv_torch
from pem_lightning.models.mask2former_pixel_decoder import get_kernel, pixel_centres
from pem_lightning.preprocess import pad_batch
from pem_lightning.types import Target
from scripts.benchmark import common
from scripts.benchmark.gpu import host_waits
from tests.inference.toy import predictor
from tests.models.randomize import randomize
from tests.models.test_deformable_conv import inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return randomize(build_pem("stdc1", num_classes=5, num_queries=20, num_layers=2)).eval()


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative, of norms."""
    expected = expected.double()
    return float((actual.cpu().double() - expected).norm() / expected.norm())


def to_gpu(tensors):
    return [t.detach().float().cuda().requires_grad_() for t in tensors]


def assert_near_float64(function, arguments):
    expected_leaves, leaves = [t.detach().requires_grad_() for t in arguments], to_gpu(arguments)
    expected, actual = function(*expected_leaves), function(*leaves)
    assert distance(actual, expected) < 1e-5
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), expected_leaves)
    found = torch.autograd.grad((actual * probe.float().cuda()).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        assert distance(one, other) < 1e-4


def test_deformable_convolution_against_float64():
    assert_near_float64(deform_conv_torch, inputs(0, 2, 20, 30))


def test_deformable_attention_against_float64():
    levels = [(3, 4), (6, 8)]
    draw = torch.Generator().manual_seed(0)
    centres = pixel_centres(levels).double()
    values = torch.randn(2, len(centres), 2, 8, generator=draw, dtype=torch.float64)
    shape = (2, len(centres), 2, 2, 4)
    points = centres[:, None, None, None] + 0.2 * torch.randn(*shape, 2, generator=draw, dtype=torch.float64)
    weights = torch.randn(*shape, generator=draw, dtype=torch.float64).flatten(3).softmax(-1).view(shape)
    kernel = get_kernel("torch")
    assert_near_float64(lambda v, p, w: kernel(v, levels, p, w), [values, points, weights])


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.2), ("float16", 0.1)])
def test_the_fast_network_against_float64(network, precision, tolerance):
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.double()(images.double())
    actual = OptimizedNetwork(network.float(), precision).cuda()(images.cuda())
    assert actual.mask_logits.dtype == torch.float32
    assert distance(actual.class_logits, expected.class_logits) < tolerance
    assert distance(actual.mask_logits, expected.mask_logits) < tolerance


COMPILED = """
import torch
from pem_lightning import build_pem
from pem_lightning.inference.optimize import OptimizedNetwork

torch.manual_seed(0)
network = build_pem("stdc1", num_classes=5, num_queries=20, num_layers=1).eval()
images = torch.randn(1, 3, 64, 96)
with torch.no_grad():
    expected = network(images)
fast = OptimizedNetwork(network, compile="reduce-overhead").cuda()
for _ in range(3):  # the graph is recorded, then replayed
    actual = fast(images.cuda()).mask_logits.cpu()
assert (actual - expected.mask_logits).norm() < 1e-2 * expected.mask_logits.norm()
"""


def test_cuda_graphs():
    """In a program of its own: tracing does not go through the checks of shapes."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_results_are_those_of_the_cpu(task):
    photo = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    expected, actual = predictor(task)(photo), predictor(task, device="cuda")(photo)
    for name in ("panoptic", "semantic"):
        if (wanted := getattr(expected, name)) is not None:
            assert torch.equal(getattr(actual, name).cpu(), wanted)
    assert len(actual.instances or ()) == len(expected.instances or ())


def test_losses_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    network = randomize(build_pem("stdc1", num_classes=5, num_queries=20, num_layers=2)).eval()
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=draw) for _ in range(2)]
    rows = (torch.arange(64)[:, None] // 16 == torch.arange(4)[:, None, None]).expand(4, 64, 96)

    def step(device):
        points = torch.Generator().manual_seed(0)
        criterion = SetCriterion(
            5, num_points=256, rand=lambda shape, where: torch.rand(shape, generator=points).to(where)
        ).to(device)
        network.to(device).zero_grad()
        wanted = [Target(torch.arange(4, device=device), rows.to(device)) for _ in images]
        batch, targets = pad_batch([image.to(device) for image in images], wanted)
        losses = criterion(network(batch), targets)
        torch.stack(list(losses.values())).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
        return torch.stack(list(losses.values())).detach().cpu(), gradients.cpu()

    (expected, wanted), (actual, found) = step("cpu"), step("cuda")
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert distance(found, wanted) < 0.02  # near ties of masks and prototypes fall the other way


def test_one_synchronisation_per_step():
    network = build_pem("stdc1", num_classes=5, num_queries=10, num_layers=2).cuda().train()
    criterion = SetCriterion(5, num_points=64).cuda()
    images = list(torch.zeros(2, 3, 64, 96, dtype=torch.uint8, device="cuda"))
    masks = torch.zeros(3, 64, 96, dtype=torch.bool, device="cuda")
    wanted = [Target(torch.zeros(3, dtype=torch.long, device="cuda"), masks) for _ in images]

    def step():
        batch, targets = pad_batch(images, wanted)
        losses = criterion(network(batch), targets)
        torch.stack(list(losses.values())).sum().backward()

    step()  # brings constants to the device once and for all
    waits = host_waits(step)
    assert len(waits) == 1, waits


def test_events_see_the_work_that_the_host_does_not_wait_for():
    a = torch.randn(4096, 4096, device="cuda")

    def task(lap):
        for _ in range(20):
            a @ a
        lap("products")

    common.time_once(task, "cuda")
    assert common.time_once(task, "cuda")["products"] > 20 * 2 * 4096**3 / 2e15  # no GPU does two petaflops
