import pytest
import torch

from pem_lightning.benchmark.kernels import benchmark_kernels, largest_differences
from pem_lightning.benchmark.operators import OPERATORS, attention_problems, conv_problems, pyramid
from pem_lightning.models.mask2former_pixel_decoder import pixel_centres

SIZE = (64, 96)


def test_kernels_are_timed_at_the_pyramids_sizes_and_agree():
    said = []
    conv, attention = benchmark_kernels(SIZE, batch=1, device="cpu", rounds=1, warmup=0, say=said.append)
    assert said == [
        "comparing kernels: deformable convolution",
        "comparing kernels: multi-scale deformable attention",
    ]
    for section, operator, sizes, libraries in (
        (conv, "conv", ["2 x 3", "4 x 6", "8 x 12"], {"torchvision", "mmcv"}),
        (attention, "attention", ["2 x 3 + 4 x 6 + 8 x 12"], {"mmcv"}),
    ):
        kernels, missing = OPERATORS[operator].installed()
        assert {"torch", "grid_sample"} <= set(kernels)
        assert set(kernels) | set(missing) == {"torch", "grid_sample", *libraries}
        assert section["missing"] == missing
        assert [(row["kernel"], row["size"]) for row in section["rows"]] == [(k, s) for s in sizes for k in kernels]
        assert all(row["float64_difference"] < 1e-10 for row in section["rows"])
        assert all(row["forward_ms"]["median"] > 0 for row in section["rows"])
        assert all(row["forward_backward_ms"]["median"] > 0 for row in section["rows"])


PROBLEMS = {"conv": conv_problems(SIZE, 1, "cpu")[1], "attention": attention_problems((64, 224), 2, "cpu")[0]}


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_kernel_is_found(operator):
    kernels, _ = OPERATORS[operator].installed()

    def wrong(*arguments):
        return kernels["torch"](*arguments) + 1e-3

    differences = largest_differences({**kernels, "wrong": wrong}, PROBLEMS[operator])
    assert differences["wrong"] >= 1e-3
    assert differences["torch"] < 1e-10


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("argument", [0, -2, -1])
def test_the_gradients_count_too(operator, argument):
    kernels, _ = OPERATORS[operator].installed()

    def wrong_gradient(*arguments):
        arguments = list(arguments)
        arguments[argument] = arguments[argument].detach() + 0 * arguments[argument]
        return kernels["torch"](*arguments)

    assert largest_differences({**kernels, "wrong": wrong_gradient}, PROBLEMS[operator])["wrong"] > 1e-3


def test_odd_images_are_padded_as_the_network_does():
    assert pyramid((33, 60)) == [(2, 2), (4, 4), (8, 8)]


def test_attention_looks_around_every_position():
    values, locations, weights = PROBLEMS["attention"].tensors
    assert values.shape == (2, 14 + 56 + 224, 8, 32)
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, 294, 8))
    sizes = pyramid((64, 224))
    around = locations.detach() - pixel_centres(sizes)[:, None, None, None]
    pixels = around * torch.tensor([(width, height) for height, width in sizes])[:, None]
    assert pixels.mean().abs() < 0.1
    assert pixels.std() == pytest.approx(3, abs=0.1)
