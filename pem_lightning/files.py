"""Writing files so that no half-written one is ever taken for a whole one."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from pycocotools import mask as coco_mask
from torch import Tensor

from pem_lightning.types import UserError

log = logging.getLogger(__name__)


def write_file(path: Path, content: bytes | str) -> Path:
    """Write a file at once: readers never see half of it, and a crash leaves what was there before.

    Args:
        path: its folder is made if need be.
        content: text is written as UTF-8.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replace_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another output folder or make room") from error
    return path


def write_or_warn(path: Path, content: bytes | str) -> bool:
    """`write_file` for what training can do without, such as its pictures: a failure is only logged.

    Returns:
        Whether the file was written.
    """
    try:
        write_file(path, content)
    except UserError as error:
        log.warning("%s; going on without it", error)
        return False
    return True


@contextmanager
def replace_file(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of an old one when all of it is written.

    Args:
        path: its folder is made if need be.
        durable: wait until the file is on the disk, so that it outlives a power failure as well.

    Raises:
        OSError: the file cannot be written; what was there before is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what killed processes had half-written anywhere in a folder; only where nobody else is writing.

    Returns:
        The files that are gone.
    """
    leftovers = [path for path in folder.rglob(".*.tmp") if re.fullmatch(r"\..+\.\d+\.tmp", path.name)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def check_writable(folder: Path) -> None:
    """Find out early whether files can be written into a folder, which need not exist yet.

    Raises:
        UserError: they cannot.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write into {folder} ({existing} is a file): choose another output folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {folder} (no permission for {existing}): choose another output folder")
    if shutil.disk_usage(existing).free == 0:
        raise UserError(f"cannot write into {folder} (the disk is full): choose another output folder or make room")


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, too; not every file system has that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


MAX_ID = 256**3 - 1


def rgb_to_id(rgb: UInt8[np.ndarray, "height width 3"]) -> Int32[np.ndarray, "height width"]:
    """Segment ids from the colours of a COCO panoptic PNG."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 256**2 * blue


def id_to_rgb(ids: Int32[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """Colours that carry the segment ids, to be saved without loss (PNG).

    Raises:
        ValueError: an id is negative or does not fit into 24 bits.
    """
    if ids.size and (ids.min() < 0 or ids.max() > MAX_ID):
        raise ValueError(f"segment ids must be in 0..{MAX_ID}, got {ids.min()}..{ids.max()}")
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


class RLE(TypedDict):
    """COCO's compressed encoding in JSON's types: height and width, and the lengths of runs as text."""

    size: list[int]
    counts: str


def encode_mask(mask: Bool[Tensor, "height width"]) -> RLE:
    """Encode one mask."""
    # Columns first, as COCO counts runs.
    pixels = mask.T.contiguous().cpu().numpy().view(np.uint8).T
    encoded = coco_mask.encode(pixels)
    return RLE(size=[int(length) for length in encoded["size"]], counts=encoded["counts"].decode("ascii"))
