import pytest
import torch
import torch.nn.functional as F

from pem_lightning.benchmark.roofline import Ceilings, bound, estimate_bytes, measure_ceilings


def test_the_least_time_is_that_of_the_scarcer_resource():
    ceilings = Ceilings(bandwidth=10.0, matmul={"float32": 100.0}, conv={"float32": 50.0})
    assert bound(1000.0, 1.0, ceilings, "float32") == (10.0, "compute")
    assert bound(1.0, 1000.0, ceilings, "float32") == (100.0, "memory")


def test_ceilings_are_measured_for_every_precision():
    ceilings = measure_ceilings("cpu", ["float32", "bfloat16"], small=True)
    assert ceilings.bandwidth > 1e8
    assert set(ceilings.matmul) == set(ceilings.conv) == {"float32", "bfloat16"}
    assert all(ceilings.peak(name) >= speed > 1e6 for name, speed in ceilings.matmul.items())


X = torch.randn(1, 4, 8, 8)
WEIGHT = torch.randn(6, 4, 1, 1)
SIZE_X, SIZE_W, SIZE_Y = 4 * 4 * 64, 4 * 24, 4 * 6 * 64


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: F.conv2d(x, WEIGHT), SIZE_X + SIZE_W + SIZE_Y),
        (lambda x: x.flatten(2).mT[:, :3].unflatten(1, (3, 1)), 0),  # views
        (lambda x: x.contiguous().float(), 0),  # nothing to do
        (lambda x: x.mul_(2), 2 * SIZE_X),  # read and written
        (lambda x: F.relu(x, inplace=True), 2 * SIZE_X),
        (lambda x: torch.cat([x, x]), 4 * SIZE_X),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 5 * SIZE_X),
    ],
)
def test_bytes_are_what_is_read_and_written(function, expected):
    assert estimate_bytes(function, X.clone()) == expected
