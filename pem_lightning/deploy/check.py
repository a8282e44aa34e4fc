"""What an exported file must prove before it is handed over: the same logits as the checkpoint's network."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pem_lightning.deploy.sessions import Session
from pem_lightning.inference.optimize import OptimizedNetwork, fuse_batch_norms
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.models.pem import PEM
from pem_lightning.preprocess import normalize
from pem_lightning.types import Predictions, UserError

SHAPES = (1, 128, 192), (1, 97, 131), (1, 160, 96), (3, 64, 128)
"""Batch, height, width of the images; none is the traced example's, one is no multiple of 32."""
TIMED_SIZE = (512, 1024)
ROUNDS = 3

Arrays = tuple[np.ndarray, ...]
RunFile = Callable[[np.ndarray], Any]


class Difference(NamedTuple):
    """How far a file is from the checkpoint's network; what a file has not is None.

    Attributes:
        deviation: of a logit, relative to the largest.
        sign_flips: share of mask logits with another sign.
        pixels: share of pixels that differ.
    """

    deviation: float | None = None
    sign_flips: float | None = None
    pixels: float | None = None


LIMITS: Sequence[float] = (1e-3, 1e-4, 1e-3)
"""Of float32, for the fields of `Difference`."""


class Times(NamedTuple):
    """Medians in milliseconds of one image of a size, in turns."""

    milliseconds: float
    pytorch_milliseconds: float
    size: tuple[int, int]


def check(
    network: PEM, session: Session, run_empty: RunFile | None, inference: TaskInference | None = None
) -> Difference:
    """Compare a file with the network, at several sizes, with a batch, and where the masks of all queries are empty.

    Args:
        network: the checkpoint's, in evaluation mode.
        session: the file.
        run_empty: runs the file's model after `empty_masks`; None where its weights cannot be changed.
        inference: makes the maps that the file gives; None if it gives logits.

    Returns:
        The worst of all images.

    Raises:
        UserError: a float32 file is farther off than rounding explains.
    """
    metadata = session.metadata
    cases: list[tuple[nn.Module, RunFile]] = [(network, session.run)]
    if run_empty is not None:
        cases.append((empty_masks(network), run_empty))
    found = []
    for reference, run in cases:
        for images in _images(metadata.size, with_batch=metadata.results != "panoptic"):
            predictions = predict(reference, images)
            assert reference is network or bool((predictions.mask_logits < 0).all())
            if inference is None:
                difference = compare_logits(predictions, run(images))
            else:
                difference = _compare_maps(predictions, run(images), inference, images.shape[1:3])
            if metadata.precision == "float32":
                _refuse(difference, reference, images, predictions)
            found.append(difference)
    return Difference(*(max(values) if None not in values else None for values in zip(*found, strict=True)))


def _refuse(difference: Difference, network: nn.Module, images: np.ndarray, predictions: Predictions) -> None:
    """Raise a UserError if a file is farther off than rounding explains.

    A network that has hardly been trained may choose among equal features, and then is as far from itself in float64.
    """
    limits = LIMITS
    if difference.deviation is not None and _exceeded(difference, limits):
        own = (predictions.class_logits.numpy(), predictions.mask_logits.numpy())
        rounding = compare_logits(predict(copy.deepcopy(network).double(), images), own)
        limits = [max(limit, 10 * (value or 0)) for limit, value in zip(limits, rounding, strict=True)]
    for name, value, limit in _exceeded(difference, limits):
        raise UserError(
            f"the exported file is not the checkpoint's network ({name.replace('_', ' ')} {value:.1e}, allowed "
            f"{limit:.0e}), so nothing was written: try another deform= or format="
        )


def _exceeded(difference: Difference, limits: Sequence[float]) -> list[tuple[str, float, float]]:
    """Names, values and limits."""
    rows = zip(difference._fields, difference, limits, strict=True)
    return [(name, value, limit) for name, value, limit in rows if value is not None and not value <= limit]


def measure_times(network: PEM, session: Session) -> Times:
    """Time the file beside PyTorch's fast path."""
    size = session.metadata.size or TIMED_SIZE
    image = _draw(1, *size)
    fast, x = OptimizedNetwork(network), _normalized(image)
    calls: tuple[Callable[[], Any], ...] = (lambda: session.run(image), lambda: fast(x))
    seconds: tuple[list[float], ...] = ([], [])
    for round_number in range(ROUNDS + 1):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if round_number:  # the first is for warming up
                taken.append(time.perf_counter() - start)
    own, pytorch = (1000 * statistics.median(taken) for taken in seconds)
    return Times(own, pytorch, size)


def empty_masks(network: nn.Module) -> nn.Module:
    """Copy a network so that every mask logit is negative, whatever the image."""
    changed = fuse_batch_norms(network)
    state = changed.state_dict()
    for name, value in empty_mask_biases(state).items():
        state[name].fill_(value)
    return changed


def empty_mask_biases(names: Iterable[str]) -> dict[str, float]:
    """Which biases to fill with what for empty masks, of a network whose batch normalisations are fused.

    They outweigh all else: mask features become positive, mask embeddings negative. (Translation may have transposed
    and renamed weights, but no biases.)
    """
    names = list(names)
    last = max(name for name in names if "transformer_decoder.mask_head.layers." in name and name.endswith(".bias"))
    features = [name for name in names if "pixel_decoder.mask_projection." in name and name.endswith(".bias")]
    assert features, "mask features without biases"
    return {last: -1e4, **dict.fromkeys(features, 1e4)}


@torch.no_grad()
def predict(network: nn.Module, images: np.ndarray) -> Predictions:
    """Run the network as evaluation does, in the precision of its weights."""
    return network(_normalized(images).to(next(network.parameters()).dtype))


def _normalized(images: np.ndarray) -> Tensor:
    return torch.stack([normalize(image.permute(2, 0, 1)) for image in torch.from_numpy(images)])


def _images(size: tuple[int, int] | None, *, with_batch: bool) -> Iterator[np.ndarray]:
    if size is not None:
        yield _draw(1, *size)
        return
    for batch, height, width in SHAPES:
        if batch == 1 or with_batch:
            yield _draw(batch, height, width)


def _draw(batch: int, height: int, width: int) -> np.ndarray:
    """Images of soft spots and some noise, uint8 [B, H, W, 3]; always the same."""
    generator = torch.Generator().manual_seed(height * width + batch)
    spots = torch.rand(batch, 3, height // 16 + 1, width // 16 + 1, generator=generator)
    soft = F.interpolate(spots, size=(height, width), mode="bicubic") * 255
    noisy = soft + 8 * torch.randn(soft.shape, generator=generator)
    return noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def compare_logits(predictions: Predictions, found: Arrays) -> Difference:
    """How far a file's class and mask logits are from the network's."""
    wanted = predictions.class_logits.numpy(), predictions.mask_logits.numpy()
    deviations = [
        float(np.abs(a - b).max() / np.abs(b).max()) if a.shape == b.shape else float("inf")
        for a, b in zip(found, wanted, strict=True)
    ]
    masks = found[1]
    flips = float(np.mean((masks < 0) != (wanted[1] < 0))) if masks.shape == wanted[1].shape else 1.0
    return Difference(float(np.max(deviations)), flips)


def _compare_maps(predictions: Predictions, found: Any, inference: TaskInference, size: tuple[int, int]) -> Difference:
    maps = found if inference.task == "panoptic" else found[0]
    shares = []
    for i, got in enumerate(maps[0][None] if inference.task == "panoptic" else maps):
        one = Predictions(predictions.class_logits[i : i + 1], predictions.mask_logits[i : i + 1])
        result = inference(one, size, size)
        wanted = result.panoptic if inference.task == "panoptic" else result.semantic
        assert wanted is not None
        same_shape = got.shape == tuple(wanted.shape)
        shares.append(float(np.mean(got != wanted.numpy())) if same_shape else 1.0)
    return Difference(pixels=max(shares))
