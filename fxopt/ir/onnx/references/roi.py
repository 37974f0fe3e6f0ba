"""Pooling over regions of interest: RoiAlign (He et al. 2017), MaxRoiPool (Girshick 2015)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import host_data
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def _samples(start: float, length: float, bins: int, per_bin: int, size: int, like: Tensor) -> list[Tensor]:
    """Lower index, upper index, lower weight, upper weight of the sampling points of one axis, [bins * per_bin]."""
    points = torch.arange(bins * per_bin, dtype=like.dtype, device=like.device)
    position = start + (points + 0.5) * (length / (bins * max(per_bin, 1)))
    inside = (position >= -1) & (position <= size)
    clamped = position.clamp(0, size - 1)
    low = clamped.floor().clamp(max=max(size - 2, 0))
    upper_weight = clamped - low
    low = low.to(torch.int64)
    high = (low + 1).clamp(max=size - 1)
    return [low, high, torch.where(inside, 1 - upper_weight, 0), torch.where(inside, upper_weight, 0)]


def _corner_products(image: Tensor, y: list[Tensor], x: list[Tensor]) -> Tensor:
    """Weight times value of the four pixels around every sampling point, [4, C, points of y, points of x]."""
    return torch.stack(
        [
            image[:, y[row]][:, :, x[column]] * y[row + 2].unsqueeze(1) * x[column + 2]
            for row in (0, 1)
            for column in (0, 1)
        ]
    )


def _listed(x: Tensor) -> list[Any]:
    """The tensor's data as nested lists."""
    listed: list[Any] = host_data(x).tolist()
    return listed


@operators.reference("RoiAlign")
def roi_align(
    call: Call,
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    coordinate_transformation_mode: str | None = None,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """x [N, C, H, W] sampled in a grid over every region [R, 4] (x1, y1, x2, y2): [R, C, height, width].

    `max` takes the largest weighted pixel around a sampling point, not the interpolated value, as in ONNX's reference
    implementation and ONNX Runtime. Below opset 16 regions are not shifted by half a pixel.

    Raises:
        InvalidInput: an unknown mode.
    """
    if str(mode) not in ("avg", "max"):
        raise InvalidInput(f"mode {mode!r} given; expected 'avg' or 'max'")
    default = "half_pixel" if call.version >= 16 else "output_half_pixel"
    shifted = str(coordinate_transformation_mode or default) == "half_pixel"
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    corners = rois.to(wide.dtype) * spatial_scale - (0.5 if shifted else 0.0)
    lengths = corners[:, 2:] - corners[:, :2]
    lengths = lengths if shifted else lengths.clamp(min=1.0)
    bins = (output_height, output_width)
    fitting = torch.ceil(lengths / torch.tensor([output_width, output_height], dtype=wide.dtype, device=x.device))
    pooled = [torch.zeros([0, x.shape[1], *bins], dtype=wide.dtype, device=x.device)]
    for start, length, fit, batch in zip(*map(_listed, (corners, lengths, fitting, batch_indices)), strict=True):
        grid = [sampling_ratio or int(count) for count in reversed(fit)]
        axes = [
            _samples(start[1 - axis], length[1 - axis], bins[axis], grid[axis], x.shape[2 + axis], wide)
            for axis in (0, 1)
        ]
        products = _corner_products(wide[int(batch)], axes[0], axes[1])
        values = products.sum(0) if str(mode) == "avg" else products.amax(0)
        cells = values.reshape(x.shape[1], bins[0], grid[0], bins[1], grid[1])
        if 0 in grid:
            pooled.append(torch.zeros([1, x.shape[1], *bins], dtype=wide.dtype, device=x.device))
            continue
        pooled.append((cells.mean((2, 4)) if str(mode) == "avg" else cells.amax((2, 4))).unsqueeze(0))
    return torch.cat(pooled).to(x.dtype)


def _rounded(value: float) -> int:
    """The nearest integer, halves away from zero."""
    return math.floor(abs(value) + 0.5) * (1 if value >= 0 else -1)


def _cells(start: int, end: int, count: int, size: int) -> list[slice]:
    """The pixels of each of `count` parts of a region along one axis, cut at the image."""
    length = max(end - start + 1, 1) / count
    edges = [(start + math.floor(index * length), start + math.ceil((index + 1) * length)) for index in range(count)]
    return [slice(min(max(low, 0), size), min(max(high, 0), size)) for low, high in edges]


@operators.reference("MaxRoiPool")
def max_roi_pool(call: Call, x: Tensor, rois: Tensor, pooled_shape: list[int], spatial_scale: float = 1.0) -> Tensor:
    """The largest pixel of x [N, C, H, W] in parts of every region [R, 5] (batch, x1, y1, x2, y2); 0 where empty."""
    pooled = [torch.zeros([0, x.shape[1], *pooled_shape], dtype=x.dtype, device=x.device)]
    for batch, *corners in host_data(rois.double()).tolist():
        x1, y1, x2, y2 = (_rounded(value * spatial_scale) for value in corners)
        rows, columns = _cells(y1, y2, pooled_shape[0], x.shape[2]), _cells(x1, x2, pooled_shape[1], x.shape[3])
        image: Any = x[int(batch)]
        cells = [image[:, row, column] for row in rows for column in columns]
        largest = [cell.amax((1, 2)) if cell.numel() else cell.new_zeros(x.shape[1]) for cell in cells]
        pooled.append(torch.stack(largest, 1).reshape(1, x.shape[1], *pooled_shape))
    return torch.cat(pooled)
