"""Uncompressed copies of a data set's items, memory-mapped: no decoding, and a crop reads its own rows only.

Each item is three files: `<name>.image.npy` (height, width, 3; uint8), `<name>.ids.npy` (height, width; int32), and
`<name>.json` with its segments, which is written last.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from filelock import FileLock
from PIL import Image

from pem_lightning.data.dataset import SegmentationDataset, first_problem, make_sample, map_parallel
from pem_lightning.files import remove_leftovers, write_file
from pem_lightning.types import Sample, Segment, UserError

log = logging.getLogger(__name__)

_FORMAT = 2
"""Raised when the format changes: copies of another one lie in another folder."""
_BYTES_PER_PIXEL = 3 + 4


class CachedDataset(SegmentationDataset):
    """A data set read from copies of its items, which are made when it is constructed.

    Items whose copy is missing, incomplete or older than their files are copied, by one process at a time: others that
    start meanwhile wait and find the work done. Each process compares an item's content with its hash once. The folder
    may serve several data sets; the source's transform and `on_error` are taken over.

    Raises:
        UserError: the folder cannot be written or is too small, or with `on_error="stop"` an item cannot be read.
    """

    def __init__(self, source: SegmentationDataset, folder: str | Path, num_workers: int = 0) -> None:
        files = {name: source.files(index) for index, name in enumerate(source.names)}
        super().__init__(source.info, files, transform=source.transform, on_error=source.on_error)
        self.problems = source.problems
        self.image_ids = source.image_ids
        self.prediction_suffix = source.prediction_suffix
        self.source = source
        self.folder = Path(folder) / f"{source.info.name}_{_identity(source)}"
        self._verified = np.zeros(len(source), bool)
        if not all(map(self._is_current, range(len(self)))):
            self._copy_outdated(num_workers)

    def paths(self, index: int) -> tuple[Path, Path, Path]:
        """Image, ids and JSON of one item's copy."""
        stem = self.folder / quote(self.names[index], safe=" ")
        return Path(f"{stem}.image.npy"), Path(f"{stem}.ids.npy"), Path(f"{stem}.json")

    def read(self, index: int) -> Sample:
        """Map one item into memory; what nobody looks at is not read. Items that could not be copied are decoded.

        Raises:
            UserError: the copy is damaged, or the item cannot be decoded.
        """
        *arrays, facts_path = self.paths(index)
        if not facts_path.exists():
            return self.source.read(index)
        try:
            facts = json.loads(facts_path.read_bytes())
            item = facts["item"]
            if not self._verified[index]:
                if _digest(item, (path.read_bytes() for path in arrays)) != facts["hash"]:
                    raise ValueError("another hash")
                self._verified[index] = True
            segments = [Segment(*segment) for segment in item["segments"]]
            image = _map(arrays[0], np.uint8, (*item["shape"], 3), item["sizes"][0])
            ids = _map(arrays[1], np.int32, tuple(item["shape"]), item["sizes"][1])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{facts_path} or its arrays are damaged: delete it, it is made again at the next start"
            ) from error
        return make_sample(image, ids, segments, self.names[index])

    def copy(self, index: int) -> str | None:
        """Copy one item; returns what is wrong with it, if it cannot be read."""
        fingerprint = self._fingerprint(index)  # before reading: a change in between must show
        try:
            sample = self.source.read(index)
        except UserError as error:
            return str(error)
        *arrays, facts_path = self.paths(index)
        contents = []
        for array in (sample.image.permute(1, 2, 0).numpy(), sample.panoptic.numpy()):
            np.save(buffer := io.BytesIO(), np.ascontiguousarray(array))
            contents.append(buffer.getvalue())
        item = {
            "shape": list(sample.panoptic.shape),
            "sizes": [len(content) for content in contents],
            "segments": [list(segment) for segment in sample.segments],
        }
        for path, content in zip(arrays, contents, strict=True):
            write_file(path, content)
        write_file(facts_path, json.dumps({"item": item, "files": fingerprint, "hash": _digest(item, contents)}))
        return None

    def _fingerprint(self, index: int) -> list[list[Any]]:
        """Place, size and time of change of the files that an item is made of."""
        return [_state(path) for path in (*self.files(index), *self.source.common_files)]

    def _is_current(self, index: int) -> bool:
        *arrays, facts_path = self.paths(index)
        if not facts_path.exists():
            return False
        try:
            facts = json.loads(facts_path.read_bytes())
            sizes, files = facts["item"]["sizes"], facts["files"]
        except (ValueError, TypeError, KeyError):
            sizes, files = None, None
        if sizes != [_state(path)[1] for path in arrays]:
            log.warning("%s or its arrays are damaged and made again", facts_path)
            return False
        return bool(files == self._fingerprint(index))

    def _copy_outdated(self, num_workers: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock").acquire()
        except OSError as error:
            raise UserError(
                f"cannot write to dataset.cache={self.folder.parent} ({error.strerror}): choose another folder, or null"
            ) from error
        with lock:
            remove_leftovers(self.folder)
            outdated = [index for index in range(len(self)) if not self._is_current(index)]
            self._check_space(outdated)
            title = f"Copying {len(outdated)} items of {self.info.name} to {self.folder}"
            copied = map_parallel(self.copy, outdated, num_workers, title) if outdated else ()
            failures = [problem for problem in copied if problem]
        if failures and self.on_error == "stop":
            raise UserError(first_problem(failures))

    def _check_space(self, indices: list[int]) -> None:
        """Refuse before the work if the disk cannot hold all copies."""
        needed = 0
        for index in indices:
            # Reading it properly will say what is wrong with a file that cannot be opened.
            with suppress(Exception), Image.open(self.files(index)[0]) as file:
                needed += file.width * file.height * _BYTES_PER_PIXEL
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"dataset.cache={self.folder.parent} needs {needed / 1e9:.1f} GB, of which its disk has "
                f"{free / 1e9:.1f} GB free: choose a folder on a larger disk, or null"
            )


def _map(path: Path, dtype: type, shape: tuple[int, ...], size: int) -> np.ndarray:
    """The array of a `.npy` file of a known size; `np.load` would read its header, five times slower.

    Its pages are private: whatever a transform does to them never reaches the file.
    """
    offset = size - math.prod(shape) * np.dtype(dtype).itemsize
    return np.asarray(np.memmap(path, dtype, "c", offset, shape))


def _digest(item: dict[str, Any], contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256(json.dumps(item).encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


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
    facts = json.dumps([_FORMAT, type(dataset).__qualname__, dataset.info.to_dict(), folders])
    return hashlib.sha256(facts.encode()).hexdigest()[:8]
