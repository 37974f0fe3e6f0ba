"""Pooling: MaxPool, AveragePool, LpPool and their global forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.common import pad_list, pad_with, require
from fxopt.ir.onnx.references.conv import spatial_pads
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_MAX_POOL: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Window:
    """A pooling window: kernel, strides, dilations and pads per spatial axis; `tail` is the padding that `ceil_mode`
    needs after the sizes and pads, negative where the last partial window is left out."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[Any]
    after: list[Any]
    tail: list[Any]

    @property
    def dilated(self) -> bool:
        """True when a dilation is not 1."""
        return any(dilation != 1 for dilation in self.dilations)

    @property
    def pads_list(self) -> list[Any]:
        """All padding, in the order of `torch.nn.functional.pad`."""
        return pad_list(self.before, [after + tail for after, tail in zip(self.after, self.tail)])

    def symmetric(self) -> bool:
        """True when torch's own padding does: equal on both sides and at most half the kernel."""
        plain = all(isinstance(pad, int) and pad >= 0 for pad in self.before)
        return plain and self.before == self.after and not any(self.tail) and self._half()

    def _half(self) -> bool:
        return all(2 * pad <= length for pad, length in zip(self.before, self.kernel))


def window_of(
    x: Tensor,
    kernel: list[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    auto_pad: str,
    pads: Sequence[int] | None,
    ceil_mode: int,
) -> Window:
    """The window of a pooling node over the spatial axes of x."""
    rank = x.dim() - 2
    require(rank in _MAX_POOL, f"pooling over {rank} axes has no torch reference")
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    before, after = spatial_pads(x.shape[2:], kernel, steps, spread, auto_pad, pads)
    tail: list[Any] = [0] * rank
    if ceil_mode and str(auto_pad) in ("NOTSET", "VALID"):
        tail = [
            _tail(size, length, step, dilation, low, high)
            for size, length, step, dilation, low, high in zip(x.shape[2:], kernel, steps, spread, before, after)
        ]
    return Window(list(kernel), steps, spread, before, after, tail)


def _tail(size: Any, length: int, step: int, dilation: int, before: Any, after: Any) -> Any:
    """The padding after the end pad that makes the number of windows the rounded-up one.

    A last window that starts in the end padding is left out.
    """
    extent = (length - 1) * dilation + 1
    padded = size + before + after
    count = (padded - extent + step - 1) // step + 1
    if (count - 1) * step >= size + before:
        count = count - 1
    return (count - 1) * step + extent - padded


@operators.reference("MaxPool")
def max_pool(
    call: Call,
    x: Tensor,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
) -> Any:
    """The maximum over a moving window, and its index in the flattened x."""
    window = window_of(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    rank = len(kernel_shape)
    wide = x if x.is_floating_point() else x.to(torch.float64)
    if window.symmetric() and call.outputs == 1:
        y = _MAX_POOL[rank](wide, window.kernel, window.strides, window.before, window.dilations)
        return y.to(x.dtype)
    padded = pad_with(wide, window.pads_list, value=-math.inf)
    if call.outputs == 1:
        return _MAX_POOL[rank](padded, window.kernel, window.strides, 0, window.dilations).to(x.dtype)
    y, index = _MAX_POOL[rank](padded, window.kernel, window.strides, 0, window.dilations, return_indices=True)
    return y.to(x.dtype), _flat_index(index, x, padded, window, storage_order)


def _flat_index(index: Tensor, x: Tensor, padded: Tensor, window: Window, storage_order: int) -> Tensor:
    """Indices into one padded plane as indices into the whole of x, in row- or column-major order."""
    coordinates: list[Tensor] = []
    for size, before in zip(reversed(padded.shape[2:]), reversed(window.before)):
        coordinates.insert(0, index % size - before)
        index = index // size
    sizes = list(x.shape[2:])
    if storage_order:
        coordinates, sizes = coordinates[::-1], sizes[::-1]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    flat = planes.reshape([x.shape[0], x.shape[1], *[1] * len(sizes)])
    for coordinate, size in zip(coordinates, sizes):
        flat = flat * size + coordinate
    return flat


def window_sum(x: Tensor, window: Window) -> Tensor:
    """The sum over a moving window of a tensor that is padded already."""
    rank = len(window.kernel)
    if not window.dilated:
        mean: Tensor = _AVERAGE_POOL[rank](x, window.kernel, window.strides)
        return mean * float(math.prod(window.kernel))
    ones = torch.ones([1, 1, *window.kernel], dtype=x.dtype, device=x.device)
    planes = x.reshape([x.shape[0] * x.shape[1], 1, *x.shape[2:]])
    total = _CONVOLUTIONS[rank](planes, ones, None, window.strides, 0, window.dilations)
    return total.reshape([x.shape[0], x.shape[1], *total.shape[2:]])


@operators.reference("AveragePool")
def average_pool(
    call: Call,
    x: Tensor,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The mean over a moving window; padding counts when `count_include_pad`, the tail of `ceil_mode` never."""
    window = window_of(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    if not window.dilated and window.symmetric():
        average = _AVERAGE_POOL[len(kernel_shape)]
        y: Tensor = average(x, window.kernel, window.strides, window.before, False, bool(count_include_pad))
        return y
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
    if count_include_pad:
        ones = pad_with(ones, pad_list(window.before, window.after), value=1.0)
        ones = pad_with(ones, pad_list([0] * len(window.tail), window.tail))
    else:
        ones = pad_with(ones, window.pads_list)
    return window_sum(pad_with(x, window.pads_list), window) / window_sum(ones, window)


@operators.reference("LpPool")
def lp_pool(
    call: Call,
    x: Tensor,
    kernel_shape: list[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    p: float = 2,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """(sum of |x| ** p over a moving window, in version 1 by default over everything) ** (1 / p)."""
    kernel_shape = kernel_shape or list(x.shape[2:])
    window = window_of(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    powers = pad_with(x.abs().pow(p), window.pads_list)
    return window_sum(powers, window).pow(1.0 / p)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


@operators.reference("GlobalAveragePool")
def global_average_pool(call: Call, x: Tensor) -> Tensor:
    """The mean over all spatial axes."""
    return x.mean(_spatial(x), keepdim=True)


@operators.reference("GlobalMaxPool")
def global_max_pool(call: Call, x: Tensor) -> Tensor:
    """The maximum over all spatial axes."""
    return x.amax(_spatial(x), keepdim=True)


@operators.reference("GlobalLpPool")
def global_lp_pool(call: Call, x: Tensor, p: float = 2) -> Tensor:
    """(sum of |x| ** p over all spatial axes) ** (1 / p)."""
    return x.abs().pow(p).sum(_spatial(x), keepdim=True).pow(1.0 / p)
