"""Writing files so that no half-written one is ever taken for a whole one; segment ids as the colours of a PNG."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pem_lightning.basic_types import UserError
from pem_lightning.shapes import Int32, UInt8

log = logging.getLogger(__name__)

_SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")
MAX_ID = 256**3 - 1
"""Largest segment id that a COCO panoptic PNG can hold."""


def is_system_file(path: Path) -> bool:
    """Whether macOS or Windows put a file beside the user's: `._street.png` has the icon of street.png."""
    return path.name.startswith("._") or path.name in _SYSTEM_FILES


def same_on_disk(name: str) -> str:
    """What two names of files have in common if the system's usual disks take them for one: without case, or not."""
    return name.casefold() if sys.platform in ("darwin", "win32") else name


def write_file(path: Path, content: bytes | str) -> Path:
    """Write a file at once (text as UTF-8); its folder is made if need be.

    Raises:
        UserError: the file cannot be written. What was there before is left.
    """
    try:
        with replace_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another output folder or make room") from error
    return path


def write_or_warn(path: Path, content: bytes | str) -> bool:
    """`write_file` for what training can do without, such as pictures; returns whether it worked."""
    try:
        write_file(path, content)
    except UserError as error:
        log.warning("%s; going on without it", error)
        return False
    return True


@contextmanager
def replace_file(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that replaces the old one when it is complete; its folder is made if need be.

    With `durable` it waits until the file is on the disk, so that it survives a power failure.

    Raises:
        OSError: the file cannot be written. What was there before is left.
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
        with suppress(OSError):  # not every file system can make the new name durable
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete and return the temporary files of killed processes; only where nobody else is writing."""
    leftovers = [path for path in folder.rglob(".*.tmp") if re.fullmatch(r"\..+\.\d+\.tmp", path.name)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def check_writable(folder: Path) -> None:
    """Raise a UserError if files cannot be written into a folder, which need not exist yet."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({existing}: {error.strerror}): choose another output folder or make room"
        ) from error


def rgb_to_id(rgb: UInt8[np.ndarray, "height width 3"]) -> Int32[np.ndarray, "height width"]:
    """Segment ids from the colours of a COCO panoptic PNG: R + 256 G + 256² B."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 256**2 * blue


def id_to_rgb(ids: Int32[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """Inverse of `rgb_to_id`.

    Raises:
        ValueError: an id is not in 0..`MAX_ID`.
    """
    if ids.size and (ids.min() < 0 or ids.max() > MAX_ID):
        raise ValueError(f"segment ids must be in 0..{MAX_ID}, got {ids.min()}..{ids.max()}")
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
