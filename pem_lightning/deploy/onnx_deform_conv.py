"""The modulated deformable convolution in ONNX operators: what `torch.ops.pem.deform_conv` becomes in a file.

Tracing takes it as one operator, which is several times as fast as tracing all that it is made of.

Legend: B batch, C channels, H W spatial, P positions (H * W), T taps (9).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import TensorProto
from onnxscript import opset20 as op

from pem_lightning.deploy.graph import TAPS_AT_ONCE

_DY = [-1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
_DX = [-1.0, 0.0, 1.0] * 3


def operator(x: Any, offsets: Any, mask: Any, weight: Any) -> Any:
    """One operator of the runtime's own."""
    return op.DeformConv(x, weight, offsets, None, mask, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def gather(x: Any, offsets: Any, mask: Any, weight: Any) -> Any:
    """As `graph.deform_conv_gather`: by looking up rows of a table, a row of taps at once."""
    C_out, C = weight.shape[0], weight.shape[1]
    h, w = _sizes(x)
    bottom_border, right_border = op.Add(h, [1]), op.Add(w, [1])  # of the map padded by one pixel
    W = op.Add(w, [2])
    images = op.Range(0, op.Squeeze(op.Shape(x, start=0, end=1)), 1)
    first = _int(op.Reshape(op.Mul(images, op.Mul(op.Add(h, [2]), W)), [-1, 1, 1]))
    table = op.Reshape(op.Transpose(op.Pad(x, [0, 0, 1, 1, 0, 0, 1, 1]), perm=[0, 2, 3, 1]), [-1, C])

    y, x_ = (op.Transpose(place, perm=[0, 2, 1]) for place in _places(offsets, h, w))  # B P T
    modulation = op.Transpose(op.Reshape(mask, [0, 9, -1]), perm=[0, 2, 1])
    top, bottom, fy = _neighbours(y, bottom_border)
    left, right, fx = _neighbours(x_, right_border)
    corners = []
    for rows, row_weight in ((top, op.Sub(1.0, fy)), (bottom, fy)):
        starts, row_weight = op.Add(op.Mul(rows, _int(W)), first), op.Mul(row_weight, modulation)
        for columns, column_weight in ((left, op.Sub(1.0, fx)), (right, fx)):
            corners.append((op.Add(starts, columns), op.Mul(row_weight, column_weight)))

    kernel = op.Reshape(weight, [C_out, C, 9])
    out = None
    for tap in range(0, 9, TAPS_AT_ONCE):
        taps = [tap], [tap + TAPS_AT_ONCE], [2]
        samples = None
        for index, share in corners:
            found = op.Gather(table, op.Reshape(op.Slice(index, *taps), [-1]), axis=0)
            part = op.Mul(found, op.Reshape(op.Slice(share, *taps), [-1, 1]))
            samples = part if samples is None else op.Add(samples, part)
        flat = op.Reshape(op.Transpose(op.Slice(kernel, *taps), perm=[2, 1, 0]), [TAPS_AT_ONCE * C, C_out])
        term = op.MatMul(op.Reshape(samples, [-1, TAPS_AT_ONCE * C]), flat)
        out = term if out is None else op.Add(out, term)
    batch, channels = op.Shape(x, start=0, end=1), op.Constant(value_ints=[C_out])
    pixels = op.Reshape(out, op.Concat(batch, op.Constant(value_ints=[-1]), channels, axis=0))
    return op.Reshape(op.Transpose(pixels, perm=[0, 2, 1]), op.Concat(batch, channels, h, w, axis=0))


def grid_sample(x: Any, offsets: Any, mask: Any, weight: Any) -> Any:
    """As `graph.deform_conv_grid_sample`: all taps by one GridSample, one below the other, and a 1x1 convolution."""
    C_out, C = weight.shape[0], weight.shape[1]
    h, w = _sizes(x)
    grid = []
    for place, length in zip(_places(offsets, h, w), (h, w), strict=True):
        scaled = op.Sub(op.Mul(op.Add(place, 0.5), op.Div(2.0, _float(length))), 1.0)
        grid.append(op.Unsqueeze(scaled, [3]))
    shape = op.Concat(op.Constant(value_ints=[0, -1]), w, op.Constant(value_ints=[2]), axis=0)
    grid = op.Reshape(op.Concat(grid[1], grid[0], axis=3), shape)  # B T*H W 2
    samples = op.GridSample(x, grid, mode="linear", padding_mode="zeros", align_corners=0)
    samples = op.Mul(op.Reshape(samples, [0, C, 9, -1]), op.Reshape(mask, [0, 1, 9, -1]))
    stacked = op.Reshape(samples, op.Concat(op.Constant(value_ints=[0, 9 * C]), h, w, axis=0))
    return op.Conv(stacked, op.Reshape(weight, [C_out, 9 * C, 1, 1]))


def _sizes(x: Any) -> tuple[Any, Any]:
    return op.Shape(x, start=2, end=3), op.Shape(x, start=3, end=4)


def _places(offsets: Any, h: Any, w: Any) -> tuple[Any, Any]:
    """Where every tap samples, y and x in pixels, [B, T, P]."""
    number = op.Range(0, op.Squeeze(op.Mul(h, w)), 1)
    pairs = op.Reshape(offsets, [0, 9, 2, -1])
    taps_y, taps_x = (op.Reshape(op.Constant(value_floats=taps), [9, 1]) for taps in (_DY, _DX))
    y = op.Add(op.Gather(pairs, 0, axis=2), op.Add(_float(op.Div(number, w)), taps_y))
    x = op.Add(op.Gather(pairs, 1, axis=2), op.Add(_float(op.Mod(number, w)), taps_x))
    return y, x


def _neighbours(place: Any, border: Any) -> tuple[Any, Any, Any]:
    """The pixels before and after a place, counted from the border of zeros, and the weight of the one after."""
    last = _float(border)
    place = op.Min(op.Max(place, -2.0), last)  # farther away, the conversion to integers is undefined
    whole = op.Floor(place)
    before, after = (_int(op.Min(op.Max(op.Add(whole, step), 0.0), last)) for step in (1.0, 2.0))
    return before, after, op.Sub(place, whole)


def _float(x: Any) -> Any:
    return op.Cast(x, to=TensorProto.FLOAT)


def _int(x: Any) -> Any:
    return op.Cast(x, to=TensorProto.INT32)


DEFORMABLE_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "grid_sample": grid_sample,
    "operator": operator,
}
