"""Fonts for class names in any script: Pillow's own for ASCII, else an installed one that has the characters."""

from __future__ import annotations

import logging
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont

log = logging.getLogger(__name__)

LESS_READABLE = (
    "bold",
    "italic",
    "oblique",
    "mono",
    "serif",
    "light",
    "thin",
    "black",
    "condensed",
    "math",
    "stix",
    "cm",
)
ONLY_BOXES = ("lastresort", "adobeblank", "notdef")  # fonts that have a box, or nothing, for every character


class Written(NamedTuple):
    """A class name as pictures show it."""

    text: str
    font: str | None  # path of the font; None for Pillow's own


@lru_cache(maxsize=64)
def write_names(names: tuple[str, ...]) -> tuple[Written, ...]:
    """Find a font for every class name; a name without one is transliterated, or becomes its number (#0 is the first).

    Which number stands for which name is logged, once.
    """
    written = [_write(" ".join(name.split())) for name in names]
    unknown = [k for k, one in enumerate(written) if one is None]
    if unknown:
        legend = ", ".join(f"#{k} for {names[k]}" for k in unknown)
        log.warning(
            "no installed font has these class names, so pictures say %s: install one, as Noto Sans CJK", legend
        )
    return tuple(Written(f"#{k}", None) if one is None else one for k, one in enumerate(written))


def _write(name: str) -> Written | None:
    if name.isascii():
        return Written(name, None)
    if font := _font_with(frozenset(c for c in name if not c.isspace() and unicodedata.category(c) != "Cf")):
        return Written(name, font)
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return Written(plain, None) if plain.isascii() else None


@lru_cache(maxsize=1024)
def _font_with(characters: frozenset[str]) -> str | None:
    try:  # here, because matplotlib takes long to import and most names are ASCII
        from matplotlib.ft2font import FT2Font
    except ImportError:  # beside a runtime alone
        return None

    for path in _installed_fonts():
        try:
            font = FT2Font(path)
            if font.scalable and all(font.get_char_index(ord(c)) for c in characters):
                ImageFont.truetype(path, 16)
                return path
        except (OSError, RuntimeError):  # damaged, or of a kind that Pillow cannot read
            continue
    return None


@lru_cache(maxsize=1)
def _installed_fonts() -> tuple[str, ...]:
    """Paths of the system's fonts and of those that come with matplotlib, plain ones first."""
    import matplotlib
    from matplotlib import font_manager

    shipped = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")
    paths = {str(path) for path in (*font_manager.findSystemFonts(), *shipped)}

    def rank(path: str) -> tuple[int, str, str]:
        name = Path(path).stem.lower()
        return sum(word in name for word in LESS_READABLE), name, path

    return tuple(sorted((p for p in paths if not any(word in p.lower() for word in ONLY_BOXES)), key=rank))


def load_font(size: int | float, path: str | None = None) -> ImageFont.FreeTypeFont:
    """A font by its path; by default Pillow's own."""
    font = ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow returns when a size is given
    return font
