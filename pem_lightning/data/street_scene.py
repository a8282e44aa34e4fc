"""Draws one street: its surroundings from far to near, then everything that stands in it, then light and grain."""

from __future__ import annotations

import colorsys
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16

from pem_lightning.data.cityscapes import CITYSCAPES

Color = tuple[int, int, int]
Number = int | float
Point = tuple[Number, Number]
Points = Sequence[Point]

_OVERSAMPLING = 4
_CAMERA_HEIGHT = 1.6


class _Canvas:
    """Draws every shape's colour and, where it has one, its segment id, at four times the size.

    Places are in image heights, or in metres where they are projected by a pinhole camera that looks down the street.
    """

    def __init__(self, height: int, width: int, vanishing_point: Point) -> None:
        self.height = height
        self.aspect = width / height
        self.vanishing_point = vanishing_point
        self._scale = height * _OVERSAMPLING  # drawn pixels per image height
        self._colors = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING, 3), np.uint8)
        self._ids = np.zeros(self._colors.shape[:2], np.uint16)
        self._counts: Counter[int] = Counter()

    def new_id(self, label: int) -> int:
        """The id of the next single thing of a class, as in Cityscapes."""
        self._counts[label] += 1
        return label * 1000 + self._counts[label] - 1

    def project(self, x: Number, y: Number, z: Number) -> tuple[float, float]:
        """From metres (right, up, ahead) to image heights."""
        return self.vanishing_point[0] + x / z, self.vanishing_point[1] + (_CAMERA_HEIGHT - y) / z

    def polygon(self, points: Points, color: Color, segment_id: int | None) -> None:
        """Fill a polygon; without an id it only paints, like a shadow or a road marking."""
        corners = np.round(np.array(points) * self._scale).astype(np.int32)
        cv2.fillPoly(self._colors, [corners], color)
        if segment_id is not None:
            cv2.fillPoly(self._ids, [corners], segment_id)

    def ellipse(self, center: Point, radii: Point, color: Color, segment_id: int) -> None:
        middle, axes = ((round(x * self._scale), round(y * self._scale)) for x, y in (center, radii))
        cv2.ellipse(self._colors, middle, axes, 0, 0, 360, color, cv2.FILLED)
        cv2.ellipse(self._ids, middle, axes, 0, 0, 360, segment_id, cv2.FILLED)

    def shade(self, center: Point, radii: Point, strength: float) -> None:
        """Darken an ellipse towards black (positive strength) or lighten it towards white, softly at its edge."""
        x0, y0 = np.floor((np.array(center) - radii) * self._scale).astype(int).clip(0)
        x1, y1 = np.ceil((np.array(center) + radii) * self._scale).astype(int).clip(0)
        region = self._colors[y0:y1, x0:x1]
        rows, columns = np.ogrid[y0 : y0 + region.shape[0], x0 : x0 + region.shape[1]]
        across, down = (columns / self._scale - center[0]) / radii[0], (rows / self._scale - center[1]) / radii[1]
        weight = (abs(strength) * np.clip(1 - across**2 - down**2, 0, 1))[..., None]
        region[...] = region * (1 - weight) + (0 if strength > 0 else 255) * weight

    def finish(self) -> tuple[UInt8[np.ndarray, "height width 3"], UInt16[np.ndarray, "height width"]]:
        """The picture, averaged down, and its ids, picked at pixel centres."""
        centre = _OVERSAMPLING // 2
        size = (self._ids.shape[1] // _OVERSAMPLING, self.height)
        image = cv2.resize(self._colors, size, interpolation=cv2.INTER_AREA)
        return image, self._ids[centre::_OVERSAMPLING, centre::_OVERSAMPLING].copy()


@dataclass(frozen=True)
class _Sprite:
    """A flat drawing that faces the camera, in metres right (left if mirrored) and up from where it stands."""

    canvas: _Canvas
    x: Number
    z: Number
    segment_id: int
    mirrored: bool = False

    def polygon(self, points: Points, color: Color) -> None:
        sign = -1 if self.mirrored else 1
        placed = [self.canvas.project(self.x + sign * x, y, self.z) for x, y in points]
        self.canvas.polygon(placed, color, self.segment_id)

    def box(self, left: Number, bottom: Number, right: Number, top: Number, color: Color, slant: Number = 0) -> None:
        """Fill a box whose top edge is shorter by `slant` at either end."""
        self.polygon([(left, bottom), (right, bottom), (right - slant, top), (left + slant, top)], color)

    def boxes(self, lefts: Sequence[Number], bottom: Number, width: Number, top: Number, color: Color) -> None:
        for left in lefts:
            self.box(left, bottom, left + width, top, color)

    def disc(self, x: Number, y: Number, radius: Number, color: Color, radius_y: Number | None = None) -> None:
        center = self.canvas.project(self.x + (-x if self.mirrored else x), y, self.z)
        radii = radius / self.z, (radius if radius_y is None else radius_y) / self.z
        self.canvas.ellipse(center, radii, color, self.segment_id)

    def wheels(
        self, xs: Sequence[Number], y: Number, tyre: Number, rim: Number, color: Color = (176, 178, 182)
    ) -> None:
        for x in xs:
            self.disc(x, y, tyre, _TYRE)
            self.disc(x, y, rim, color)

    def line(self, points: Points, width: Number, color: Color) -> None:
        for (x0, y0), (x1, y1) in pairwise(points):
            length = math.hypot(x1 - x0, y1 - y0)
            dx, dy = (y1 - y0) / length * width / 2, (x0 - x1) / length * width / 2
            self.polygon([(x0 - dx, y0 - dy), (x1 - dx, y1 - dy), (x1 + dx, y1 + dy), (x0 + dx, y0 + dy)], color)

    def shadow(self, width: Number) -> None:
        self.canvas.shade(self.canvas.project(self.x, 0, self.z), (0.6 * width / self.z, 0.22 / self.z), 0.55)


_DARK = (38, 38, 44)
_TYRE = (28, 28, 30)
_GLASS = (150, 190, 208)
_SKIN = ((236, 188, 152), (198, 140, 100), (120, 78, 52))


def _person(s: _Sprite, rng: np.random.Generator) -> None:
    t = float(rng.uniform(0.94, 1.1))
    stride = float(rng.uniform(0.05, 0.25))
    trousers, coat = _hue(rng, 0.58, 0.72, 0.5, 0.4), _hue(rng, 0.0, 1.0, 0.7, 0.85)
    skin = _SKIN[rng.integers(len(_SKIN))]
    s.shadow(0.7)
    for foot in (-stride, stride):
        s.polygon([(foot - 0.1, 0), (foot + 0.12, 0), (0.17, 0.9 * t), (-0.17, 0.9 * t)], trousers)
    for side in (-1, 1):
        s.line([(side * 0.2, 1.36 * t), (side * (0.3 + stride / 2), 0.85 * t)], 0.14, coat)
    s.box(-0.22, 0.78 * t, 0.22, 1.4 * t, coat, slant=-0.05)
    s.box(-0.27, 1.4 * t, 0.27, 1.5 * t, coat, slant=0.17)
    s.disc(0, 1.6 * t, 0.15, skin)
    s.polygon([(-0.16, 1.62 * t), (0.16, 1.62 * t), (0.11, 1.76 * t), (-0.11, 1.76 * t)], (60, 42, 30))


def _bicycle(s: _Sprite, rng: np.random.Generator) -> None:
    """The wheels count as full discs, as in Cityscapes."""
    frame = _hue(rng, 0.48, 0.56, 0.9, 0.75)
    s.shadow(1.6)
    s.wheels((-0.55, 0.55), 0.36, 0.36, 0.28, (150, 152, 156))
    s.line([(-0.55, 0.36), (-0.12, 0.85), (0.4, 0.85), (0.0, 0.36), (-0.12, 0.85)], 0.1, frame)
    s.line([(-0.55, 0.36), (0.0, 0.36)], 0.1, frame)
    s.line([(0.55, 0.36), (0.38, 1.0), (0.52, 1.08)], 0.1, frame)
    s.box(-0.28, 0.92, 0.02, 1.02, _TYRE)


def _motorcycle(s: _Sprite, rng: np.random.Generator) -> None:
    paint = _hue(rng, 0.93, 1.0, 0.85, 0.72)
    s.shadow(2.0)
    s.wheels((-0.7, 0.72), 0.36, 0.37, 0.15, (190, 190, 195))
    s.polygon([(-0.5, 0.3), (0.45, 0.3), (0.5, 0.7), (-0.4, 0.75)], (70, 70, 76))
    s.polygon([(-0.15, 0.7), (0.5, 0.65), (0.5, 1.0), (0.2, 1.1), (-0.1, 0.95)], paint)
    s.polygon([(-1.05, 0.72), (-0.1, 0.75), (-0.1, 0.95), (-1.0, 0.98)], paint)
    s.line([(0.72, 0.36), (0.45, 1.1), (0.3, 1.25)], 0.13, (205, 205, 210))
    s.box(-0.7, 0.92, -0.1, 1.04, _TYRE)
    s.disc(0.6, 0.95, 0.14, (255, 244, 190))


def _rider(s: _Sprite, rng: np.random.Generator) -> None:
    """Without the bicycle, which is its own segment."""
    vest = _hue(rng, 0.04, 0.1, 0.95, 1.0)
    s.line([(-0.1, 0.95), (0.22, 0.72), (0.02, 0.3)], 0.19, (52, 56, 88))
    s.polygon([(-0.3, 0.88), (0.02, 0.88), (0.32, 1.4), (0.16, 1.56), (-0.1, 1.5)], vest)
    s.line([(0.2, 1.42), (0.34, 1.12), (0.5, 1.1)], 0.13, vest)
    s.polygon([(-0.16, 1.18), (0.13, 1.1), (0.18, 1.19), (-0.12, 1.28)], (240, 244, 200))
    s.disc(0.26, 1.66, 0.15, _SKIN[rng.integers(len(_SKIN))])
    s.polygon([(0.08, 1.68), (0.46, 1.68), (0.38, 1.84), (0.14, 1.84)], (244, 244, 244))


def _car_front(s: _Sprite, rng: np.random.Generator) -> None:
    paint, towards = _car_paint(rng), bool(rng.integers(2))
    s.shadow(2.1)
    s.boxes((-0.82, 0.56), 0, 0.26, 0.4, _TYRE)
    s.box(-0.92, 0.22, 0.92, 0.86, paint, slant=0.04)
    s.box(-0.84, 0.84, 0.84, 1.48, paint, slant=0.2)
    s.box(-0.74, 0.88, 0.74, 1.38, _GLASS, slant=0.17)
    s.boxes((-0.86, 0.5), 0.56, 0.36, 0.76, (255, 246, 208) if towards else (214, 30, 34))
    s.box(-0.4, 0.42, 0.4, 0.6, _DARK if towards else (238, 238, 238))
    s.box(-0.9, 0.22, 0.9, 0.34, _DARK)


def _car_side(s: _Sprite, rng: np.random.Generator) -> None:
    paint = _car_paint(rng)
    s.shadow(4.4)
    s.polygon([(-2.1, 0.28), (2.1, 0.28), (2.12, 0.72), (1.3, 0.9), (-2.0, 0.92), (-2.12, 0.6)], paint)
    s.polygon([(-1.75, 0.9), (1.3, 0.88), (0.55, 1.48), (-1.25, 1.5)], paint)
    s.polygon([(-1.5, 0.95), (-0.35, 0.95), (-0.35, 1.4), (-1.15, 1.4)], _GLASS)
    s.polygon([(-0.22, 0.95), (1.0, 0.95), (0.45, 1.4), (-0.22, 1.4)], _GLASS)
    s.box(1.86, 0.56, 2.1, 0.74, (255, 246, 208))
    s.box(-2.1, 0.6, -1.92, 0.8, (214, 30, 34))
    s.wheels((-1.3, 1.3), 0.36, 0.36, 0.18)


def _truck(s: _Sprite, rng: np.random.Generator) -> None:
    cab = _hue(rng, 0.58, 0.64, 0.85, 0.7)
    s.shadow(3.0)
    if rng.integers(2):
        s.boxes((-1.1, 0.7), 0, 0.4, 0.55, _TYRE)
        s.box(-1.3, 0.6, 1.3, 3.5, (238, 236, 230))
        s.box(-1.2, 0.35, 1.2, 2.5, cab)
        s.box(-1.05, 1.4, 1.05, 2.25, _GLASS)
        s.box(-0.7, 0.8, 0.7, 1.15, _DARK)
        s.boxes((-1.1, 0.75), 0.5, 0.35, 0.72, (255, 246, 208))
    else:
        s.box(-3.6, 0.5, 3.4, 0.75, _DARK)
        s.box(-3.6, 0.72, 1.7, 3.4, (238, 236, 230))
        s.box(-3.6, 1.8, 1.7, 2.15, cab)
        s.polygon([(1.85, 0.45), (3.6, 0.45), (3.6, 1.5), (3.2, 2.55), (1.85, 2.6)], cab)
        s.polygon([(2.5, 1.5), (3.5, 1.5), (3.15, 2.3), (2.5, 2.3)], _GLASS)
        s.wheels((-2.7, -1.6, 2.7), 0.5, 0.5, 0.25)


def _bus(s: _Sprite, rng: np.random.Generator) -> None:
    paint = _hue(rng, 0.12, 0.15, 0.85, 0.98)
    s.shadow(3.0)
    if rng.integers(2):
        s.boxes((-1.1, 0.75), 0, 0.35, 0.5, _TYRE)
        s.box(-1.3, 0.25, 1.3, 3.2, paint, slant=0.08)
        s.box(-1.15, 1.1, 1.15, 2.5, _GLASS)
        s.box(-0.8, 2.65, 0.8, 3.0, _DARK)
        s.box(-0.5, 2.74, 0.5, 2.9, (255, 160, 40))
        s.boxes((-1.15, 0.8), 0.5, 0.35, 0.75, (255, 250, 220))
    else:
        s.box(-4.6, 0.3, 4.6, 3.2, paint)
        s.box(-4.6, 0.3, 4.6, 0.7, (196, 60, 40))
        s.boxes([-4.4 + 1.3 * window for window in range(7)], 1.5, 1.1, 2.65, _GLASS)
        s.boxes((-1.4, 2.4), 0.55, 1.0, 2.65, (120, 160, 180))
        s.wheels((-3.2, 3.2), 0.5, 0.5, 0.25)


def _train(s: _Sprite, rng: np.random.Generator) -> None:
    paint = _hue(rng, 0.36, 0.4, 0.8, 0.5)
    s.shadow(6.0)
    s.box(-5.6, 0.1, 5.6, 0.5, _DARK)
    s.polygon([(-6, 0.35), (6, 0.35), (5.9, 2.0), (5.4, 3.5), (-5.4, 3.5), (-5.9, 2.0)], (240, 230, 198))
    s.polygon([(-6, 0.35), (6, 0.35), (5.95, 1.5), (-5.95, 1.5)], paint)
    s.boxes([-5.3 + 1.35 * window for window in range(8)], 1.7, 1.05, 2.8, _GLASS)
    s.boxes((-3.4, 2.4), 0.5, 1.1, 2.9, (64, 92, 84))
    s.box(-3.0, 3.5, 3.0, 3.75, (110, 114, 116))


def _pole(s: _Sprite, rng: np.random.Generator, height: float) -> None:
    s.box(-0.16, 0, 0.16, height, (122, 126, 130))
    s.box(-0.16, 0, -0.02, height, (96, 100, 104))


def _traffic_light(s: _Sprite, rng: np.random.Generator, height: float) -> None:
    s.box(-0.34, height - 1.5, 0.34, height, (24, 26, 26))
    lit = rng.integers(3)
    for i, lamp in enumerate(((246, 50, 40), (255, 184, 30), (60, 224, 110))):
        s.disc(0, height - 0.27 - 0.48 * i, 0.2, lamp if i == lit else (70, 60, 50))


def _traffic_sign(s: _Sprite, rng: np.random.Generator, height: float) -> None:
    y = height - 0.5
    white, red, blue = (248, 248, 248), (214, 28, 36), (24, 84, 196)
    kind = rng.integers(4)
    if kind == 0:
        s.polygon([(-0.58, y - 0.42), (0.58, y - 0.42), (0, y + 0.58)], red)
        s.polygon([(-0.34, y - 0.28), (0.34, y - 0.28), (0, y + 0.3)], white)
    elif kind == 1:
        s.disc(0, y, 0.5, red)
        s.disc(0, y, 0.34, white)
    elif kind == 2:
        s.disc(0, y, 0.5, blue)
        s.polygon([(-0.1, y - 0.3), (0.1, y - 0.3), (0.1, y), (0.28, y), (0, y + 0.36), (-0.28, y), (-0.1, y)], white)
    else:
        s.box(-0.48, y - 0.48, 0.48, y + 0.48, blue)
        s.box(-0.2, y - 0.34, 0.2, y + 0.34, white)


def _tree(s: _Sprite, rng: np.random.Generator) -> None:
    """Cityscapes counts the trunk as vegetation, too."""
    size, leaves = float(rng.uniform(0.8, 1.3)), _hue(rng, 0.26, 0.34, 0.62, 0.5)
    s.box(-0.16, 0, 0.16, 2.4 * size, (92, 70, 50))
    for _ in range(12):
        x, y, light = float(rng.normal(0, 0.6)), float(rng.uniform(2.2, 4.6)), float(rng.uniform(0.75, 1.2))
        red, green, blue = (int(channel * light) for channel in leaves)
        s.disc(x * size, y * size, 0.8 * size, (red, green, blue), 0.7 * size)


def _litter_bin(s: _Sprite, rng: np.random.Generator) -> None:
    """It is of none of the classes."""
    s.box(-0.3, 0, 0.3, 1.0, (76, 84, 90), slant=-0.06)
    s.box(-0.4, 0.95, 0.4, 1.1, (54, 58, 62))


def _rails(s: _Sprite, rng: np.random.Generator) -> None:
    s.box(-40, -0.25, 40, 0.05, (120, 108, 100))
    s.box(-40, -0.15, 40, -0.08, (182, 184, 190))


def _car_paint(rng: np.random.Generator) -> Color:
    if rng.random() < 0.25:
        return (208, 210, 214)
    return _hue(rng, 0.97, 1.03, 0.85, 0.78) if rng.integers(2) else _hue(rng, 0.72, 0.82, 0.65, 0.66)


def _hue(rng: np.random.Generator, low: float, high: float, saturation: float, value: float) -> Color:
    """A colour of a random hue in a range (0 to 1, red at both ends)."""
    value = min(value * float(rng.uniform(0.85, 1.1)), 1.0)
    r, g, b = colorsys.hsv_to_rgb(float(rng.uniform(low, high)) % 1.0, saturation, value)
    return int(255 * r), int(255 * g), int(255 * b)


LABELS = {info.name: info.category_id for info in CITYSCAPES.classes} | {
    "unlabeled": 0,
    "ego vehicle": 1,
    "static": 4,
    "rail track": 10,
}
"""Official label ids by name: all classes, and some labels that belong to no class."""

Draw = Callable[[_Sprite, np.random.Generator], None]
Placed = tuple[Any, ...]  # depth in metres, drawing, sprite, and further arguments of the drawing
Span = tuple[Number, Number]

_FAR = 70.0
# Label, drawing, relative frequency, depth and lateral range in metres.
_THINGS: tuple[tuple[str, Draw, Number, Span, Span], ...] = (
    ("car", _car_front, 16, (4, 8.5), (-3.4, 3.4)),
    ("car", _car_side, 8, (5, 8.5), (-5, 5)),
    ("person", _person, 20, (3.4, 6), (-5, 5)),
    ("rider", _rider, 14, (3.6, 5.5), (-4.5, 4.5)),
    ("bicycle", _bicycle, 8, (3.4, 5), (-5, 5)),
    ("motorcycle", _motorcycle, 12, (3.4, 5.5), (-4.5, 4.5)),
    ("truck", _truck, 8, (6.5, 10), (-5, 5)),
    ("bus", _bus, 8, (7, 10.5), (-5, 5)),
    ("train", _train, 6, (11, 15), (-6, 6)),
)
# Label, drawing, chance per picture and distance of neighbours in metres.
_CROWDS: tuple[tuple[str, Draw, float, float], ...] = (
    ("person", _person, 0.2, 0.42),
    ("bicycle", _bicycle, 0.12, 0.5),
)


def draw_street(
    rng: np.random.Generator, height: int, width: int
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt16[np.ndarray, "height width"]]:
    """RGB image of one street scene, and the annotation as an official `instanceIds` map."""
    street = _Street(rng, height, width)
    street.draw_sky()
    street.draw_ground()
    for side in (-1, 1):
        street.draw_roadside(side)
    standing = [*street.furniture(), *street.crowds(), *street.things()]
    for _, draw, sprite, *arguments in sorted(standing, key=lambda placed: -placed[0]):
        draw(sprite, rng, *arguments)
    if rng.random() < 0.35:
        street.draw_bonnet()
    image, ids = street.canvas.finish()
    return _light(image, ids, rng), ids


class _Street:
    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng = rng
        self.canvas = _Canvas(height, width, (width / height / 2 + self.draw(-0.25, 0.25), self.draw(0.4, 0.48)))
        self.kerb = self.draw(3.2, 4.2)
        self.walk = self.kerb + self.draw(2.0, 3.0)  # outer edge of the pavements

    def draw(self, low: Number, high: Number) -> float:
        return float(self.rng.uniform(low, high))

    def sprite(self, x: Number, z: Number, segment_id: int, mirrored: bool = False) -> _Sprite:
        return _Sprite(self.canvas, x, z, segment_id, mirrored)

    def draw_sky(self) -> None:
        """Sky, clouds, and at the street's end haze of which nothing can be told."""
        tops: tuple[Color, ...] = ((92, 150, 220), (128, 176, 226), (150, 172, 200))
        bottoms: tuple[Color, ...] = ((206, 226, 244), (250, 226, 204), (222, 226, 230))
        kind, aspect, steps = self.rng.integers(3), self.canvas.aspect, 24
        for step in range(steps):
            y = step / steps * (self.canvas.vanishing_point[1] + 0.02)
            color = _mix(tops[kind], bottoms[kind], step / steps)
            self.canvas.polygon([(0, y), (aspect, y), (aspect, 0.6), (0, 0.6)], color, LABELS["sky"])
        for _ in range(self.rng.integers(2, 6)):
            x, y = self.draw(0, aspect), self.draw(0.02, 0.28)
            for _ in range(5):
                center = x + float(self.rng.normal(0, 0.08)), y + float(self.rng.normal(0, 0.015))
                self.canvas.shade(center, (self.draw(0.06, 0.14), self.draw(0.02, 0.05)), -0.55)
        self.sprite(0, _FAR, LABELS["unlabeled"]).box(-9, 0, 9, self.draw(2, 4), (176, 186, 198))

    def draw_ground(self) -> None:
        """Terrain, pavements with joints, road, kerbs and markings."""
        tone = int(self.rng.integers(-8, 9))
        slab, joint, asphalt, white = (190 + tone, 172 + tone, 164 + tone), (162, 144, 138), 94 + tone, (236, 236, 232)
        self._flat((-400, 400), (1.5, _FAR), (158, 168, 84), LABELS["terrain"])
        for side in (-1, 1):
            pavement = (side * self.kerb, side * self.walk)
            self._flat(pavement, (1.5, _FAR), slab, LABELS["sidewalk"])
            for z in np.geomspace(3, 40, 14).tolist():
                self._flat(pavement, (z, z * 1.015), joint, None)
        self._flat((-self.kerb, self.kerb), (1.5, _FAR), (asphalt, asphalt, asphalt + 8), LABELS["road"])
        for side in (-1, 1):
            stone = (side * self.kerb - 0.12, side * self.kerb + 0.12)
            self._flat(stone, (1.5, _FAR), (214, 208, 200), LABELS["sidewalk"])
        for z in np.arange(2.6 + self.draw(0, 2), _FAR, 5).tolist():
            self._flat((-0.09, 0.09), (z, z + 2.4), white, None)
        if self.rng.random() < 0.25:  # a zebra crossing
            z = self.draw(5, 10)
            for x in np.arange(0.4 - self.kerb, self.kerb - 0.5, 0.9).tolist():
                self._flat((x, x + 0.5), (z, z * 1.35), white, None)

    def draw_roadside(self, side: int) -> None:
        """Buildings, walls, fences and hedges of one side, from far to near."""
        edge = self.walk + (self.draw(1.5, 3) if self.rng.random() < 0.5 else 0.0)  # some streets have a verge
        near = _FAR * 0.8
        while near > 3.5:
            far, near = near, max(near - self.draw(5, 11), 2.2)
            kind = self.rng.random()
            if kind < 0.62:
                by_the_street = kind < 0.36
                setback = edge + (self.draw(0, 0.6) if by_the_street else self.draw(2, 4))
                self._house(side * setback, (near, far))
            else:
                by_the_street = False
                for z in np.linspace(far, near + 0.5, 3).tolist():
                    _tree(self.sprite(side * (edge + self.draw(1.4, 3)), z, LABELS["vegetation"]), self.rng)
            if not by_the_street:
                self._border(side * edge, (near, far))

    def _house(self, x: float, depths: Span) -> None:
        plaster: Color = ((186, 116, 86), (206, 164, 116), (170, 98, 84), (176, 142, 124))[self.rng.integers(4)]
        (near, far), height, gable = depths, self.draw(5, 12), x + float(np.sign(x)) * 9
        wall = [(x, 0.0), (gable, 0.0), (gable, height), (x, height)]
        self.sprite(0, near, LABELS["building"]).polygon(wall, _mix(plaster, (0, 0, 0), 0.28))
        self._upright(x, depths, (0, height), plaster, "building")
        self._upright(x, depths, (height - 0.5, height), _mix(plaster, (60, 40, 40), 0.5), "building")
        columns = max(int((far - near) / 2.2), 1)
        pitch = (far - near) / columns
        for y in np.arange(0.9, height - 1.9, 2.8).tolist():
            for z in (near + pitch * (np.arange(columns) + 0.25)).tolist():
                glass = (252, 226, 150) if self.rng.random() < 0.15 else (84, 100, 120)
                self._upright(x, (z, z + pitch / 2), (y, y + 1.4), glass, "building")

    def _border(self, x: float, depths: Span) -> None:
        kind, (near, far) = self.rng.random(), depths
        if kind < 0.3:
            self._upright(x, depths, (0, 1.9), (148, 146, 160), "wall")
            self._upright(x, depths, (1.75, 1.9), (184, 182, 192), "wall")
            self._upright(x, depths, (0.85, 0.92), (118, 116, 132), "wall")
        elif kind < 0.6:
            self._upright(x, depths, (0, 1.5), (112, 66, 36), "fence")
            for z in np.arange(near, far - 0.2, 0.55).tolist():
                self._upright(x, (z, z + 0.36), (0.1, 1.6), (160, 98, 54), "fence")
        elif kind < 0.75:
            self._upright(x, depths, (0, 1.3), (58, 112, 50), "vegetation")
            self._upright(x, depths, (1.0, 1.3), (84, 144, 66), "vegetation")

    def furniture(self) -> Iterator[Placed]:
        """Poles, lights and signs along both kerbs, with their depth."""
        for side in (-1, 1):
            x = side * (self.kerb + 0.45)
            for z in np.arange(self.draw(4, 7), 15, self.draw(4, 6)).tolist():
                kind = self.rng.random()
                height = self.draw(3.2, 4.2) if kind < 0.75 else 6.0
                yield z, _pole, self.sprite(x, z, LABELS["pole"]), height
                if kind < 0.4:
                    yield z - 0.01, _traffic_light, self.sprite(x, z, LABELS["traffic light"]), height
                elif kind < 0.75:
                    yield z - 0.01, _traffic_sign, self.sprite(x, z, LABELS["traffic sign"]), height
            if self.rng.random() < 0.4:
                z = self.draw(5, 12)
                yield z, _litter_bin, self.sprite(side * (self.walk - 0.5), z, LABELS["static"])

    def crowds(self) -> Iterator[Placed]:
        """Groups that are not told apart: their id is the bare label."""
        for label, draw, chance, distance in _CROWDS:
            if self.rng.random() < chance:
                nearest, side = self.draw(5.5, 8), int(self.rng.choice((-1, 1)))
                for i in range(self.rng.integers(4, 7)):
                    x, z = side * (self.kerb + 0.5 + distance * i), nearest + 0.05 * i
                    yield z, draw, self.sprite(x, z, LABELS[label])

    def things(self) -> Iterator[Placed]:
        """Up to five single things; a rider brings a bicycle, a train its track."""
        frequency = np.array([thing[2] for thing in _THINGS])
        columns: list[float] = []
        for _ in range(self.rng.integers(3, 6)):
            label, draw, _, depths, xs = _THINGS[self.rng.choice(len(_THINGS), p=frequency / frequency.sum())]
            for _ in range(12):
                x, z = self.draw(*xs), self.draw(*depths)
                column = self.canvas.project(x, 0, z)[0]
                inside = 0.12 < column < self.canvas.aspect - 0.12
                if inside and all(abs(column - other) > 0.3 for other in columns):
                    break
            else:
                continue  # no place left
            columns.append(column)
            mirrored = bool(self.rng.integers(2))
            if label == "rider":
                yield z + 0.01, _bicycle, self.sprite(x, z, self.canvas.new_id(LABELS["bicycle"]), mirrored)
            if label == "train":
                yield z + 0.02, _rails, self.sprite(x, z, LABELS["rail track"])
            yield z, draw, self.sprite(x, z, self.canvas.new_id(LABELS[label]), mirrored)

    def draw_bonnet(self) -> None:
        middle = self.canvas.aspect / 2
        xs = np.linspace(0, 2 * middle, 40)
        arch = 0.93 + 0.07 * (xs / middle - 1) ** 2
        outline = [*zip(xs.tolist(), arch.tolist(), strict=True), (2 * middle, 1.1), (0.0, 1.1)]
        self.canvas.polygon(outline, (30, 32, 38), LABELS["ego vehicle"])
        self.canvas.shade((middle, 0.97), (middle / 1.5, 0.03), -0.3)

    def _flat(self, xs: Span, depths: Span, color: Color, segment_id: int | None) -> None:
        (left, right), (near, far) = xs, depths
        corners = [self.canvas.project(x, 0, z) for x, z in ((left, far), (right, far), (right, near), (left, near))]
        self.canvas.polygon(corners, color, segment_id)

    def _upright(self, x: float, depths: Span, heights: Span, color: Color, label: str) -> None:
        """A rectangle along the street."""
        (near, far), (low, high) = depths, heights
        corners = [self.canvas.project(x, y, z) for y, z in ((low, near), (low, far), (high, far), (high, near))]
        self.canvas.polygon(corners, color, LABELS[label])


def _light(
    image: UInt8[np.ndarray, "height width 3"], ids: UInt16[np.ndarray, "height width"], rng: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
    """Exposure, colour of the light, large soft shadows, and grain that is coarser on plants and on the ground."""
    height, width = ids.shape
    soft = cv2.resize(rng.normal(1, 0.07, (4, 7)), (width, height), interpolation=cv2.INTER_CUBIC)
    tint = rng.uniform(0.85, 1.1) * rng.uniform(0.95, 1.05, 3)
    grain = np.full(ids.shape, 3.0)
    grain[np.isin(ids, [LABELS[name] for name in ("road", "sidewalk", "wall")])] = 5.0
    grain[np.isin(ids, [LABELS[name] for name in ("vegetation", "terrain")])] = 10.0
    grain *= rng.normal(0, 1, ids.shape)
    lit = image * soft[..., None] * tint + grain[..., None]
    return np.clip(np.round(lit), 0, 255).astype(np.uint8)


def _mix(a: Color, b: Color, share: float) -> Color:
    red, green, blue = (int(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue
