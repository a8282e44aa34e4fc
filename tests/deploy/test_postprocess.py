"""NumPy's post-processing against PyTorch's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.deploy import postprocess as numpy_version
from pem_lightning.deploy.postprocess import postprocess
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.types import Predictions

THINGS = frozenset({0, 2, 5})
CLASSES = 7


def smooth(seed: int, size: tuple[int, int], queries: int, sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as of a trained network: few sure queries, smooth masks with steep contours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, queries, max(2, size[0] // 6), max(2, size[1] // 6), generator=generator)
    masks = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[0] * sharpness - 0.7 * sharpness
    classes = torch.randn(queries, CLASSES + 1, generator=generator) * 4
    classes[:, -1] += 3
    return classes, masks


def noise(seed: int, size: tuple[int, int], queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(queries, CLASSES + 1, generator=generator),
        torch.randn(queries, *size, generator=generator) * 3,
    )


def both(task, logits, image_size, output_size, **settings):
    """PyTorch's result, as arrays, and NumPy's."""
    classes, masks = logits
    expected = TaskInference(task, THINGS, **settings)(Predictions(classes[None], masks[None]), image_size, output_size)
    found = postprocess(
        classes.numpy(),
        masks.numpy(),
        task=task,
        thing_classes=THINGS,
        image_size=image_size,
        output_size=output_size,
        **settings,
    )
    return expected.convert(torch.Tensor.numpy), found


def assert_same(expected, found, pixels: int = 0) -> None:
    """Equal but for some pixels that the last bit of a number decides."""
    for name in ("semantic", "panoptic"):
        one, other = getattr(expected, name), getattr(found, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert other.dtype == one.dtype == np.int32
            assert (one != other).sum() <= pixels
    assert [s[:4] for s in found.segments] == [s[:4] for s in expected.segments]
    assert [s.score for s in found.segments] == pytest.approx([s.score for s in expected.segments], rel=1e-5)
    assert [i.class_id for i in found.instances] == [i.class_id for i in expected.instances]
    assert [i.score for i in found.instances] == pytest.approx(
        [i.score for i in expected.instances], rel=1e-5, abs=1e-9
    )
    for one, other in zip(expected.instances, found.instances, strict=True):
        assert (one.mask != other.mask).sum() <= pixels


SIZES = [
    # image, output
    ((64, 96), (64, 96)),
    ((61, 83), (61, 83)),
    ((33, 96), (33, 96)),
    ((61, 83), (122, 166)),
    ((64, 96), (37, 150)),
    ((50, 70), (49, 71)),
    ((3, 5), (3, 5)),
    ((3, 5), (9, 11)),
]


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
@pytest.mark.parametrize(("image_size", "output_size"), SIZES)
@pytest.mark.parametrize("resize_first", [True, False])
def test_same_as_pytorch(task, image_size, output_size, resize_first, monkeypatch):
    monkeypatch.setattr(numpy_version, "ELEMENTS_AT_ONCE", 5000)  # several strips
    monkeypatch.setattr(numpy_version, "CELL_ELEMENTS_AT_ONCE", 3000)
    quarter = tuple(-(-side // 32) * 8 for side in image_size)
    cases = [smooth(i, quarter, 20, sharpness) for i, sharpness in enumerate((1.0, 8.0, 30.0))]
    for logits in (*cases, noise(9, quarter, 12)):
        options = {"resize_first": resize_first, "object_mask_threshold": 0.3, "overlap_threshold": 0.4, "top_k": 30}
        assert_same(*both(task, logits, image_size, output_size, **options))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([None, (1.7, 0.6), (0.5, 2.0), (1.0, 1.3)]),
    st.sampled_from(["semantic", "panoptic", "instance"]),
    st.integers(1, 12),
)
def test_any_size_and_count(seed, height, width, scale, task, queries):
    quarter = tuple(-(-side // 32) * 8 for side in (height, width))
    output = (height, width) if scale is None else (max(1, round(height * scale[0])), max(1, round(width * scale[1])))
    logits = smooth(seed, quarter, queries, 6.0)
    options = {"object_mask_threshold": 0.2, "overlap_threshold": 0.5, "resize_first": bool(seed % 2)}
    assert_same(*both(task, logits, (height, width), output, **options), pixels=1)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
@pytest.mark.parametrize("output_size", [(64, 96), (100, 77)])
def test_corners(task, output_size):
    """Ties, masks without a pixel, and logits beyond what an exponential can hold."""
    size = 16, 24
    classes, masks = smooth(4, size, 10, 5.0)
    twice = torch.cat([classes, classes]), torch.cat([masks, masks])  # every query has an equal one
    nothing = classes, torch.full_like(masks, -3.0)
    zero = torch.zeros_like(classes), torch.zeros_like(masks)
    large = classes, torch.sign(masks) * 1e4
    none = classes - 50 * F.one_hot(torch.arange(CLASSES), CLASSES + 1).sum(0), masks  # only "no object"
    for logits in (twice, nothing, zero, large, none):
        options = {"object_mask_threshold": 0.1, "overlap_threshold": 0.3, "top_k": 5000}
        results = both(task, logits, (64, 96), output_size, **options)
        assert_same(*(r._replace(instances=()) for r in results))
        # PyTorch leaves the order of equal scores open.
        expected, found = (sorted((i.class_id, int(i.mask.sum()), i.score) for i in r.instances) for r in results)
        assert [f[:2] for f in found] == [e[:2] for e in expected]
        assert [f[2] for f in found] == pytest.approx([e[2] for e in expected], rel=1e-5, abs=1e-9)


def test_exact_ties_of_instances_come_in_the_order_of_queries():
    classes, masks = torch.zeros(3, CLASSES + 1), torch.full((3, 8, 8), 5.0)
    found = postprocess(
        classes.numpy(),
        masks.numpy(),
        task="instance",
        thing_classes=THINGS,
        image_size=(32, 32),
        output_size=(32, 32),
        top_k=CLASSES,
    )
    assert [i.class_id for i in found.instances] == [0, 2, 5]  # of the first query alone


def test_memory_is_bounded():
    """No array of all masks or all scores at the full size."""
    import tracemalloc

    classes, masks = smooth(0, (64, 128), 50, 8.0)
    arguments = {"thing_classes": THINGS, "image_size": (256, 512), "output_size": (1024, 2048)}
    for task in ("semantic", "panoptic"):
        tracemalloc.start()
        postprocess(classes.numpy(), masks.numpy(), task=task, object_mask_threshold=0.2, **arguments)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100 * 2**20  # all masks would be 400 MiB
