"""What stands in the street: things and street furniture, each a drawing of a few shapes in metres."""

from __future__ import annotations

import colorsys

import numpy as np

from pem_lightning.data.street.canvas import Color, Sprite

_DARK = (38, 38, 44)
_TYRE = (28, 28, 30)
_GLASS = (150, 190, 208)
_SKIN = ((236, 188, 152), (198, 140, 100), (120, 78, 52))


def person(s: Sprite, rng: np.random.Generator) -> None:
    """A pedestrian in bright clothes, 1.6 to 1.9 m tall."""
    t = float(rng.uniform(0.94, 1.1))
    stride = float(rng.uniform(0.05, 0.25))
    trousers, coat = _hue(rng, 0.58, 0.72, 0.5, 0.4), _hue(rng, 0.0, 1.0, 0.7, 0.85)
    skin = _SKIN[rng.integers(len(_SKIN))]
    s.shadow(0.7)
    for foot in (-stride, stride):
        s.polygon([(foot - 0.1, 0), (foot + 0.12, 0), (0.17, 0.9 * t), (-0.17, 0.9 * t)], trousers)
    s.line([(-0.2, 1.36 * t), (-0.3 - stride / 2, 0.85 * t)], 0.14, coat)
    s.line([(0.2, 1.36 * t), (0.3 + stride / 2, 0.85 * t)], 0.14, coat)
    s.box(-0.22, 0.78 * t, 0.22, 1.4 * t, coat, slant=-0.05)
    s.box(-0.27, 1.4 * t, 0.27, 1.5 * t, coat, slant=0.17)
    s.disc(0, 1.6 * t, 0.15, skin)
    s.polygon([(-0.16, 1.62 * t), (0.16, 1.62 * t), (0.11, 1.76 * t), (-0.11, 1.76 * t)], (60, 42, 30))


def bicycle(s: Sprite, rng: np.random.Generator) -> None:
    """A bicycle from the side; the wheels count as full discs, as in Cityscapes."""
    frame = _hue(rng, 0.48, 0.56, 0.9, 0.75)
    s.shadow(1.6)
    for x in (-0.55, 0.55):
        s.disc(x, 0.36, 0.36, _TYRE)
        s.disc(x, 0.36, 0.28, (150, 152, 156))
    s.line([(-0.55, 0.36), (-0.12, 0.85), (0.4, 0.85), (0.0, 0.36), (-0.12, 0.85)], 0.1, frame)
    s.line([(-0.55, 0.36), (0.0, 0.36)], 0.1, frame)
    s.line([(0.55, 0.36), (0.38, 1.0), (0.52, 1.08)], 0.1, frame)
    s.box(-0.28, 0.92, 0.02, 1.02, _TYRE)


def motorcycle(s: Sprite, rng: np.random.Generator) -> None:
    """A motorcycle from the side."""
    paint = _hue(rng, 0.93, 1.0, 0.85, 0.72)
    s.shadow(2.0)
    for x in (-0.7, 0.72):
        s.disc(x, 0.36, 0.37, _TYRE)
        s.disc(x, 0.36, 0.15, (190, 190, 195))
    s.polygon([(-0.5, 0.3), (0.45, 0.3), (0.5, 0.7), (-0.4, 0.75)], (70, 70, 76))
    s.polygon([(-0.15, 0.7), (0.5, 0.65), (0.5, 1.0), (0.2, 1.1), (-0.1, 0.95)], paint)
    s.polygon([(-1.05, 0.72), (-0.1, 0.75), (-0.1, 0.95), (-1.0, 0.98)], paint)
    s.line([(0.72, 0.36), (0.45, 1.1), (0.3, 1.25)], 0.13, (205, 205, 210))
    s.box(-0.7, 0.92, -0.1, 1.04, _TYRE)
    s.disc(0.6, 0.95, 0.14, (255, 244, 190))


def rider(s: Sprite, rng: np.random.Generator) -> None:
    """Someone on a bicycle, in a safety vest; the bicycle is its own segment."""
    vest = _hue(rng, 0.04, 0.1, 0.95, 1.0)
    s.line([(-0.1, 0.95), (0.22, 0.72), (0.02, 0.3)], 0.19, (52, 56, 88))
    s.polygon([(-0.3, 0.88), (0.02, 0.88), (0.32, 1.4), (0.16, 1.56), (-0.1, 1.5)], vest)
    s.line([(0.2, 1.42), (0.34, 1.12), (0.5, 1.1)], 0.13, vest)
    s.polygon([(-0.16, 1.18), (0.13, 1.1), (0.18, 1.19), (-0.12, 1.28)], (240, 244, 200))
    s.disc(0.26, 1.66, 0.15, _SKIN[rng.integers(len(_SKIN))])
    s.polygon([(0.08, 1.68), (0.46, 1.68), (0.38, 1.84), (0.14, 1.84)], (244, 244, 244))


def car_front(s: Sprite, rng: np.random.Generator) -> None:
    """A car from the front or from behind."""
    paint, towards = _car_paint(rng), bool(rng.integers(2))
    s.shadow(2.1)
    for x in (-0.82, 0.56):
        s.box(x, 0, x + 0.26, 0.4, _TYRE)
    s.box(-0.92, 0.22, 0.92, 0.86, paint, slant=0.04)
    s.box(-0.84, 0.84, 0.84, 1.48, paint, slant=0.2)
    s.box(-0.74, 0.88, 0.74, 1.38, _GLASS, slant=0.17)
    for x in (-0.86, 0.5):
        s.box(x, 0.56, x + 0.36, 0.76, (255, 246, 208) if towards else (214, 30, 34))
    s.box(-0.4, 0.42, 0.4, 0.6, _DARK if towards else (238, 238, 238))
    s.box(-0.9, 0.22, 0.9, 0.34, _DARK)


def car_side(s: Sprite, rng: np.random.Generator) -> None:
    """A car from the side."""
    paint = _car_paint(rng)
    s.shadow(4.4)
    s.polygon([(-2.1, 0.28), (2.1, 0.28), (2.12, 0.72), (1.3, 0.9), (-2.0, 0.92), (-2.12, 0.6)], paint)
    s.polygon([(-1.75, 0.9), (1.3, 0.88), (0.55, 1.48), (-1.25, 1.5)], paint)
    s.polygon([(-1.5, 0.95), (-0.35, 0.95), (-0.35, 1.4), (-1.15, 1.4)], _GLASS)
    s.polygon([(-0.22, 0.95), (1.0, 0.95), (0.45, 1.4), (-0.22, 1.4)], _GLASS)
    s.box(1.86, 0.56, 2.1, 0.74, (255, 246, 208))
    s.box(-2.1, 0.6, -1.92, 0.8, (214, 30, 34))
    _wheels(s, (-1.3, 1.3), 0.36)


def truck(s: Sprite, rng: np.random.Generator) -> None:
    """A lorry from the side or from the front: a coloured cab and a white cargo box."""
    cab = _hue(rng, 0.58, 0.64, 0.85, 0.7)
    s.shadow(3.0)
    if rng.integers(2):
        for x in (-1.1, 0.7):
            s.box(x, 0, x + 0.4, 0.55, _TYRE)
        s.box(-1.3, 0.6, 1.3, 3.5, (238, 236, 230))
        s.box(-1.2, 0.35, 1.2, 2.5, cab)
        s.box(-1.05, 1.4, 1.05, 2.25, _GLASS)
        s.box(-0.7, 0.8, 0.7, 1.15, _DARK)
        for x in (-1.1, 0.75):
            s.box(x, 0.5, x + 0.35, 0.72, (255, 246, 208))
    else:
        s.box(-3.6, 0.5, 3.4, 0.75, _DARK)
        s.box(-3.6, 0.72, 1.7, 3.4, (238, 236, 230))
        s.box(-3.6, 1.8, 1.7, 2.15, cab)
        s.polygon([(1.85, 0.45), (3.6, 0.45), (3.6, 1.5), (3.2, 2.55), (1.85, 2.6)], cab)
        s.polygon([(2.5, 1.5), (3.5, 1.5), (3.15, 2.3), (2.5, 2.3)], _GLASS)
        _wheels(s, (-2.7, -1.6, 2.7), 0.5)


def bus(s: Sprite, rng: np.random.Generator) -> None:
    """A yellow city bus from the side or from the front."""
    paint = _hue(rng, 0.12, 0.15, 0.85, 0.98)
    s.shadow(3.0)
    if rng.integers(2):
        for x in (-1.1, 0.75):
            s.box(x, 0, x + 0.35, 0.5, _TYRE)
        s.box(-1.3, 0.25, 1.3, 3.2, paint, slant=0.08)
        s.box(-1.15, 1.1, 1.15, 2.5, _GLASS)
        s.box(-0.8, 2.65, 0.8, 3.0, _DARK)
        s.box(-0.5, 2.74, 0.5, 2.9, (255, 160, 40))
        for x in (-1.15, 0.8):
            s.box(x, 0.5, x + 0.35, 0.75, (255, 250, 220))
    else:
        s.box(-4.6, 0.3, 4.6, 3.2, paint)
        s.box(-4.6, 0.3, 4.6, 0.7, (196, 60, 40))
        for window in range(7):
            x = -4.4 + 1.3 * window
            s.box(x, 1.5, x + 1.1, 2.65, _GLASS)
        for x in (-1.4, 2.4):
            s.box(x, 0.55, x + 1.0, 2.65, (120, 160, 180))
        _wheels(s, (-3.2, 3.2), 0.5)


def train(s: Sprite, rng: np.random.Generator) -> None:
    """A tram from the side, green below and cream above."""
    paint = _hue(rng, 0.36, 0.4, 0.8, 0.5)
    s.shadow(6.0)
    s.box(-5.6, 0.1, 5.6, 0.5, _DARK)
    s.polygon([(-6, 0.35), (6, 0.35), (5.9, 2.0), (5.4, 3.5), (-5.4, 3.5), (-5.9, 2.0)], (240, 230, 198))
    s.polygon([(-6, 0.35), (6, 0.35), (5.95, 1.5), (-5.95, 1.5)], paint)
    for window in range(8):
        x = -5.3 + 1.35 * window
        s.box(x, 1.7, x + 1.05, 2.8, _GLASS)
    for x in (-3.4, 2.4):
        s.box(x, 0.5, x + 1.1, 2.9, (64, 92, 84))
    s.box(-3.0, 3.5, 3.0, 3.75, (110, 114, 116))


def pole(s: Sprite, rng: np.random.Generator, height: float) -> None:
    """A grey mast."""
    s.box(-0.16, 0, 0.16, height, (122, 126, 130))
    s.box(-0.16, 0, -0.02, height, (96, 100, 104))


def traffic_light(s: Sprite, rng: np.random.Generator, height: float) -> None:
    """A signal box that hangs at a height; one lamp is lit."""
    s.box(-0.34, height - 1.5, 0.34, height, (24, 26, 26))
    lit = rng.integers(3)
    for i, lamp in enumerate(((246, 50, 40), (255, 184, 30), (60, 224, 110))):
        s.disc(0, height - 0.27 - 0.48 * i, 0.2, lamp if i == lit else (70, 60, 50))


def traffic_sign(s: Sprite, rng: np.random.Generator, height: float) -> None:
    """A triangle, disc, octagon or plate, 0.9 m wide, at a height."""
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


def tree(s: Sprite, rng: np.random.Generator) -> None:
    """A leafy tree; Cityscapes counts its trunk as vegetation too."""
    size, leaves = float(rng.uniform(0.8, 1.3)), _hue(rng, 0.26, 0.34, 0.62, 0.5)
    s.box(-0.16, 0, 0.16, 2.4 * size, (92, 70, 50))
    for _ in range(12):
        x, y, light = float(rng.normal(0, 0.6)), float(rng.uniform(2.2, 4.6)), float(rng.uniform(0.75, 1.2))
        red, green, blue = (int(channel * light) for channel in leaves)
        s.ellipse(x * size, y * size, 0.8 * size, 0.7 * size, (red, green, blue))


def litter_bin(s: Sprite, rng: np.random.Generator) -> None:
    """A litter bin, which is of none of the classes."""
    s.box(-0.3, 0, 0.3, 1.0, (76, 84, 90), slant=-0.06)
    s.box(-0.4, 0.95, 0.4, 1.1, (54, 58, 62))


def rails(s: Sprite, rng: np.random.Generator) -> None:
    """The track that a tram stands on, across the whole street."""
    s.box(-40, -0.25, 40, 0.05, (120, 108, 100))
    s.box(-40, -0.15, 40, -0.08, (182, 184, 190))


def _wheels(s: Sprite, places: tuple[float, ...], radius: float) -> None:
    for x in places:
        s.disc(x, radius, radius, _TYRE)
        s.disc(x, radius, radius / 2, (176, 178, 182))


def _car_paint(rng: np.random.Generator) -> Color:
    if rng.random() < 0.25:
        return (208, 210, 214)
    return _hue(rng, 0.97, 1.03, 0.85, 0.78) if rng.integers(2) else _hue(rng, 0.72, 0.82, 0.65, 0.66)


def _hue(rng: np.random.Generator, low: float, high: float, saturation: float, value: float) -> Color:
    """A colour of a random hue in a range (0 to 1, red at both ends), its brightness varied a little."""
    value = min(value * float(rng.uniform(0.85, 1.1)), 1.0)
    r, g, b = colorsys.hsv_to_rgb(float(rng.uniform(low, high)) % 1.0, saturation, value)
    return int(255 * r), int(255 * g), int(255 * b)
