"""Finding and reading what people hand in: images of any format and mode, and the names of videos."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from pem_lightning.data import reading
from pem_lightning.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
FORMATS = (*reading.FORMATS, "GIF", "JPEG2000")
"""Files are recognised by content. Of several frames or pages the first one counts."""

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def find_images(source: str | Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Images by name: one file, a folder's (not its subfolders'), or those that match a pattern.

    Args:
        source: a path, or a pattern with `*`, `?`, `[...]` or `**`. A single file is taken as it is.
        suffixes: the endings of files that are taken in folders and patterns.

    Returns:
        Sorted paths, at least one.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates, where = list(path.iterdir()), f"folder {path}"
    elif glob.has_magic(str(path)):
        candidates, where = [Path(match) for match in glob.glob(str(path), recursive=True)], f"pattern {path}"
    else:
        raise UserError(f"{path} does not exist: give an image, a folder of images or a pattern such as 'folder/*.png'")
    found = sorted(p for p in candidates if p.suffix.lower() in suffixes and p.is_file())
    if not found:
        raise UserError(f"no images in {where}: expected files that end in {', '.join(sorted(suffixes))}")
    return found


def read_image(source: ImageLike) -> UInt8[np.ndarray, "height width 3"]:
    """An image as RGB, upright as its EXIF orientation says.

    16-bit values are scaled to 8 bits; transparent parts are laid on white; of an animation the first frame is taken.

    Args:
        source: a file; a Pillow image; an array uint8 [H, W, 3] (RGB, returned as it is), [H, W, 4] (RGBA) or [H, W]
            (grey); or a tensor uint8 [3, H, W].

    Raises:
        UserError: the file is missing or is not a complete image, or the array or tensor has another shape or type.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    # Pillow warns about images half as large as those it refuses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if isinstance(source, Image.Image):
            try:
                return reading.to_rgb(source)
            except (OSError, SyntaxError, ValueError) as error:  # it was opened, but not read yet
                raise UserError(f"cannot read the image ({error}): check that it is a complete image") from error
        return _from_file(Path(source))


def _from_file(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return reading.read_rgb(path, "check that it is a complete image file", FORMATS)
    except UserError as error:
        if not isinstance(error.__cause__, Image.DecompressionBombError):
            raise
        limit = round(2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6)
        raise UserError(f"{path} has more than {limit} million pixels: shrink it or cut it into parts") from error


def _from_array(array: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise UserError(
            "an image must be a uint8 array [H, W, 3], [H, W, 4] or [H, W] (several images: a list of arrays), "
            f"not {array.dtype} {list(array.shape)}"
        )
    if channels == 3:
        return array
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return reading.to_rgb(Image.fromarray(array))


def _from_tensor(tensor: Tensor) -> UInt8[np.ndarray, "height width 3"]:
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or len(tensor) != 3 or tensor.numel() == 0:
        raise UserError(
            "an image must be a uint8 tensor [3, H, W] (several images: a list of tensors), "
            f"not {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )
    return np.ascontiguousarray(tensor.permute(1, 2, 0).cpu().numpy())
