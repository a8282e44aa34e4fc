"""The classes of a user's own data set, from what its files say."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pem_lightning.data.targets import VOID_CLASS
from pem_lightning.errors import UserError
from pem_lightning.types import ClassInfo, DatasetInfo

_GOLDEN_RATIO = 0.618033988749895


def distinct_color(index: int) -> tuple[int, int, int]:
    """A colour for a class without one: hues by the golden ratio, so that any number of them are far apart."""
    red, green, blue = colorsys.hsv_to_rgb(
        index * _GOLDEN_RATIO % 1, (0.9, 0.6)[index % 2], (0.95, 0.75)[index // 2 % 2]
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def class_info(index: int, name: Any, color: Any, is_thing: bool, official_id: Any, source: Path) -> ClassInfo:
    """One class as its file describes it.

    Args:
        index: its position.
        name: must be a text.
        color: RGB from 0 to 255, or None for `distinct_color`.
        is_thing: whether it is countable.
        official_id: must be a whole number from 0 on.
        source: the file; named in errors.

    Raises:
        UserError: an entry is none of what it must be.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{source}: class {index} has no name: give every class a name, in quotes if it is a number")
    if isinstance(official_id, bool) or not isinstance(official_id, int) or official_id < 0:
        raise UserError(f"{source}: class {name!r} has the id {official_id!r}: give a whole number from 0 on")
    if color is None:
        color = distinct_color(index)
    valid = isinstance(color, Sequence) and len(color) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in color)
    if not valid:
        raise UserError(f"{source}: class {name!r} has the color {color!r}: give [red, green, blue], 0 to 255 each")
    return ClassInfo(name.strip(), tuple(color), is_thing, official_id)


def checked_info(name: str, classes: Sequence[ClassInfo], source: Path) -> DatasetInfo:
    """All classes together.

    Raises:
        UserError: there are none or too many, or two share an id or a name.
    """
    if not classes or len(classes) > VOID_CLASS:
        raise UserError(f"{source} has {len(classes)} classes: there must be 1 to {VOID_CLASS}")
    for what, values in (("id", [str(c.official_id) for c in classes]), ("name", [c.name for c in classes])):
        repeated, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise UserError(f"{source} has the class {what} {repeated} twice: give every class its own {what}")
    return DatasetInfo(name, tuple(classes))
