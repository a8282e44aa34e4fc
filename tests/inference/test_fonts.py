import logging

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from pem_lightning.inference import fonts
from pem_lightning.inference.fonts import Written, load_font, write_names
from pem_lightning.inference.visualize import overlay_panoptic
from pem_lightning.types import ClassInfo, DatasetInfo, Segment


@pytest.fixture(autouse=True)
def _forget():
    """Fonts are looked for once in a process."""

    def clear():
        for function in (write_names, fonts._font_with, fonts._installed_fonts):
            function.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def chinese(tmp_path, monkeypatch):
    """Install a font that has two signs, both drawn as full squares, and one that is damaged."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "one", "two"])
    builder.setupCharacterMap({ord("背"): "one", ord("景"): "two"})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, nothing = pen.glyph(), TTGlyphPen(None).glyph()
    builder.setupGlyf({".notdef": nothing, "one": square, "two": square})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "one", "two"), (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Signs", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "Signs.ttf")
    (tmp_path / "Aaa.ttf").write_bytes(b"no font")
    found = [str(tmp_path / name) for name in ("Aaa.ttf", "Signs.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    return str(tmp_path / "Signs.ttf")


@pytest.fixture
def _no_system_fonts(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


def test_english_names_keep_pillows_own_font():
    names = ("car", "traffic light", "a/b (c) #1 $x$ {y} ~")
    assert write_names(names) == tuple(Written(name, None) for name in names)


@pytest.mark.usefixtures("_no_system_fonts")
@pytest.mark.parametrize("name", ["дорога", "café", "Straße", "ουρανός", "cây"])
def test_what_matplotlib_ships_is_enough_for_europe_and_vietnam(name):
    """Pillow's own font has not even an e with an accent."""
    (written,) = write_names((name,))
    assert written.text == name
    font = load_font(20, written.font)
    box = font.getmask("\U0010fffe")
    for character in name:
        assert bytes(font.getmask(character)) != bytes(box)


def test_an_installed_font_is_found(chinese):
    assert write_names(("背景", "road")) == (Written("背景", chinese), Written("road", None))


@pytest.mark.usefixtures("_no_system_fonts")
def test_without_a_font_there_are_numbers_and_a_legend_or_plain_letters(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            written = write_names(("car", "背景", "ＡＢＣ", "天空\n"))
    assert [w.text for w in written] == ["car", "#1", "ABC", "#3"]
    (line,) = caplog.messages
    assert "#1 for 背景, #3 for 天空" in line
    assert "install" in line


def test_a_font_of_boxes_is_no_font(tmp_path, monkeypatch, chinese):
    (tmp_path / "Signs.ttf").rename(tmp_path / "LastResort.ttf")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "LastResort.ttf")])
    assert write_names(("背景",))[0].text == "#0"


@pytest.mark.parametrize("name", ["背景", "дорога", "道路"])
def test_overlays_are_drawn_with_it(chinese, name):
    info = DatasetInfo("x", (ClassInfo("car", (0, 0, 142), True, 1), ClassInfo(name, (250, 170, 30), False, 2)))
    photo, ids = np.full((256, 512, 3), 100, np.uint8), torch.ones(256, 512, dtype=torch.int32)
    drawn = overlay_panoptic(photo, ids, [Segment(1, 1, False)], info)
    text = (drawn < 60).all(-1)  # dark letters on a plate of a light colour
    assert text.any()
    if name == "背景":  # two full squares, which fill most of the box around them
        rows, columns = np.nonzero(text)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert text.sum() > 0.8 * box
