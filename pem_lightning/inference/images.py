"""Finding and reading images that people hand in: any format, any mode."""

from __future__ import annotations

import glob
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pem_lightning.data.reading import to_rgb
from pem_lightning.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def find_images(source: str | Path) -> list[Path]:
    """Images by name: one file, a folder's (not its subfolders'), or those that match a pattern.

    Args:
        source: a path, or a pattern with `*`, `?`, `[...]` or `**`. In folders and patterns only files with one of
            `IMAGE_SUFFIXES` are taken; a single file is taken as it is.

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
    found = sorted(p for p in candidates if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"no images in {where}: expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def read_image(source: str | Path | Image.Image | np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    """An image as RGB, upright as its EXIF orientation says.

    16-bit grey is scaled to 8 bits; transparent parts are laid on white.

    Args:
        source: a file, a Pillow image, or an array uint8 [H, W, 3], which is returned as it is.

    Raises:
        UserError: the file is missing or is not a complete image, or the array has another shape or type.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise UserError(f"an image must be a uint8 array [H, W, 3], not {source.dtype} {list(source.shape)}")
        return source
    if isinstance(source, Image.Image):
        return to_rgb(source)
    try:
        with Image.open(source) as file:
            return to_rgb(file)
    except FileNotFoundError as error:
        raise UserError(f"image {source} does not exist: check the path") from error
    # Pillow's errors for files that are no image, truncated, garbled or absurdly large
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read image {source} ({reason}): check that it is a complete image file") from error
