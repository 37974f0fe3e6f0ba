"""Average pooling of 8-bit values (asymmetric, per tensor): integer sums, rounded once.

Source: QLinearAveragePool and QLinearGlobalAveragePool of ONNX Runtime's contrib operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.ops.linear_w8a8 import on_levels, quantized
from fxopt.ir.target import Cost


@op
def global_average_pool_a8(
    x: Tensor, keepdim: bool, x_scale: float, x_zero: int, y_scale: float, y_zero: int
) -> Tensor:
    """y = mean of quantize(x) over all spatial positions, on the levels of y.

    Args:
        x: float [N, C, *spatial], at least one position.
        keepdim: [N, C, 1, ...] instead of [N, C].
    """
    mean = quantized(x, x_scale, x_zero).mean(tuple(range(2, x.dim())), keepdim)
    return on_levels(mean * x_scale, y_scale, y_zero, x.dtype)


@op
def average_pool_a8(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    pads: list[int],
    include_pad: bool,
    x_scale: float,
    x_zero: int,
    y_scale: float,
    y_zero: int,
) -> Tensor:
    """y = mean of quantize(x) over windows, on the levels of y.

    Args:
        x: float [N, C, H, W].
        pads: begins, then ends, per spatial axis (as in ONNX).
        include_pad: padding counts as zeros; else the mean is over what lies inside.
    """
    levels = quantized(x, x_scale, x_zero)
    around = [pads[1], pads[3], pads[0], pads[2]]
    sums = _window_sums(torch.nn.functional.pad(levels, around), kernel, stride)
    inside = torch.ones_like(levels[:1, :1])
    counts = _window_sums(torch.nn.functional.pad(inside, around, value=float(include_pad)), kernel, stride)
    return on_levels(sums / counts * x_scale, y_scale, y_zero, x.dtype)


def _window_sums(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    return torch.nn.functional.avg_pool2d(x, kernel, stride, divisor_override=1)


def _cost(x: Tensor, operations: float, results: float) -> Cost:
    from fxopt.ir.graph import hint

    count = 1.0
    for dim in x.shape:
        count *= hint(dim)
    return Cost(operations * count, count + results * count, "int8", "elementwise", 1)


@global_average_pool_a8.cost
def _(x: Tensor, keepdim: bool, x_scale: float, x_zero: int, y_scale: float, y_zero: int) -> Cost:
    return _cost(x, 1.0, 0.0)


@average_pool_a8.cost
def _(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    pads: list[int],
    include_pad: bool,
    x_scale: float,
    x_zero: int,
    y_scale: float,
    y_zero: int,
) -> Cost:
    share = 1.0 / (stride[0] * stride[1])
    return _cost(x, kernel[0] * kernel[1] * share, share)


@global_average_pool_a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 7, 7), (1, 17, 4, 5), (0, 3, 2, 2)):
        for keepdim, zero in ((True, 0), (False, 120)):
            yield torch.randn(shape, generator=generator), keepdim, 0.02971, 128, 0.01013, zero


@average_pool_a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    cases: tuple[tuple[tuple[int, ...], list[int], list[int], list[int], bool], ...] = (
        ((2, 3, 8, 8), [2, 2], [2, 2], [0, 0, 0, 0], False),
        ((1, 8, 9, 7), [3, 3], [2, 1], [1, 1, 1, 1], False),
        ((1, 8, 9, 7), [3, 3], [1, 2], [0, 1, 1, 0], True),
    )
    for shape, kernel, stride, pads, include_pad in cases:
        yield torch.randn(shape, generator=generator), kernel, stride, pads, include_pad, 0.02971, 128, 0.02033, 110
