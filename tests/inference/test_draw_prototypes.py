from dataclasses import replace

import numpy as np
import pytest
import torch

from pem_lightning.inference.prototypes import COLORS, DecoderTrace, LayerPrototypes, draw_prototypes, draw_trace

GREY = 100
RED, BLUE = (250, 0, 0), (0, 0, 250)


@pytest.fixture
def image():
    return np.full((64, 128, 3), GREY, np.uint8)


@pytest.fixture
def layer():
    """Two heads, three queries, cells of 32 pixels: query 0 agrees on cell (0, 1), query 1 does not, 2 is empty."""
    cells = torch.tensor([[[0, 1], [1, 3], [0, 0]], [[0, 1], [0, 3], [0, 0]]])
    masks = torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[0, 0, 1] = masks[1, :, 3] = masks[1, 1, 2] = True
    return LayerPrototypes(1, 32, cells, (32.0, 32.0), torch.zeros(2, 3), masks)


def has_color(part, color):
    return bool((part == np.array(color)).all(-1).any())


def cell(picture, row, column, side=32):
    return picture[row * side : (row + 1) * side, column * side : (column + 1) * side]


@pytest.mark.parametrize("scale", [2, 3])
def test_choices_are_framed_where_they_are(image, layer, scale):
    picture = draw_prototypes(image, layer, [0, 1], scale=scale, colors=(RED, BLUE))
    assert picture.shape == (64 * scale, 128 * scale, 3)
    corners = {
        (row, column): tuple(cell(picture, row, column, 32 * scale)[1, 1].tolist())
        for row in range(2)
        for column in range(4)
    }
    assert {place for place, color in corners.items() if color == RED} == {(0, 1)}
    assert {place for place, color in corners.items() if color == BLUE} == {(0, 3), (1, 3)}
    frame = cell(picture, 0, 1, 32 * scale)
    for edge in (frame[0], frame[-1], frame[:, 0], frame[:, -1]):
        assert (edge == RED).all()


def test_masks_are_tinted_and_the_rest_is_not(image, layer):
    picture = draw_prototypes(image, layer, [0, 1], colors=(RED, BLUE)).astype(int)
    tinted = cell(picture, 1, 2)[4:-4, 4:-4]  # in query 1's mask, but chosen by none
    assert (tinted[..., 2] > GREY).all()
    assert (tinted[..., 0] < GREY).all()
    assert (cell(picture, 0, 0)[1:-1, 1:-1] == GREY).all()


def test_a_plate_covers_the_middle_of_a_chosen_cell(image, layer):
    picture = draw_prototypes(image, layer, [0], scale=2, colors=(RED,))
    middle = cell(picture, 0, 1, 64)[16:48, 16:48]
    assert has_color(middle, RED)
    assert has_color(middle, (255, 255, 255))


def test_queries_that_did_not_choose_are_left_out(image, layer):
    assert np.array_equal(draw_prototypes(image, layer, [2]), draw_prototypes(image, layer, []))
    assert not has_color(draw_prototypes(image, layer, [0, 2]), COLORS[1])


def test_padding_is_cut_off(layer):
    picture = draw_prototypes(np.full((50, 100, 3), GREY, np.uint8), layer, [0, 1], colors=(RED, BLUE))
    assert picture.shape == (50, 100, 3)
    assert has_color(picture[:, 96:], BLUE)


def test_layers_stand_in_rows_under_their_titles(image, layer):
    layers = tuple(replace(layer, layer=number) for number in range(1, 6))
    trace = DecoderTrace(image, (64, 128), layers, ())
    sheet, row = draw_trace(trace, [0], per_row=2), draw_trace(trace, [0], layers=[1, 2])
    assert sheet.shape == (3 * row.shape[0], *row.shape[1:])
    first, second, third = np.split(sheet, 3)
    assert np.array_equal(first, row)
    assert not np.array_equal(first, second)  # by their titles
    assert (third[:, -128:] == 255).all()
    assert np.array_equal(third[-64:, :128], draw_prototypes(image, layer, [0]))
