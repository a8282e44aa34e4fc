"""What every data set has in common: named items, the files behind them, and how one is read."""

from __future__ import annotations

import colorsys
import io
import logging
import struct
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int32, UInt8, UInt16
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset

from pem_lightning.data.targets import IGNORE_INDEX
from pem_lightning.types import ClassInfo, DatasetInfo, Sample, Segment, UserError

log = logging.getLogger(__name__)

SampleTransform = Callable[[Sample], Sample]
OnError = Literal["stop", "skip", "collect"]


class SegmentationDataset(Dataset[Sample], ABC):
    """One split of a data set, in the order of its names.

    A subclass finds its files when it is constructed, without opening them, and implements `files` and `read`.

    Attributes:
        info: the classes.
        names: of the items, unique.
        problems: what is wrong with the files found, one message with its cure each (only with `on_error="collect"`).
        common_files: those that describe several items, such as one JSON for all.
        image_ids: the ids that official files give to images, by name, where those are not the names themselves.
        prediction_suffix: what a benchmark wants the names of prediction files to end in, before ".png".

    Args:
        info: the classes.
        names: of the items, unique.
        problems: what the subclass found wrong, such as images without annotation.
        transform: applied to every sample that is read.
        on_error: what `problems` and unreadable files do: "stop" raises the first, "skip" logs them and takes the next
            item instead, "collect" keeps `problems` for whoever asks and raises on reading.

    Raises:
        UserError: there are problems, and `on_error` says "stop".
    """

    common_files: tuple[Path, ...] = ()
    image_ids: Mapping[str, str | int] = MappingProxyType({})
    prediction_suffix = ""

    def __init__(
        self,
        info: DatasetInfo,
        names: Sequence[str],
        problems: Sequence[str] = (),
        *,
        transform: SampleTransform | None = None,
        on_error: OnError = "stop",
    ) -> None:
        if on_error not in get_args(OnError):
            raise UserError(f"dataset.on_error={on_error}: choose {' or '.join(get_args(OnError))}")
        if problems and on_error == "stop":
            more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
            raise UserError(problems[0] + more)
        if on_error == "skip":
            for problem in problems:
                log.warning("left out: %s", problem)
        self.problems = list(problems)
        self.info = info
        self.names = list(names)
        self.transform = transform
        self.on_error = on_error

    @abstractmethod
    def files(self, index: int) -> tuple[Path, ...]:
        """The files of one item: its image first, then its annotation."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Decode one item as it is on disk.

        Raises:
            UserError: a file cannot be read or does not fit the others; the message names it and the cure.
        """

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Read and transform one item.

        Raises:
            IndexError: there is no such item; plain iteration ends by it.
            UserError: it cannot be read, or with `on_error="skip"` no item can.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for shift in range(len(self)):
            try:
                sample = self.read((index + shift) % len(self))
            except UserError as error:
                if self.on_error != "skip":
                    raise
                log.warning("skipped: %s", error)
            else:
                return self.transform(sample) if self.transform else sample
        raise UserError(f"none of the {len(self)} items can be read: look at the warnings above")


def pair_files(
    images: Mapping[str, Path], annotations: Mapping[str, Path], cure: str
) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Bring images and annotations of the same name together.

    Args:
        images: by name.
        annotations: by name.
        cure: what the user can do about a file that lacks its counterpart.

    Returns:
        The pairs by name, in the order of their names, and one problem for every other file.
    """
    problems = [f"{images[name]} has no annotation: {cure}" for name in sorted(images.keys() - annotations.keys())]
    problems += [f"{annotations[name]} has no image: {cure}" for name in sorted(annotations.keys() - images.keys())]
    return {name: (images[name], annotations[name]) for name in sorted(images.keys() & annotations.keys())}, problems


def read_pair(
    image: Path, annotation: Path, cure: str, colored: bool = False
) -> tuple[UInt8[np.ndarray, "height width 3"], np.ndarray]:
    """Read an image with its annotation.

    Args:
        image: any photograph.
        annotation: a map of the same size.
        cure: what the user can do about a broken file.
        colored: the map has RGB pixels instead of one number each.

    Returns:
        RGB, and the map's values as they are stored.

    Raises:
        UserError: a file cannot be read, or the map has another size or other channels.
    """
    pixels, values = read_rgb(image, cure), read_map(annotation, cure)
    expected = pixels.shape if colored else pixels.shape[:2]
    if values.shape != expected:
        raise UserError(
            f"{annotation} is {_described(values)}, its image {image.name} needs "
            f"{_described(np.empty(expected, np.uint8))}: {cure}"
        )
    return pixels, values


def make_sample(
    image: UInt8[np.ndarray, "height width 3"],
    panoptic: Int32[np.ndarray, "height width"],
    segments: Sequence[Segment],
    name: str,
) -> Sample:
    """A sample from arrays as they are decoded."""
    # The channels are a view on the file's own pixel order, which spares a copy of the full image.
    return Sample(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(panoptic), tuple(segments), name)


def _described(values: np.ndarray) -> str:
    height, width, *channels = values.shape
    return f"a {width}x{height} map of {channels[0] if channels else 1} channel(s)"


# Reading the image files of data sets: the exact content, or an error that names the file. Never something between.
#
# Pillow alone does not promise that: it skips the checksums of a PNG's pixels, widens the values of 2- and 4-bit maps,
# and cuts 16-bit colours down to 8 bits, all in silence.


# Not all that Pillow knows: some of its readers start other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_START_OF_SCAN = 0xDA
_JPEG_END = b"\xff\xd9"
_GREY = 0
"""PNG's colour type of single-channel images without palette."""


def read_rgb(path: Path, cure: str, formats: tuple[str, ...] = FORMATS) -> UInt8[np.ndarray, "height width 3"]:
    """Read a photograph as RGB, upright as its EXIF orientation says.

    16-bit grey is scaled to 8 bits; transparent parts are laid on white. A JPEG's pixels have no checksums: a flipped
    bit among them can show as wrong colours, while a cut file is always refused.

    Args:
        path: an image file.
        cure: what the user can do about a broken file; ends the error.
        formats: what it may be, by Pillow's names.

    Raises:
        UserError: the file is missing, damaged, incomplete or of another format.
    """
    return _decode(path, _content(path, cure), cure, to_rgb, formats)


def read_map(
    path: Path, cure: str
) -> (
    UInt8[np.ndarray, "height width"] | UInt8[np.ndarray, "height width channels"] | UInt16[np.ndarray, "height width"]
):
    """Read the values of an annotation map as they are stored: grey values, palette indices or colours.

    Args:
        path: a PNG file of any bit depth.
        cure: what the user can do about a broken file; ends the error.

    Raises:
        UserError: the file is missing, damaged, incomplete, no PNG, or stores 16-bit colours.
    """
    data = _content(path, cure)
    if not data.startswith(_PNG_SIGNATURE):
        raise UserError(f"{path} is no PNG file, and other formats may change the values of a map: {cure}")
    depth, color_type = data[24], data[25]  # the checks behind us say that there is a complete header
    if depth == 16 and color_type != _GREY:
        raise UserError(f"{path} stores 16-bit colours, which no data set uses for a map: {cure}")
    values = _decode(path, data, cure, np.array).astype(np.uint16 if depth == 16 else np.uint8)
    if color_type == _GREY and depth in (2, 4):
        return values // (255 // (2**depth - 1))  # Pillow has spread them over 0..255
    return values


def _content(path: Path, cure: str) -> bytes:
    """A file's bytes, complete as far as its format can tell."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {cure}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {cure}") from error
    fault = None
    if not data:
        fault = "it is empty"
    elif data.startswith(_PNG_SIGNATURE):
        fault = _png_fault(data)
    elif data.startswith(_JPEG_SIGNATURE):
        fault = _jpeg_fault(data)
    if fault:
        raise UserError(f"cannot read {path} ({fault}): {cure}")
    return data


def _decode(
    path: Path,
    data: bytes,
    cure: str,
    convert: Callable[[Image.Image], np.ndarray],
    formats: tuple[str, ...] = FORMATS,
) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            return convert(image)
    except Exception as error:  # a garbled file makes decoders fail in any way: struct.error, IndexError, MemoryError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"it is none of {', '.join(formats)}"
        raise UserError(f"cannot read {path} ({reason}): {cure}") from error


def _png_fault(data: bytes) -> str | None:
    """What is wrong with a PNG's chunks; every one has a checksum. (PNG specification, section 5.3)"""
    place = len(_PNG_SIGNATURE)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            break
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != checksum:
            return "its content is damaged: a checksum is wrong"
        if place == len(_PNG_SIGNATURE) and (kind, length) != (b"IHDR", 13):
            return "it has no header"
        if kind == b"IEND":
            return None
        place = end
    return "it is truncated"


def _jpeg_fault(data: bytes) -> str | None:
    """Whether a JPEG lacks its end, which decoders forgive. Its pixels have no checksums."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, place)
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        place += 2 + length
        if marker == _JPEG_START_OF_SCAN:
            return None if data.find(_JPEG_END, place) >= 0 else "it is truncated"
    return "it is truncated or damaged"


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an opened picture as RGB: upright by its EXIF, 16-bit grey scaled to 8, transparency laid on white.

    Raises:
        ValueError: Pillow cannot tell which colours its values are.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255
        grey = np.asarray(image).astype(np.float32).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB"))


_GOLDEN_RATIO = 0.618033988749895


def distinct_color(index: int) -> tuple[int, int, int]:
    """A colour for a class without one: hues by the golden ratio, so that any number of them are far apart."""
    red, green, blue = colorsys.hsv_to_rgb(
        index * _GOLDEN_RATIO % 1, (0.9, 0.6)[index % 2], (0.95, 0.75)[index // 2 % 2]
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def class_info(index: int, name: Any, color: Any, is_thing: bool, category_id: Any, source: Path) -> ClassInfo:
    """One class as its file describes it.

    Args:
        index: its position.
        name: must be a text.
        color: RGB from 0 to 255, or None for `distinct_color`.
        is_thing: whether it is countable.
        category_id: must be a whole number from 0 on.
        source: the file; named in errors.

    Raises:
        UserError: an entry is none of what it must be.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{source}: class {index} has no name: give every class a name, in quotes if it is a number")
    if isinstance(category_id, bool) or not isinstance(category_id, int) or category_id < 0:
        raise UserError(f"{source}: class {name!r} has the id {category_id!r}: give a whole number from 0 on")
    if color is None:
        color = distinct_color(index)
    valid = isinstance(color, Sequence) and len(color) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in color)
    if not valid:
        raise UserError(f"{source}: class {name!r} has the color {color!r}: give [red, green, blue], 0 to 255 each")
    return ClassInfo(name.strip(), tuple(color), is_thing, category_id)


def checked_info(name: str, classes: Sequence[ClassInfo], source: Path) -> DatasetInfo:
    """All classes together.

    Raises:
        UserError: there are none or too many, or two share an id or a name.
    """
    if not classes or len(classes) > IGNORE_INDEX:
        raise UserError(f"{source} has {len(classes)} classes: there must be 1 to {IGNORE_INDEX}")
    for what, values in (("id", [str(c.category_id) for c in classes]), ("name", [c.name for c in classes])):
        repeated, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise UserError(f"{source} has the class {what} {repeated} twice: give every class its own {what}")
    return DatasetInfo(name, tuple(classes))
