"""A canvas that draws colours and segment ids together, and a camera that places flat shapes in a street.

Streets are measured in metres: x to the right of the camera, y up from the ground, z ahead. Pictures are measured in
image heights from the top left corner, so that a scene looks the same at any resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16

Color = tuple[int, int, int]
Number = int | float
Point = tuple[Number, Number]
Points = Sequence[Point]

_OVERSAMPLING = 4
_CAMERA_HEIGHT = 1.6


class Canvas:
    """Draws every shape twice: its colour and, where it has one, its segment id.

    Colours are averaged down from four times the size, which smooths edges; ids are picked at pixel centres.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.aspect = width / height
        self._scale = height * _OVERSAMPLING  # drawn pixels per image height
        self._colors = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING, 3), np.uint8)
        self._ids = np.zeros(self._colors.shape[:2], np.uint16)
        self._counts: dict[int, int] = {}

    def new_id(self, label: int) -> int:
        """The id of the next single thing of a class, numbered as Cityscapes numbers them."""
        count = self._counts.get(label, 0)
        self._counts[label] = count + 1
        return label * 1000 + count

    def polygon(self, points: Points, color: Color, segment_id: int | None) -> None:
        """Fill a polygon; without an id it only paints, like a shadow or a road marking."""
        corners = np.round(np.array(points) * self._scale).astype(np.int32)
        cv2.fillPoly(self._colors, [corners], color)
        if segment_id is not None:
            cv2.fillPoly(self._ids, [corners], segment_id)

    def ellipse(self, center: Point, radii: Point, color: Color, segment_id: int) -> None:
        """Fill an ellipse."""
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
        """The picture and its id map at their final size."""
        centre = _OVERSAMPLING // 2
        size = (self._ids.shape[1] // _OVERSAMPLING, self.height)
        image = cv2.resize(self._colors, size, interpolation=cv2.INTER_AREA)
        return image, self._ids[centre::_OVERSAMPLING, centre::_OVERSAMPLING].copy()


@dataclass(frozen=True)
class Camera:
    """A pinhole camera looking down the street.

    Attributes:
        x: column of the vanishing point, in image heights.
        horizon: its row.
    """

    x: float
    horizon: float

    def project(self, x: Number, y: Number, z: Number) -> tuple[float, float]:
        """From metres to image heights."""
        return self.x + x / z, self.horizon + (_CAMERA_HEIGHT - y) / z


@dataclass(frozen=True)
class Sprite:
    """A flat drawing that stands upright in the street, facing the camera.

    Shapes are given in metres from the point where it stands: to the right (to the left if mirrored) and up.
    """

    canvas: Canvas
    camera: Camera
    x: Number
    z: Number
    segment_id: int
    mirrored: bool = False

    def polygon(self, points: Points, color: Color) -> None:
        """Fill a polygon."""
        sign = -1 if self.mirrored else 1
        placed = [self.camera.project(self.x + sign * x, y, self.z) for x, y in points]
        self.canvas.polygon(placed, color, self.segment_id)

    def box(self, left: Number, bottom: Number, right: Number, top: Number, color: Color, slant: Number = 0) -> None:
        """Fill a box whose top edge is shorter by `slant` at either end."""
        self.polygon([(left, bottom), (right, bottom), (right - slant, top), (left + slant, top)], color)

    def ellipse(self, x: Number, y: Number, radius_x: Number, radius_y: Number, color: Color) -> None:
        """Fill an ellipse around a point."""
        center = self.camera.project(self.x + (-x if self.mirrored else x), y, self.z)
        self.canvas.ellipse(center, (radius_x / self.z, radius_y / self.z), color, self.segment_id)

    def disc(self, x: Number, y: Number, radius: Number, color: Color) -> None:
        """Fill a circle around a point."""
        self.ellipse(x, y, radius, radius, color)

    def line(self, points: Points, width: Number, color: Color) -> None:
        """Draw a line of a certain width through points."""
        for (x0, y0), (x1, y1) in pairwise(points):
            length = math.hypot(x1 - x0, y1 - y0)
            dx, dy = (y1 - y0) / length * width / 2, (x0 - x1) / length * width / 2
            self.polygon([(x0 - dx, y0 - dy), (x1 - dx, y1 - dy), (x1 + dx, y1 + dy), (x0 + dx, y0 + dy)], color)

    def shadow(self, width: Number) -> None:
        """Darken the ground where it stands."""
        self.canvas.shade(self.camera.project(self.x, 0, self.z), (0.6 * width / self.z, 0.22 / self.z), 0.55)
