"""Images of any kind as RGB, or one line that says what is wrong with them; and resizing. Needs no PyTorch.

A file's content is read exactly. Pillow alone skips the checksums of a PNG's pixels, widens the values of 2- and 4-bit
maps, and cuts 16-bit colours to 8 bits, all in silence.
"""

from __future__ import annotations

import glob
import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from pem_lightning.basic_types import UserError
from pem_lightning.files import is_system_file
from pem_lightning.shapes import UInt, UInt8

if TYPE_CHECKING:
    from torch import Tensor

    ImageLike = str | Path | Image.Image | np.ndarray | Tensor
else:
    ImageLike = Any  # PyTorch may not be installed
Images = list[ImageLike] | tuple[ImageLike, ...]
Frame = UInt8[np.ndarray, "height width 3"]
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
"""Of data sets; files are recognised by content. Not all that Pillow knows: some readers start other programs (EPS)."""
PHOTO_FORMATS = (*FORMATS, "GIF", "JPEG2000")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_GREY = 0
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_START_OF_SCAN = 0xDA
_JPEG_END = b"\xff\xd9"


class Photo(NamedTuple):
    """An RGB image in memory, the name of its result, and the image's file if it is from one."""

    name: str
    image: UInt8[np.ndarray, "height width 3"]
    file: Path | None = None


def find_images(source: str | Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[Path]:
    """One file of any name, or the sorted images in a folder or of a pattern with `*`, `?`, `[...]` or `**`."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates, where = list(path.iterdir()), f"folder {path}"
    elif glob.has_magic(str(path)):
        candidates, where = [Path(match) for match in glob.glob(str(path), recursive=True)], f"pattern {path}"
    else:
        raise UserError(f"{path} does not exist: give an image, a folder of images or a pattern such as 'folder/*.png'")
    found = sorted(p for p in candidates if p.suffix.lower() in suffixes and p.is_file() and not is_system_file(p))
    if not found:
        raise UserError(f"no images in {where}: expected files that end in {', '.join(sorted(suffixes))}")
    return found


def read_image(source: ImageLike) -> Frame:
    """An image as RGB, upright as its EXIF orientation says.

    16-bit values are scaled to 8 bits; transparent parts become white; of an animation the first frame is taken.

    Args:
        source: a file; a Pillow image; or an array [H, W, C], a tensor [C, H, W] or either in the other's order, where
            C is 3 (RGB), 4 (RGBA) or 1 (grey), or [H, W]. Values: 8 bits (an RGB array is returned as it is), 16 bits,
            other integers from 0 to 255, floating-point numbers from 0 to 1 or from 0 to 255, or bool.

    Raises:
        UserError: the file is missing or is not a complete image, or the array or tensor has another shape or values.
    """
    if _is_tensor(source):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if not isinstance(source, str | Path | Image.Image):
        hint = " (which cv2.imread returns for a file that it cannot read)" if source is None else ""
        raise UserError(
            f"an image must be a file's path, a Pillow image, an array or a tensor, not {type(source).__name__}{hint}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of images half as large as those refused
        try:
            if isinstance(source, Image.Image):
                return to_rgb(source)
            return read_rgb(Path(source), "check that it is a complete image file", PHOTO_FORMATS)
        except UserError as error:
            if not isinstance(error.__cause__, Image.DecompressionBombError):
                raise
            limit = round(2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6)
            raise UserError(f"{source} has more than {limit} million pixels: shrink it or cut it into parts") from error
        except (OSError, SyntaxError, ValueError) as error:  # it was opened, but not read yet
            raise UserError(f"cannot read the image ({error}): check that it is a complete image") from error


def _is_tensor(source: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    return torch is not None and isinstance(source, torch.Tensor)


def _from_tensor(tensor: Any) -> Frame:
    values = tensor.detach().cpu()
    values = values.float() if values.is_floating_point() else values  # NumPy has no bfloat16
    array = np.asarray(values.numpy())
    first, last = (array.shape[0], array.shape[-1]) if array.ndim == 3 else (0, 0)
    if first == 3 or (last != 3 and first in (1, 4)):  # else it may be [H, W, C]
        array = array.transpose(1, 2, 0)
    return _from_array(array, tensor)


def _from_array(array: np.ndarray, given: Any = None) -> Frame:
    """`given` is what the message names, if it is not the array."""
    given = array if given is None else given
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        kind, order = ("tensor", "[3, H, W], [4, H, W]") if _is_tensor(given) else ("array", "[H, W, 3], [H, W, 4]")
        raise UserError(
            f"an image must be a uint8 {kind} {order} or [H, W] (several images: a list of {kind}s), "
            f"not {str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
        )
    array = np.ascontiguousarray(_to_bytes(array))  # OpenCV and PyTorch take no negative strides
    if channels == 3:
        return array
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return to_rgb(Image.fromarray(array))


def _to_bytes(array: np.ndarray) -> UInt8[np.ndarray, "*shape"]:
    """Values of any type and byte order in 8 bits."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # all 16 bits are used, as in files
        return (array.astype(np.float32) / 257).round().astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    scale = 255 if array.dtype.kind == "f" and high <= 1.001 else 1  # interpolation may exceed 1 a little
    # Below 2, floating-point numbers would be a black image of 0 to 255, or one of 0 to 1 that exceeds it.
    unclear = array.dtype.kind == "f" and 1.001 < high < 2
    if unclear or not (low * scale > -0.5 and high * scale < 255.5):  # NaN fails, too
        raise UserError(
            f"an image of {array.dtype.name} must have values from 0 to 255, or fractions from 0 to 1, not from "
            f"{low:g} to {high:g}: undo a normalisation, or convert it to uint8"
        )
    return (array.astype(np.float32) * scale).round().clip(0, 255).astype(np.uint8)


def read_photo(image: ImageLike, name: str | None = None) -> Photo:
    """Read an image and name it, by default after its file."""
    file = Path(image) if isinstance(image, str | Path) else None
    if name is None:
        name = "image" if file is None else file.stem
    return Photo(name, read_image(image), file)


def resized_size(height: int, width: int, shortest_edge: int, max_size: int | None = None) -> tuple[int, int]:
    """Height and width after bringing the shortest edge to a length, as far as the longest stays within `max_size`."""
    scale = shortest_edge / min(height, width)
    if max_size is not None:
        scale = min(scale, max_size / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The whole image at another size, by antialiased bilinear interpolation."""
    height, width = size
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def read_pair(
    files: Sequence[Path], hint: str, colored: bool = False
) -> tuple[UInt8[np.ndarray, "height width 3"], np.ndarray]:
    """Read an image as RGB, and the values of its annotation map of the same size, of one channel or RGB."""
    image, annotation = files
    pixels, values = read_rgb(image, hint), read_map(annotation, hint)
    expected = pixels.shape if colored else pixels.shape[:2]
    if values.shape != expected:
        found, needed = (
            f"a {width}x{height} map of {channels[0] if channels else 1} channel(s)"
            for height, width, *channels in (values.shape, expected)
        )
        turn = exif_orientation(image)
        if turn != 1 and values.shape == (expected[1], expected[0], *expected[2:]):
            hint = (
                f"the image is turned upright by its EXIF orientation ({turn}), the map is not: turn the map in the "
                f"same way, or remove that tag from the image (exiftool -Orientation= {image.name})"
            )
        raise UserError(f"{annotation} is {found}, its image {image.name} needs {needed}: {hint}")
    return pixels, values


def read_rgb(path: Path, hint: str, formats: tuple[str, ...] = FORMATS) -> UInt8[np.ndarray, "height width 3"]:
    """Read a photograph as RGB, see `to_rgb`. A JPEG's pixels have no checksums: only a cut file is surely noticed.

    Raises:
        UserError: the file is missing, damaged, incomplete or none of `formats`; ends in `hint`.
    """
    return _decode(path, _read_complete(path, hint), hint, to_rgb, formats)


def read_map(path: Path, hint: str) -> UInt[np.ndarray, "height width *channels"]:
    """Read the stored values of a PNG of any bit depth: grey values, palette indices or colours.

    Raises:
        UserError: the file is missing, damaged, incomplete, no PNG, or stores 16-bit colours.
    """
    data = _read_complete(path, hint)
    if not data.startswith(_PNG_SIGNATURE):
        raise UserError(f"{path} is no PNG file, and other formats may change the values of a map: {hint}")
    depth, color_type = data[24], data[25]
    if depth == 16 and color_type != _PNG_GREY:
        raise UserError(f"{path} stores 16-bit colours, which no data set uses for a map: {hint}")
    values = _decode(path, data, hint, np.array).astype(np.uint16 if depth == 16 else np.uint8)
    if color_type == _PNG_GREY and depth in (2, 4):
        return values // (255 // (2**depth - 1))  # Pillow has spread them over 0..255
    return values


def exif_orientation(path: Path) -> int:
    """How `to_rgb` turns an image file: 1 not at all, 2 to 8 as the tag says (EXIF 2.3, Orientation)."""
    try:
        data = path.read_bytes()
        if data.startswith(_PNG_SIGNATURE) and b"eXIf" not in data:
            return 1  # Pillow would decode all pixels to look behind them
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as in `_decode`; reading the image says what is wrong with it
        return 1


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an opened picture as RGB: upright by its EXIF, 16-bit grey scaled to 8, transparency laid on white."""
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


def _read_complete(path: Path, hint: str) -> bytes:
    """A file's bytes, complete as far as its format can tell."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {hint}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {hint}") from error
    fault = None if data else "it is empty"
    if data.startswith(_PNG_SIGNATURE):
        fault = _png_fault(data)
    elif data.startswith(_JPEG_SIGNATURE):
        fault = _jpeg_fault(data)
    if fault:
        raise UserError(f"cannot read {path} ({fault}): {hint}")
    return data


def _decode(
    path: Path,
    data: bytes,
    hint: str,
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
        raise UserError(f"cannot read {path} ({reason}): {hint}") from error


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
    """Whether a JPEG lacks its end."""
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
