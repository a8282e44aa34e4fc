"""Reading the image files of data sets: the exact content, or an error that names the file. Never something between.

Pillow alone does not promise that: it skips the checksums of a PNG's pixels, widens the values of 2- and 4-bit maps,
and cuts 16-bit colours down to 8 bits, all in silence.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import ExifTags, Image, ImageOps

from pem_lightning.errors import UserError

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
