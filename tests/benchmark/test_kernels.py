import torch

from pem_lightning.benchmark.kernels import benchmark_kernels, installed_kernels, largest_differences


def test_kernels_are_timed_at_three_sizes_and_agree():
    result = benchmark_kernels((64, 96), batch=1, device="cpu", rounds=1, warmup=0)
    kernels, missing = installed_kernels()
    assert {"torch", "grid_sample"} <= set(kernels)
    assert set(kernels) | set(missing) == {"torch", "grid_sample", "torchvision", "mmcv"}
    assert [(row["height"], row["width"]) for row in result["rows"]] == [
        size for size in ((2, 3), (4, 6), (8, 12)) for _ in kernels
    ]
    assert all(row["float64_difference"] < 1e-10 for row in result["rows"])
    assert all(row["forward_ms"]["median"] > 0 for row in result["rows"])
    assert all(row["forward_backward_ms"]["median"] > 0 for row in result["rows"])


def test_a_wrong_kernel_is_found():
    kernels, _ = installed_kernels()

    def wrong(x, offsets, mask, weight):
        return kernels["torch"](x, offsets, mask, weight) + 1e-3 * torch.ones_like(x)

    differences = largest_differences({**kernels, "wrong": wrong}, 3, 4, "cpu")
    assert differences["wrong"] >= 1e-3
    assert differences["torch"] < 1e-10


def test_the_gradients_count_too():
    kernels, _ = installed_kernels()

    def wrong_gradient(x, offsets, mask, weight):
        return kernels["torch"](x, offsets.detach() + 0 * offsets, mask, weight)

    assert largest_differences({**kernels, "wrong": wrong_gradient}, 3, 4, "cpu")["wrong"] > 1e-3
