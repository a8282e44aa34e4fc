"""Composes one street: its surroundings from far to near, then everything that stands in it, then light and grain."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16

from pem_lightning.data.cityscapes import CITYSCAPES
from pem_lightning.data.street import objects
from pem_lightning.data.street.canvas import Camera, Canvas, Color, Number, Sprite

LABELS = {info.name: info.official_id for info in CITYSCAPES.classes} | {
    "unlabeled": 0,
    "ego vehicle": 1,
    "static": 4,
    "rail track": 10,
}
"""Official label ids by name: all classes, and some labels that belong to no class."""

Draw = Callable[[Sprite, np.random.Generator], None]
Placed = tuple[Number, Callable[[], None]]  # depth in metres, and the drawing to make there
Span = tuple[Number, Number]

_FAR = 70.0
# Label, drawing, relative frequency, depth and lateral range in metres.
_THINGS: tuple[tuple[str, Draw, Number, Span, Span], ...] = (
    ("car", objects.car_front, 16, (4, 8.5), (-3.4, 3.4)),
    ("car", objects.car_side, 8, (5, 8.5), (-5, 5)),
    ("person", objects.person, 20, (3.4, 6), (-5, 5)),
    ("rider", objects.rider, 14, (3.6, 5.5), (-4.5, 4.5)),
    ("bicycle", objects.bicycle, 8, (3.4, 5), (-5, 5)),
    ("motorcycle", objects.motorcycle, 12, (3.4, 5.5), (-4.5, 4.5)),
    ("truck", objects.truck, 8, (6.5, 10), (-5, 5)),
    ("bus", objects.bus, 8, (7, 10.5), (-5, 5)),
    ("train", objects.train, 6, (11, 15), (-6, 6)),
)
# Label, drawing, chance per picture and distance of neighbours in metres.
_CROWDS: tuple[tuple[str, Draw, float, float], ...] = (
    ("person", objects.person, 0.2, 0.42),
    ("bicycle", objects.bicycle, 0.12, 0.5),
)


def draw_street(
    rng: np.random.Generator, height: int, width: int
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt16[np.ndarray, "height width"]]:
    """Draw one street scene.

    Returns:
        RGB image, and the annotation as an official `instanceIds` map.
    """
    street = _Street(rng, Canvas(height, width))
    street.draw_sky()
    street.draw_ground()
    for side in (-1, 1):
        street.draw_roadside(side)
    standing = [*street.furniture(), *street.crowds(), *street.things()]
    for _, draw in sorted(standing, key=lambda placed: -placed[0]):
        draw()
    if rng.random() < 0.35:
        street.draw_bonnet()
    image, ids = street.canvas.finish()
    return _light(image, ids, rng), ids


class _Street:
    """One street with everything that is drawn at random about it."""

    def __init__(self, rng: np.random.Generator, canvas: Canvas) -> None:
        self.rng = rng
        self.canvas = canvas
        self.camera = Camera(canvas.aspect / 2 + self.draw(-0.25, 0.25), self.draw(0.4, 0.48))
        self.kerb = self.draw(3.2, 4.2)
        self.walk = self.kerb + self.draw(2.0, 3.0)  # outer edge of the pavements

    def draw(self, low: Number, high: Number) -> float:
        """A uniform random number."""
        return float(self.rng.uniform(low, high))

    def sprite(self, x: Number, z: Number, segment_id: int, mirrored: bool = False) -> Sprite:
        """An upright drawing at a place."""
        return Sprite(self.canvas, self.camera, x, z, segment_id, mirrored)

    def placed(self, z: Number, draw: Callable[..., None], sprite: Sprite, *args: float) -> Placed:
        """A drawing to be made when its depth is due."""
        return z, lambda: draw(sprite, self.rng, *args)

    def draw_sky(self) -> None:
        """Sky from top to horizon, clouds, and at the street's end haze of which nothing can be told."""
        tops: tuple[Color, ...] = ((92, 150, 220), (128, 176, 226), (150, 172, 200))
        bottoms: tuple[Color, ...] = ((206, 226, 244), (250, 226, 204), (222, 226, 230))
        kind, aspect, steps = self.rng.integers(3), self.canvas.aspect, 24
        for step in range(steps):
            y = step / steps * (self.camera.horizon + 0.02)
            color = _mix(tops[kind], bottoms[kind], step / steps)
            self.canvas.polygon([(0, y), (aspect, y), (aspect, 0.6), (0, 0.6)], color, LABELS["sky"])
        for _ in range(self.rng.integers(2, 6)):
            x, y = self.draw(0, aspect), self.draw(0.02, 0.28)
            for _ in range(5):
                center = x + float(self.rng.normal(0, 0.08)), y + float(self.rng.normal(0, 0.015))
                self.canvas.shade(center, (self.draw(0.06, 0.14), self.draw(0.02, 0.05)), -0.55)
        self.sprite(0, _FAR, LABELS["unlabeled"]).box(-9, 0, 9, self.draw(2, 4), (176, 186, 198))

    def draw_ground(self) -> None:
        """Grass, and on it the pavements and the road with its markings."""
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
        """Houses, trees, walls and fences along one side, block by block towards the camera."""
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
                    objects.tree(self.sprite(side * (edge + self.draw(1.4, 3)), z, LABELS["vegetation"]), self.rng)
            if not by_the_street:
                self._border(side * edge, (near, far))

    def _house(self, x: float, depths: Span) -> None:
        plaster: Color = ((186, 116, 86), (206, 164, 116), (170, 98, 84), (176, 142, 124))[self.rng.integers(4)]
        (near, far), height, gable = depths, self.draw(5, 12), x + float(np.sign(x)) * 9
        wall = [(x, 0.0), (gable, 0.0), (gable, height), (x, height)]
        corners = [self.camera.project(wall_x, y, near) for wall_x, y in wall]
        self.canvas.polygon(corners, _mix(plaster, (0, 0, 0), 0.28), LABELS["building"])
        self._upright(x, depths, (0, height), plaster, "building")
        self._upright(x, depths, (height - 0.5, height), _mix(plaster, (60, 40, 40), 0.5), "building")
        columns = max(int((far - near) / 2.2), 1)
        pitch = (far - near) / columns
        for y in np.arange(0.9, height - 1.9, 2.8).tolist():
            for z in (near + pitch * (np.arange(columns) + 0.25)).tolist():
                glass = (252, 226, 150) if self.rng.random() < 0.15 else (84, 100, 120)
                self._upright(x, (z, z + pitch / 2), (y, y + 1.4), glass, "building")

    def _border(self, x: float, depths: Span) -> None:
        """A wall, a fence, a hedge or nothing between the pavement and what is behind."""
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
        """Masts with traffic lights, signs or nothing on them, and litter bins."""
        for side in (-1, 1):
            x = side * (self.kerb + 0.45)
            for z in np.arange(self.draw(4, 7), 15, self.draw(4, 6)).tolist():
                kind = self.rng.random()
                height = self.draw(3.2, 4.2) if kind < 0.75 else 6.0
                yield self.placed(z, objects.pole, self.sprite(x, z, LABELS["pole"]), height)
                if kind < 0.4:
                    light = self.sprite(x, z, LABELS["traffic light"])
                    yield self.placed(z - 0.01, objects.traffic_light, light, height)
                elif kind < 0.75:
                    sign = self.sprite(x, z, LABELS["traffic sign"])
                    yield self.placed(z - 0.01, objects.traffic_sign, sign, height)
            if self.rng.random() < 0.4:
                z = self.draw(5, 12)
                yield self.placed(z, objects.litter_bin, self.sprite(side * (self.walk - 0.5), z, LABELS["static"]))

    def crowds(self) -> Iterator[Placed]:
        """Groups that are not told apart, people waiting or bicycles leaning together: their id is the bare label."""
        for label, draw, chance, distance in _CROWDS:
            if self.rng.random() < chance:
                nearest, side = self.draw(5.5, 8), int(self.rng.choice((-1, 1)))
                for i in range(self.rng.integers(4, 7)):
                    x, z = side * (self.kerb + 0.5 + distance * i), nearest + 0.05 * i
                    yield self.placed(z, draw, self.sprite(x, z, LABELS[label]))

    def things(self) -> Iterator[Placed]:
        """Up to five single things, spread over the picture; a rider brings a bicycle, a train its track."""
        frequency = np.array([thing[2] for thing in _THINGS])
        columns: list[float] = []
        for _ in range(self.rng.integers(3, 6)):
            label, draw, _, depths, xs = _THINGS[self.rng.choice(len(_THINGS), p=frequency / frequency.sum())]
            for _ in range(12):
                x, z = self.draw(*xs), self.draw(*depths)
                column = self.camera.project(x, 0, z)[0]
                inside = 0.12 < column < self.canvas.aspect - 0.12
                if inside and all(abs(column - other) > 0.3 for other in columns):
                    break
            else:
                continue  # no place left
            columns.append(column)
            mirrored = bool(self.rng.integers(2))
            if label == "rider":
                ridden = self.sprite(x, z, self.canvas.new_id(LABELS["bicycle"]), mirrored)
                yield self.placed(z + 0.01, objects.bicycle, ridden)
            if label == "train":
                yield self.placed(z + 0.02, objects.rails, self.sprite(x, z, LABELS["rail track"]))
            yield self.placed(z, draw, self.sprite(x, z, self.canvas.new_id(LABELS[label]), mirrored))

    def draw_bonnet(self) -> None:
        """The bonnet of the car that carries the camera."""
        middle = self.canvas.aspect / 2
        xs = np.linspace(0, 2 * middle, 40)
        arch = 0.93 + 0.07 * (xs / middle - 1) ** 2
        outline = [*zip(xs.tolist(), arch.tolist(), strict=True), (2 * middle, 1.1), (0.0, 1.1)]
        self.canvas.polygon(outline, (30, 32, 38), LABELS["ego vehicle"])
        self.canvas.shade((middle, 0.97), (middle / 1.5, 0.03), -0.3)

    def _flat(self, xs: Span, depths: Span, color: Color, segment_id: int | None) -> None:
        """A rectangle on the ground."""
        (left, right), (near, far) = xs, depths
        corners = [self.camera.project(x, 0, z) for x, z in ((left, far), (right, far), (right, near), (left, near))]
        self.canvas.polygon(corners, color, segment_id)

    def _upright(self, x: float, depths: Span, heights: Span, color: Color, label: str) -> None:
        """A rectangle that stands along the street."""
        (near, far), (low, high) = depths, heights
        corners = [self.camera.project(x, y, z) for y, z in ((low, near), (low, far), (high, far), (high, near))]
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
    """The colour a share of the way from one to another."""
    red, green, blue = (int(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue
