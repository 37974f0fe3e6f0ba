"""Images and geometry in the domain `com.microsoft`: CropAndResize, GridSample, distances, dynamic transposed Conv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.lane import to_ints, to_tensor
from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.references.conv import conv_transpose
from fxopt.ir.onnx.references.sample import grid_sample
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")

operators.reference("GridSample")(grid_sample)


@operators.reference("CDist")
def cdist(call: Call, a: Tensor, b: Tensor, metric: str = "sqeuclidean") -> Tensor:
    """The distance of every row of a to every row of b, Euclidean or its square."""
    require(str(metric) in ("euclidean", "sqeuclidean"), f"CDist with metric {metric!r} has no torch reference")
    squares = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)
    return squares if str(metric) == "sqeuclidean" else squares.sqrt()


@operators.reference("ConvTransposeWithDynamicPads", raw=True)
def conv_transpose_with_dynamic_pads(
    call: Call, x: Any, w: Any, pads: Any = None, bias: Any = None, **attributes: Any
) -> Tensor:
    """ConvTranspose whose pads are an input."""
    result: Tensor = conv_transpose(call, to_tensor(x), to_tensor(w), to_tensor(bias), pads=to_ints(pads), **attributes)
    return result


def _positions(low: Tensor, high: Tensor, count: int, size: int) -> Tensor:
    """Sample positions in pixels, [boxes, count]: the corners of the box fall on the first and the last."""
    steps = torch.arange(count, device=low.device, dtype=low.dtype)
    if count == 1:
        return (0.5 * (low + high) * (size - 1)).unsqueeze(1)
    scale = (high - low) * (size - 1) / (count - 1)
    return (low * (size - 1)).unsqueeze(1) + steps * scale.unsqueeze(1)


@operators.reference("CropAndResize", raw=True)
def crop_and_resize(
    call: Call,
    x: Any,
    rois: Any,
    batch_indices: Any,
    crop_size: Any,
    mode: str = "bilinear",
    extrapolation_value: float = 0.0,
) -> Tensor:
    """Boxes (y1, x1, y2, x2, in 0..1) of images [N, C, H, W], resized to `crop_size`; outside is a constant."""
    require(str(mode) in ("bilinear", "nearest"), f"CropAndResize with mode {mode!r} has no torch reference")
    image, boxes = to_tensor(x), to_tensor(rois)
    which = to_tensor(batch_indices).to(torch.int64)
    height, width = to_ints(crop_size) or [1, 1]
    rows = _positions(boxes[:, 0], boxes[:, 2], height, image.shape[2])
    columns = _positions(boxes[:, 1], boxes[:, 3], width, image.shape[3])
    planes = image.index_select(0, which)

    def at(row: Tensor, column: Tensor) -> Tensor:
        flat = (row.unsqueeze(2) * image.shape[3] + column.unsqueeze(1)).to(torch.int64).flatten(1)
        index = flat.unsqueeze(1).expand(-1, planes.shape[1], -1)
        picked: Tensor = planes.flatten(2).gather(2, index)
        return picked.reshape(*planes.shape[:2], height, width)

    last_row, last_column = image.shape[2] - 1, image.shape[3] - 1
    inside = ((rows >= 0) & (rows <= last_row)).unsqueeze(2) & ((columns >= 0) & (columns <= last_column)).unsqueeze(1)
    r, c = rows.clamp(0, last_row), columns.clamp(0, last_column)
    if str(mode) == "nearest":
        y = at(_half_away(r), _half_away(c))
    else:
        down, right = (r - r.floor())[:, None, :, None], (c - c.floor())[:, None, None, :]
        top = at(r.floor(), c.floor()) * (1 - right) + at(r.floor(), c.ceil()) * right
        bottom = at(r.ceil(), c.floor()) * (1 - right) + at(r.ceil(), c.ceil()) * right
        y = top * (1 - down) + bottom * down
    return torch.where(inside.unsqueeze(1), y, torch.full_like(y, extrapolation_value))


def _half_away(x: Tensor) -> Tensor:
    """Rounded to the nearest integer, halves up (x is not negative)."""
    return (x + 0.5).floor()
