"""Uncompressed copies of a data set's items, memory-mapped: no decoding, and a crop reads its own rows only.

Each item is one file: a magic word, the hash of all that follows these first 48 bytes, the length of the header, the
header in JSON, the id map (int32), the image (RGB). Files appear complete or not at all, so that an interrupted copying
is simply taken up again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from pem_lightning.data.dataset import SegmentationDataset
from pem_lightning.files import write_file
from pem_lightning.types import Sample, Segment, UserError

log = logging.getLogger(__name__)

_START = struct.Struct("<8s32sQ")
_MAGIC = b"PEMdata1"  # the digit is raised when the format changes
_ALIGNMENT = 64
_BYTES_PER_PIXEL = 4 + 3


class CachedDataset(SegmentationDataset):
    """A data set read from copies of its items, which are made when it is constructed.

    Items whose copy is missing, incomplete or older than their files are copied, by one process at a time: others that
    start meanwhile wait and find the work done. Each process compares an item's content with its hash once.

    Args:
        source: what to copy; its transform and `on_error` are taken over.
        folder: for the copies of any data sets, each in a folder of its own within.
        num_workers: processes that copy; 0 copies in this one.

    Raises:
        UserError: the folder cannot be written or is too small, or with `on_error="stop"` an item cannot be read.
    """

    def __init__(self, source: SegmentationDataset, folder: str | Path, num_workers: int = 0) -> None:
        super().__init__(source.info, source.names, transform=source.transform, on_error=source.on_error)
        self.problems = source.problems
        self.image_ids = source.image_ids
        self.prediction_suffix = source.prediction_suffix
        self.source = source
        self.folder = Path(folder) / f"{source.info.name}_{_identity(source)}"
        self._verified = np.zeros(len(source), bool)
        if self._outdated():
            self._copy_outdated(num_workers)

    def files(self, index: int) -> tuple[Path, ...]:
        """The files that the item was copied from."""
        return self.source.files(index)

    def path(self, index: int) -> Path:
        """The copy of one item."""
        return self.folder / f"{quote(self.names[index], safe=' ')}.sample"

    def read(self, index: int) -> Sample:
        """Map one item into memory; what nobody looks at is not read. Items that could not be copied are decoded.

        Raises:
            UserError: the copy is damaged, or the item cannot be decoded.
        """
        path = self.path(index)
        if not path.exists():
            return self.source.read(index)
        header = _read_header(path)
        if header is None:
            raise _damaged(path)
        # Private pages: whatever a transform does to them never reaches the file.
        file = np.asarray(np.memmap(path, np.uint8, "c"))
        if not self._verified[index]:
            if hashlib.sha256(file.data[_START.size :]).digest() != header.sha256:
                raise _damaged(path)
            self._verified[index] = True
        data = file[header.offset :]
        height, width = header.size
        image = data[4 * height * width :].reshape(height, width, 3)
        panoptic = data[: 4 * height * width].view(np.int32).reshape(height, width)
        return Sample(
            torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(panoptic), header.segments, self.names[index]
        )

    def copy(self, index: int) -> str | None:
        """Copy one item; returns what is wrong with it, if it cannot be read."""
        fingerprint = self._fingerprint(index)  # before reading: a change in between must show
        try:
            sample = self.source.read(index)
        except UserError as error:
            return str(error)
        write_file(self.path(index), _pack(sample, fingerprint))
        return None

    def _fingerprint(self, index: int) -> list[list[Any]]:
        """Place, size and time of change of the files that an item is made of; null where one is missing."""
        return [_state(path) for path in (*self.source.files(index), *self.source.common_files)]

    def _outdated(self) -> list[int]:
        return [index for index in range(len(self)) if not self._is_current(index)]

    def _is_current(self, index: int) -> bool:
        path = self.path(index)
        if not path.exists():
            return False
        header = _read_header(path)
        if header is None:
            log.warning("%s is damaged and made again", path)
        return header is not None and header.fingerprint == self._fingerprint(index)

    def _copy_outdated(self, num_workers: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock").acquire()
        except OSError as error:
            raise UserError(
                f"cannot write to dataset.cache={self.folder.parent} ({error.strerror}): choose another folder, or null"
            ) from error
        with lock:
            for leftover in self.folder.glob(".*.sample.*"):  # of a process that was killed
                leftover.unlink()
            outdated = self._outdated()
            self._check_space(outdated)
            workers = min(num_workers, len(outdated))
            copies = DataLoader(_Copies(self), batch_size=None, sampler=outdated, num_workers=workers)
            title = f"Copying {len(outdated)} items of {self.info.name} to {self.folder}"
            failures = [problem for problem in track(copies, title, total=len(outdated)) if problem] if outdated else []
        if failures and self.on_error == "stop":
            more = f" (and {len(failures) - 1} more such problems)" if len(failures) > 1 else ""
            raise UserError(failures[0] + more)

    def _check_space(self, indices: list[int]) -> None:
        """Refuse before the work if the disk cannot hold all copies."""
        needed = sum(_size_of_copy(self.source.files(index)[0]) for index in indices)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"dataset.cache={self.folder.parent} needs {needed / 1e9:.1f} GB, of which its disk has "
                f"{free / 1e9:.1f} GB free: choose a folder on a larger disk, or null"
            )


class _Copies(Dataset[Any]):
    """Copying as a data set, so that PyTorch's loader can spread it over processes."""

    def __init__(self, cached: CachedDataset) -> None:
        self.cached = cached

    def __getitem__(self, index: int) -> str | None:
        return self.cached.copy(index)


class _Header(NamedTuple):
    size: tuple[int, int]
    segments: tuple[Segment, ...]
    fingerprint: list[list[Any]]
    sha256: bytes
    offset: int


def _pack(sample: Sample, fingerprint: list[list[Any]]) -> bytes:
    content = sample.panoptic.numpy().tobytes() + sample.image.permute(1, 2, 0).numpy().tobytes()
    header = {
        "size": list(sample.panoptic.shape),
        "segments": [list(segment) for segment in sample.segments],
        "fingerprint": fingerprint,
    }
    text = json.dumps(header, default=int).encode()  # NumPy's integers
    text += b" " * (-(_START.size + len(text)) % _ALIGNMENT)
    return _START.pack(_MAGIC, hashlib.sha256(text + content).digest(), len(text)) + text + content


def _read_header(path: Path) -> _Header | None:
    """What a copy says about itself, None if it is damaged or incomplete."""
    with path.open("rb") as file:
        start = file.read(_START.size)
        if len(start) < _START.size or not start.startswith(_MAGIC):
            return None
        _, sha256, length = _START.unpack(start)
        size_of_file = os.fstat(file.fileno()).st_size
        if length > size_of_file:
            return None
        text = file.read(length)
    try:
        header = json.loads(text)
        height, width = header["size"]
        segments = tuple(Segment(*segment) for segment in header["segments"])
        result = _Header((height, width), segments, header["fingerprint"], sha256, _START.size + length)
    except (ValueError, TypeError, KeyError):
        return None
    return result if size_of_file == result.offset + _BYTES_PER_PIXEL * height * width else None


def _state(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError:
        return [os.path.abspath(path), None, None]
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _identity(dataset: SegmentationDataset) -> str:
    """Short hash of what makes copies of one data set useless to another: how it reads, its classes, its folders."""
    columns = zip(*(dataset.files(index) for index in range(len(dataset))), strict=False)
    folders = [os.path.commonpath([os.path.abspath(path.parent) for path in column]) for column in columns]
    facts = json.dumps([type(dataset).__qualname__, dataset.info.to_dict(), folders])
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def _size_of_copy(image: Path) -> int:
    try:
        with Image.open(image) as file:
            return file.width * file.height * _BYTES_PER_PIXEL
    except Exception:  # reading it properly will say what is wrong
        return 0


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: delete it, and it is made again at the next start")
