"""Views and their 8-bit forms in torch, on the values kept by calibration: what errors are estimated with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxopt.ir.graph import Graph
from fxopt.ir.views.common import argument, scalar_constant
from fxopt.ir.views.conv import Conv
from fxopt.ir.views.linear import Linear
from fxopt.passes.quantize_linear.common import float_conv, result_of
from fxopt.passes.quantize_linear.grids import affine, quantize_weight
from fxopt.passes.quantize_linear.smoothing import Smoothing
from fxopt.passes.stats import Extremes, ValueStats


def linear_on_kept(
    x: Tensor, operands: tuple[Any, ...], weight: Tensor, seen: ValueStats, smoothing: Smoothing | None, sums: int
) -> Tensor:
    """The integer linear on the kept rows, each with what the half of the calls without that row calibrates.

    A range, or factors, that were taken from a row fit it better than they will fit new data.
    """
    codes, scales, bias, *fixed = operands
    s = None if smoothing is None else smoothing.s
    if seen.calls < 2 or seen.sample_half is None or not (fixed or smoothing):
        return _linear_on_rows(x if s is None else x / s, operands, _run_time_range(seen, s))
    result = x.new_empty(len(x), len(weight))
    for half in (0, 1):
        rows, other = seen.sample_half == half, seen.halves[1 - half]
        if smoothing is not None and smoothing.halves is not None:
            s = smoothing.halves[1 - half]
            codes, scales = quantize_weight(scaled(weight, s), sums)
        low, high = _extremes(other) if s is None else channel_range(other, s)
        run_time = affine(low, high) if fixed else _run_time_range(seen, s)
        result[rows] = _linear_on_rows(x[rows] if s is None else x[rows] / s, (codes, scales, bias), run_time)
    return result


def scaled(weight: Tensor, s: Tensor | None) -> Tensor:
    """The weight of a linear whose inputs are divided by s."""
    return weight if s is None else weight.float() * s


def _extremes(seen: Extremes) -> tuple[float, float]:
    """The range, zero included."""
    return min(seen.minimum, 0.0), max(seen.maximum, 0.0)


def channel_range(seen: Extremes, s: Tensor) -> tuple[float, float]:
    """The range of x / s over all calibration samples, zero included."""
    assert seen.channel_minimum is not None and seen.channel_maximum is not None
    return min(float((seen.channel_minimum / s).min()), 0.0), max(float((seen.channel_maximum / s).max()), 0.0)


def _run_time_range(seen: ValueStats, s: Tensor | None) -> tuple[float, int]:
    """Scale and zero point of an activation as a whole, on average over the calls."""
    low, high = min(seen.mean_minimum, 0.0), max(seen.mean_maximum, 0.0)
    if s is not None:
        widest = channel_range(seen, s)
        low = widest[0] * (low / min(seen.minimum, -1e-30)) if seen.minimum < 0 else 0.0
        high = widest[1] * (high / max(seen.maximum, 1e-30)) if seen.maximum > 0 else 0.0
    return affine(low, high)


def _linear_on_rows(x: Tensor, operands: tuple[Any, ...], run_time: tuple[float, int]) -> Tensor:
    """The integer linear on sampled rows; `run_time` is the range that a dynamic one finds.

    In float32: the rounding of the sum is far below the quantisation error that is estimated here.
    """
    codes, scales, bias, *fixed = operands
    x_scale, x_zero = fixed or run_time
    return torch.nn.functional.linear(
        rounded(x, x_scale, x_zero), codes.float() * scales[:, None], None if bias is None else bias.float()
    )


def conv_on_kept(graph: Graph, view: Conv, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
    """The integer convolution on kept items, in float32 too."""
    codes, scales, bias, x_scale, x_zero, y_scale, y_zero, *_ = operands
    return rounded(float_conv(rounded(x, x_scale, x_zero), view, dequantized(codes, scales), bias), y_scale, y_zero)


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """The weight that codes and scales per output stand for."""
    return codes.float() * scales.reshape(-1, *[1] * (codes.dim() - 1))


def rounded(x: Tensor, scale: float, zero: int) -> Tensor:
    """x on the 256 levels."""
    return ((torch.round(x / scale) + zero).clamp_(0, 255) - zero).mul_(scale)


def lost_mean(view: Conv, weight: Tensor, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
    """What rounding (and clipping) the input and the weight takes from the mean of each output, on kept items: [out].

    The convolution is linear, so that of the mean item is enough.
    """
    codes, scales, x_scale, x_zero = operands
    exact = float_conv(x.mean(0, keepdim=True), view, weight.float(), None)
    mean = rounded(x, x_scale, x_zero).mean(0, keepdim=True)
    lost = exact - float_conv(mean, view, dequantized(codes, scales), None)
    return lost.transpose(0, 1).flatten(1).mean(1)


def float_result(graph: Graph, view: Linear | Conv, x: Tensor) -> Tensor:
    """What the view computes from x."""
    weight, bias = view.weight(graph).float(), view.bias(graph)
    if isinstance(view, Linear):
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.float())
    result = float_conv(x, view, weight, bias)
    return _saturated_like(graph, result_of(graph, view), view.node, result)


def _saturated_like(graph: Graph, behind_it: fx.Node, node: fx.Node, value: Tensor) -> Tensor:
    """The value after the ReLU or clip that `saturated` found behind `node`."""
    if behind_it is node:
        return value
    top = scalar_constant(graph, argument(behind_it, 2, "max"))
    return value.clamp(min=0.0, max=top)
