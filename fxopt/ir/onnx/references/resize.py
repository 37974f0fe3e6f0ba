"""Interpolation, one axis after the other: Resize and Upsample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.lane import to_ints, to_tensor
from fxopt.ir.onnx.references.common import along, axes_of, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


@dataclass(frozen=True)
class Interpolation:
    """How Resize samples an axis."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest_mode: str = "round_prefer_floor"
    cubic_coeff_a: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False
    extrapolation_value: float = 0.0


def _source(how: Interpolation, size: Any, out: Any, scale: Any, roi: tuple[float, float], device: Any) -> Tensor:
    """The position in the input of every output position along one axis."""
    at = torch.arange(out, dtype=torch.float64, device=device)
    width = scale * size
    mode = how.coordinates
    if mode == "asymmetric":
        return at.div(scale)
    if mode == "tf_half_pixel_for_nn":
        return (at + 0.5).div(scale)
    if mode in ("align_corners", "tf_crop_and_resize"):
        low, high = roi if mode == "tf_crop_and_resize" else (0.0, 1.0)
        centre = (high - low) * (size - 1) / 2 if mode == "tf_crop_and_resize" else 0.0
        inside = torch.full_like(at, centre) if out == 1 else at.mul((high - low) * (size - 1)).div(width - 1)
        return inside.add(low * (size - 1))
    if mode == "pytorch_half_pixel" and out == 1:
        return at
    half_pixel = (at + 0.5).div(scale) - 0.5
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return half_pixel
    if mode == "half_pixel_symmetric":
        return half_pixel.add(size / 2 * (1 - out / width))
    raise MissingReference(f"Resize with coordinate_transformation_mode {mode!r} has no torch reference")


def _kernel(how: Interpolation, distance: Tensor) -> Tensor:
    """The weight of an input element at this distance."""
    d = distance.abs()
    if how.mode == "linear":
        return torch.clamp(1 - d, 0, 1)
    a = how.cubic_coeff_a
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _weighted(x: Tensor, axis: int, at: Tensor, scale: Any, how: Interpolation) -> Tensor:
    """x sampled at positions along one axis: the weighted sum of the elements near each."""
    shrink = min(scale, 1.0) if how.antialias else 1.0
    reach = 1 if how.mode == "linear" else 2
    start = math.floor(-reach / shrink) + 1
    base = torch.ceil(at) - 1
    offsets = torch.arange(start, 2 - start, device=x.device)
    weights = _kernel(how, (offsets - (at - base).unsqueeze(-1)) * shrink)
    index = base.to(torch.int64).unsqueeze(-1) + offsets
    last = x.shape[axis] - 1
    if how.exclude_outside:
        weights = torch.where((index < 0) | (index > last), torch.zeros_like(weights), weights)
    if how.exclude_outside or how.antialias:
        weights = weights / weights.sum(-1, keepdim=True)
    index = index.clamp(0, last)
    total = torch.zeros_like(x.index_select(axis, index[:, 0]))
    for tap in range(2 - 2 * start):
        weight = along(weights[:, tap].to(x.dtype), x.dim(), axis)
        total = total + x.index_select(axis, index[:, tap]) * weight
    return total


def interpolate(
    x: Tensor, axis: int, out: Any, scale: Any, how: Interpolation, roi: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """x resized along one axis to `out` elements."""
    at = _source(how, x.shape[axis], out, scale, roi, x.device)
    if how.mode == "nearest":
        index = _NEAREST[how.nearest_mode](at).to(torch.int64).clamp(0, x.shape[axis] - 1)
        y = x.index_select(axis, index)
    elif how.mode in ("linear", "cubic"):
        require(x.is_floating_point(), f"Resize of {x.dtype} with mode {how.mode!r} has no torch reference")
        y = _weighted(x, axis, at, scale, how)
    else:
        raise MissingReference(f"Resize with mode {how.mode!r} has no torch reference")
    if how.coordinates != "tf_crop_and_resize":
        return y
    outside = along((at < 0) | (at > x.shape[axis] - 1), x.dim(), axis)
    return torch.where(outside, torch.full_like(y, how.extrapolation_value), y)


def _floats(values: Any) -> list[float] | None:
    """The numbers of an operand or attribute; None when it is omitted or empty."""
    if values is None:
        return None
    listed = list(values) if isinstance(values, (list, tuple)) else values.reshape(-1).tolist()
    return listed or None


def _scaled(size: Any, scale: float) -> Any:
    """floor(size * scale), exact for integral scales of symbolic sizes."""
    return size * int(scale) if float(scale).is_integer() else math.floor(size * scale)


def _keep_aspect(policy: str, sizes: list[Any], wanted: list[Any]) -> tuple[list[Any], list[float]]:
    """Output sizes and the one scale for all axes by `keep_aspect_ratio_policy`."""
    ratios = [out / size for out, size in zip(wanted, sizes)]
    if policy == "stretch":
        return wanted, ratios
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [math.floor(scale * size + 0.5) for size in sizes], [scale] * len(sizes)


@operators.reference("Resize", raw=True)
def resize(
    call: Call,
    x: Any,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """x sampled on a finer or coarser grid, by scales or output sizes; opset 10 is `asymmetric` and rounds down."""
    tensor: Tensor = to_tensor(x)
    if call.version < 11:
        return _upsample(tensor, _floats(roi) or [], str(mode))
    dims = axes_of(axes, tensor.dim()) or list(range(tensor.dim()))
    lengths = [tensor.shape[dim] for dim in dims]
    factors = _floats(scales)
    if factors is None:
        outs, ratios = _keep_aspect(str(keep_aspect_ratio_policy), lengths, to_ints(sizes) or [])
    else:
        outs, ratios = [_scaled(size, factor) for size, factor in zip(lengths, factors)], factors
    how = Interpolation(
        str(mode),
        str(coordinate_transformation_mode),
        str(nearest_mode),
        cubic_coeff_a,
        bool(antialias),
        bool(exclude_outside),
        extrapolation_value,
    )
    regions = _floats(roi) if how.coordinates == "tf_crop_and_resize" else None
    for position, (dim, out, ratio) in enumerate(zip(dims, outs, ratios)):
        region = (0.0, 1.0) if regions is None else (regions[position], regions[position + len(dims)])
        if ratio == 1.0 and out == tensor.shape[dim] and region == (0.0, 1.0):
            continue
        tensor = interpolate(tensor, dim, out, ratio, how, region)
    return tensor


@operators.reference("Upsample", raw=True)
def upsample(
    call: Call,
    x: Any,
    scales_input: Any = None,
    mode: str = "nearest",
    scales: list[float] | None = None,
    height_scale: float | None = None,
    width_scale: float | None = None,
) -> Tensor:
    """x sampled at output position / scale, rounded down; the scales are an attribute below opset 9."""
    tensor: Tensor = to_tensor(x)
    if height_scale is not None and width_scale is not None:
        scales = [1.0, 1.0, height_scale, width_scale]
    return _upsample(tensor, _floats(scales_input if scales is None else scales) or [], str(mode))


def _upsample(x: Tensor, factors: list[float], mode: str) -> Tensor:
    method = {"bilinear": "linear"}.get(mode, mode)
    require(method != "nearest" or min(factors, default=1) >= 1, "nearest Resize-10 with a scale below 1 is ambiguous")
    how = Interpolation(method, "asymmetric", "floor")
    for dim, factor in enumerate(factors):
        if factor != 1.0:
            x = interpolate(x, dim, _scaled(x.shape[dim], factor), factor, how)
    return x
