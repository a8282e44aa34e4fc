"""Segmentations drawn over their photograph. Needs no PyTorch; takes its tensors."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pem_lightning.basic_types import VOID_ID, DatasetInfo, Segment
from pem_lightning.inference.fonts import Written, load_font, write_names
from pem_lightning.inference.regions import IndexMap, Middles, Region, contours, find_regions, index_map
from pem_lightning.shapes import Int32, Integer, UInt8

RGB = tuple[int, int, int]
Picture = UInt8[np.ndarray, "height width 3"]

CONTOUR: RGB = (255, 255, 255)
CONTOUR_OPACITY = 0.75
MIN_NAMED_AREA = 0.002  # segments that cover a smaller fraction of the picture get no name
GOLDEN = 0.618034
ALIKE = 8  # grey levels: colours that differ by less in every channel cannot be told apart
ROWS_AT_ONCE = 32  # are blended together: few enough to stay in a core's cache


def overlay_panoptic(
    image: UInt8[Any, "3 height width"] | Picture,
    panoptic: Int32[Any, "height width"],
    segments: Sequence[Segment],
    info: DatasetInfo,
    alpha: int | float = 0.55,
    draw_names: bool = True,
    shade_things: bool = True,
) -> Picture:
    """Draw a panoptic map over its RGB image; pixels of `VOID_ID` and of unlisted segments keep the photograph.

    Args:
        image: a tensor [3, H, W] or an array [H, W, 3].
        panoptic: a tensor or an array.
        alpha: opacity of the colours, 0 to 1.
        draw_names: write class names on segments that are large enough.
        shade_things: give each thing its own shade of its class's colour; False for videos, where it would flicker.
    """
    photo = image if isinstance(image, np.ndarray) else as_array(image).transpose(1, 2, 0)
    index = index_map(as_array(panoptic), [s.id for s in segments])
    regions = find_regions(index, len(segments))
    by_class = overlay_colors(info)
    colors = [by_class[s.class_id] for s in segments]
    if shade_things:
        colors = _shaded(colors, segments, regions)
    drawn = _blend(photo, index, colors, np.float32(alpha))
    if draw_names:
        names = write_names(info.class_names)
        drawn = _draw_names(drawn, index, regions, [names[s.class_id] for s in segments], colors)
    return drawn


def as_array(map_or_image: Any) -> np.ndarray:
    """A tensor of any device, or an array, as an array."""
    return map_or_image if isinstance(map_or_image, np.ndarray) else map_or_image.cpu().numpy()


@lru_cache(maxsize=64)
def overlay_colors(info: DatasetInfo) -> tuple[RGB, ...]:
    """Every class's own colour, but distinct: of classes that look alike, all but the first get one far from the rest.

    ADE20K, for one, gives "road" and "skyscraper" the same. Files of class maps keep the data set's colours.
    """
    candidates = np.array(list(product(range(32, 256, 32), repeat=3)))
    taken = np.array([c.color for c in info.classes]).reshape(-1, 3)
    colors: list[RGB] = []
    for c in info.classes:
        if any(max(abs(a - b) for a, b in zip(c.color, other, strict=True)) < ALIKE for other in colors):
            distances = ((candidates[:, None] - taken) ** 2).sum(-1).min(1)
            red, green, blue = candidates[distances.argmax()].tolist()
            colors.append((red, green, blue))
            taken = np.vstack([taken, colors[-1]])
        else:
            colors.append(c.color)
    return tuple(colors)


def class_segments(
    class_map: Integer[Any, "height width"], info: DatasetInfo
) -> tuple[Int32[np.ndarray, "height width"], tuple[Segment, ...]]:
    """A class map as one segment per class; values that are no class become `VOID_ID`."""
    segments = tuple(Segment(k + 1, k, is_thing=False) for k in range(info.num_classes))
    classes = as_array(class_map)
    id_map = classes.astype(np.int32)
    id_map += 1
    id_map[classes >= info.num_classes] = VOID_ID
    return id_map, segments


def side_by_side(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], titles: Sequence[str]) -> Picture:
    """Images in a row under their titles, all at the height of the first."""
    height = images[0].shape[0]
    font = load_font(1.25 * _text_size(images[0].shape))
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


def draw_caption(picture: Picture, text: str) -> None:
    """Write a line on a dark plate into the top left corner of a picture, in place."""
    font = load_font(_text_size(picture.shape))
    corner = picture[: int(1.9 * font.size), : int(font.getlength(text) + 1.6 * font.size)]
    patch = Image.fromarray(corner)
    draw = ImageDraw.Draw(patch, "RGBA")
    draw.rectangle((0, 0, *patch.size), fill=(20, 20, 20, 190))
    draw.text((0.8 * font.size, 0.95 * font.size), text, fill=(255, 255, 255), font=font, anchor="lm")
    corner[:] = np.asarray(patch)


def _text_size(size: tuple[int, ...]) -> float:
    return float(np.clip(min(size[:2]) / 32, 10, 32))


def _shaded(colors: Sequence[RGB], segments: Sequence[Segment], regions: Sequence[Region | None]) -> list[RGB]:
    """Shade things of one class from left to right, so that neighbours differ clearly."""
    shaded = list(colors)
    placed = [(region.box[0] + region.box[2], i) for i, region in enumerate(regions) if region is not None]
    seen: dict[int, int] = {}
    for _, i in sorted(placed):
        if segments[i].is_thing:
            n = seen[segments[i].class_id] = seen.get(segments[i].class_id, -1) + 1
            shaded[i] = _shade(colors[i], n)
    return shaded


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


def _blend(photo: Picture, index: IndexMap, colors: Sequence[RGB], alpha: np.float32) -> Picture:
    """The photograph under its segments' colours and the lines between them."""
    opacity = np.array([0] + [alpha] * len(colors), np.float32)
    paint = np.array([(0, 0, 0), *colors], np.float32) * opacity[:, None]
    drawn = np.empty(photo.shape, np.uint8)
    for top in range(0, len(photo), ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        mixed = np.take(paint, index[rows], axis=0)
        mixed += photo[rows] * (1 - alpha)
        drawn[rows] = np.rint(mixed, out=mixed)
    nothing = index == 0
    if nothing.any():
        pixels, kept = (np.ascontiguousarray(x).view("V3")[..., 0] for x in (drawn, photo))  # three bytes at once
        np.copyto(pixels, kept, where=nothing)

    lines, coverage = contours(index)  # few pixels, so they are blended once more
    place, line = index.ravel()[lines], coverage[:, None] * np.float32(CONTOUR_OPACITY)
    mixed = photo.reshape(-1, 3)[lines] * (1 - opacity[place])[:, None] + paint[place]
    drawn.reshape(-1, 3)[lines] = (mixed * (1 - line) + np.array(CONTOUR, np.float32) * line).round()
    return drawn


def _draw_names(
    image: Picture, index: IndexMap, regions: Sequence[Region | None], names: Sequence[Written], colors: Sequence[RGB]
) -> Picture:
    """A plate at the innermost point of every large segment, larger segments first, where it covers no other plate."""
    picture = Image.fromarray(image)
    draw, size = ImageDraw.Draw(picture, "RGBA"), _text_size(index.shape)
    fonts = {path: load_font(size, path) for path in {name.font for name in names}}
    areas = np.array([0 if region is None else region.area for region in regions])
    plates: list[tuple[float, float, float, float]] = []
    middles = Middles(index)
    for i in np.argsort(-areas, kind="stable").tolist():
        region = regions[i]
        if region is None or region.area < MIN_NAMED_AREA * index.size:
            continue
        text, font = names[i].text, fonts[names[i].font]
        half_width, half_height = font.getlength(text) / 2 + 0.35 * font.size, 0.72 * font.size
        if 4 * half_width * half_height > 0.4 * region.area:  # a plate may reach beyond its segment, but not hide it
            continue
        (x, y), radius = middles.of(i + 1, region)
        if radius < 0.6 * half_height or 2 * half_width >= index.shape[1] or 2 * half_height >= index.shape[0]:
            continue
        x = max(min(x + region.box[0], index.shape[1] - 1 - half_width), half_width)
        y = max(min(y + region.box[1], index.shape[0] - 1 - half_height), half_height)
        plate = x - half_width, y - half_height, x + half_width, y + half_height
        if any(plate[0] < b[2] and b[0] < plate[2] and plate[1] < b[3] and b[1] < plate[3] for b in plates):
            continue
        plates.append(plate)
        red, green, blue = colors[i]
        text_color = (255, 255, 255) if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else (20, 20, 20)
        draw.rounded_rectangle(plate, radius=0.35 * font.size, fill=(red, green, blue, 225))
        draw.text((x, y), text, fill=text_color, font=font, anchor="mm")
    return np.array(picture)
