"""Segmentations drawn over their photograph."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from pem_lightning.types import VOID_ID, DatasetInfo, Segment

RGB = tuple[int, int, int]
ImageLike = UInt8[Tensor, "3 height width"] | UInt8[np.ndarray, "height width 3"]

CONTOUR: RGB = (255, 255, 255)
CONTOUR_OPACITY = 0.75
MIN_NAMED_AREA = 0.002
"""Segments that cover a smaller fraction of the picture get no name."""
GOLDEN = 0.618034


def overlay_panoptic(
    image: ImageLike,
    panoptic: Int32[Tensor, "map_height map_width"],
    segments: Sequence[Segment],
    info: DatasetInfo,
    alpha: float = 0.55,
    draw_names: bool = True,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a panoptic map: the class's colour for stuff, a shade of it for every thing.

    Args:
        image: RGB, as tensor [3, H, W] or as array [H, W, 3].
        panoptic: segment ids; pixels of `VOID_ID` and of unlisted segments keep the photograph.
        segments: what the ids mean.
        info: names and colours of the classes.
        alpha: opacity of the colours, 0 to 1.
        draw_names: write class names on segments that are large enough.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: image and map differ in size.
    """
    photo = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) else image
    ids = panoptic.cpu().numpy()
    if photo.shape[:2] != ids.shape:
        raise ValueError(f"the image has size {photo.shape[:2]}, but the map {ids.shape}")
    index = _positions(ids, [s.id for s in segments])
    boxes = ndimage.find_objects(index, max_label=len(segments))
    colors = _segment_colors(segments, boxes, info)

    opacity = np.where(index > 0, np.float32(alpha), np.float32(0))[..., None]
    canvas = photo * (1 - opacity) + np.array([CONTOUR, *colors], np.float32)[index] * opacity
    contour = _contours(index)[..., None] * CONTOUR_OPACITY
    canvas = canvas * (1 - contour) + np.array(CONTOUR, np.float32) * contour
    drawn = canvas.round().astype(np.uint8)
    if draw_names:
        names = [info.classes[s.class_id].name for s in segments]
        drawn = _draw_labels(drawn, _place_labels(index, boxes, names, colors))
    return drawn


def overlay_semantic(
    image: ImageLike,
    class_map: Integer[Tensor, "map_height map_width"],
    info: DatasetInfo,
    alpha: float = 0.55,
    draw_names: bool = True,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a class map in the classes' colours; values that are no class keep the photograph.

    Args and result are those of `overlay_panoptic`.
    """
    classes = class_map.cpu().int()
    known = (classes >= 0) & (classes < info.num_classes)
    regions = (classes + 1).where(known, VOID_ID)
    segments = [Segment(k + 1, k, is_thing=False) for k in range(info.num_classes)]
    return overlay_panoptic(image, regions, segments, info, alpha, draw_names)


def side_by_side(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]], titles: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """Puts images in a row under their titles, all at the height of the first."""
    height = images[0].shape[0]
    font = _font(1.25 * _text_size(images[0].shape))
    gap, bar = max(2, height // 100), int(font.size * 1.9)
    pictures = [Image.fromarray(image) for image in images]
    pictures = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    sheet = Image.new("RGB", (sum(p.width for p in pictures) + gap * (len(pictures) - 1), height + bar), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for picture, title in zip(pictures, titles, strict=True):
        sheet.paste(picture, (left, bar))
        draw.text((left + picture.width / 2, bar / 2), title, fill=(40, 40, 40), font=font, anchor="mm")
        left += picture.width + gap
    return np.array(sheet)


@dataclass(frozen=True)
class _Label:
    text: str
    font: ImageFont.FreeTypeFont
    center: tuple[float, float]
    box: tuple[float, float, float, float]
    color: RGB


def _positions(ids: Int32[np.ndarray, "height width"], known: Sequence[int]) -> Int64[np.ndarray, "height width"]:
    """Every pixel's position in the list `known`, counted from 1; 0 where its id is not listed."""
    order = np.argsort(np.array([*known, VOID_ID]), kind="stable")
    ordered = np.array([*known, VOID_ID])[order]
    found = np.minimum(np.searchsorted(ordered, ids), len(known))
    return np.where((ordered[found] == ids) & (ids != VOID_ID), order[found] + 1, 0)


def _segment_colors(
    segments: Sequence[Segment], boxes: Sequence[tuple[slice, slice] | None], info: DatasetInfo
) -> list[RGB]:
    """Colours by segment. Things of one class are shaded from left to right, so that neighbours differ clearly."""
    colors: list[RGB] = [info.classes[s.class_id].color for s in segments]
    placed = [(box[1].start + box[1].stop, i) for i, box in enumerate(boxes) if box is not None]
    seen: dict[int, int] = {}
    for _, i in sorted(placed):
        if segments[i].is_thing:
            n = seen[segments[i].class_id] = seen.get(segments[i].class_id, -1) + 1
            colors[i] = _shade(colors[i], n)
    return colors


def _shade(color: RGB, n: int) -> RGB:
    """The n-th shade; the first is the colour itself, successive ones are far apart in lightness."""
    if n == 0:
        return color
    hue, lightness, saturation = colorsys.rgb_to_hls(*(c / 255 for c in color))
    step = n * GOLDEN % 1  # the golden ratio's multiples spread evenly, however many there are
    darkest = min(max(lightness - 0.23, 0.2), 0.38)
    lightness = darkest + (lightness - darkest + 0.46 * step) % 0.46
    hue += 0.1 * ((n * GOLDEN * GOLDEN) % 1 - 0.5)
    red, green, blue = colorsys.hls_to_rgb(hue % 1, lightness, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def _contours(index: Int64[np.ndarray, "height width"]) -> Float32[np.ndarray, "height width"]:
    """Coverage, 0 to 1, by thin smooth lines between segments."""
    edge = np.zeros(index.shape, np.float32)
    edge[:, 1:] = index[:, 1:] != index[:, :-1]
    edge[1:][index[1:] != index[:-1]] = 1
    width = max(1, round(min(index.shape) / 480))
    thick = cv2.dilate(edge, np.ones((width, width), np.uint8))
    return np.asarray(cv2.GaussianBlur(thick, (0, 0), 0.5), np.float32)


def _text_size(size: tuple[int, ...]) -> float:
    return float(np.clip(min(size[:2]) / 32, 10, 32))


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow returns when a size is given
    return font


def _place_labels(
    index: Int64[np.ndarray, "height width"],
    boxes: Sequence[tuple[slice, slice] | None],
    names: Sequence[str],
    colors: Sequence[RGB],
) -> list[_Label]:
    """A plate at the innermost point of every large segment, larger segments first, where it covers no other."""
    areas = np.bincount(index.ravel(), minlength=len(names) + 1)[1:]
    font = _font(_text_size(index.shape))
    labels: list[_Label] = []
    for i in np.argsort(-areas, kind="stable"):
        box = boxes[i]
        if box is None or areas[i] < MIN_NAMED_AREA * index.size:
            continue
        distance = cv2.distanceTransform(np.pad(index[box] == i + 1, 1).astype(np.uint8), cv2.DIST_L2, 3)
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        center = (float(box[1].start + x - 1), float(box[0].start + y - 1))
        half_width, half_height = font.getlength(names[i]) / 2 + 0.35 * font.size, 0.72 * font.size
        # a plate may reach beyond its segment, but must not hide it
        if 4 * half_width * half_height > 0.4 * areas[i] or distance.max() < 0.6 * half_height:
            continue
        center = _inside(center, (half_width, half_height), index.shape)
        plate = center[0] - half_width, center[1] - half_height, center[0] + half_width, center[1] + half_height
        if plate[0] < 0 or plate[1] < 0 or any(_overlap(plate, other.box) for other in labels):
            continue
        labels.append(_Label(names[i], font, center, plate, colors[i]))
    return labels


def _inside(center: tuple[float, float], half: tuple[float, float], size: tuple[int, ...]) -> tuple[float, float]:
    """Moves a plate into the picture; one that is too large for it stays out at the left or top."""
    x = max(min(center[0], size[1] - 1 - half[0]), half[0]) if 2 * half[0] < size[1] else -1.0
    y = max(min(center[1], size[0] - 1 - half[1]), half[1]) if 2 * half[1] < size[0] else -1.0
    return x, y


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw_labels(
    image: UInt8[np.ndarray, "height width 3"], labels: Sequence[_Label]
) -> UInt8[np.ndarray, "height width 3"]:
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture, "RGBA")
    for label in labels:
        red, green, blue = label.color
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
        draw.rounded_rectangle(label.box, radius=0.35 * label.font.size, fill=(*label.color, 225))
        text_color = (255, 255, 255) if dark else (20, 20, 20)
        draw.text(label.center, label.text, fill=text_color, font=label.font, anchor="mm")
    return np.array(picture)
