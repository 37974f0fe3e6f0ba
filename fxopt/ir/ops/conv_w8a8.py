"""Convolution with 8-bit weights (symmetric, per output channel), input and output (asymmetric, per tensor).

Source: Krishnamoorthi (2018): y_q = clamp(round((sum q_w q_x + b_q) s_w s_x / s_y) + z_y), b_q = round(b / (s_w s_x)).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.ops.linear_w8a8 import quantized
from fxopt.ir.target import Cost, conv_kind

_CONVOLUTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


@op
def conv_w8a8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero: int,
    y_scale: float,
    y_zero: int,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """y = dequantize(clamp(requantize(conv(quantize(x), codes) + bias))): integer inside, float outside.

    A ReLU that follows the convolution is part of it when y_zero is 0: the clamp at zero is the ReLU.

    Args:
        x: float [N, C, *spatial].
        codes: int8 [out, C / groups, *kernel], in -127 ... 127.
        scales: float32 [out].
        bias: float32 [out] or None; rounded to int32 multiples of x_scale * scales.
        pads: begins, then ends, per spatial axis (as in ONNX).
    """
    rank = codes.dim() - 2
    q = quantized(x, x_scale, x_zero)
    if any(pads):
        ordered = [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])]
        q = torch.nn.functional.pad(q, ordered)
    accumulated = _CONVOLUTIONS[rank](q, codes.double(), None, stride, 0, dilation, groups)  # exact in float64
    unit = scales.double() * x_scale
    columns = [-1] + [1] * rank
    if bias is not None:
        accumulated = accumulated + torch.round(bias.double() / unit).reshape(columns)
    levels = torch.round(accumulated * (unit / y_scale).reshape(columns)) + y_zero
    return ((levels.clamp(0, 255) - y_zero) * y_scale).to(x.dtype)


@conv_w8a8.cost
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero: int,
    y_scale: float,
    y_zero: int,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    groups: int,
) -> Cost:
    from fxopt.ir.graph import hint

    rank = codes.dim() - 2
    positions = hint(x.shape[0])
    for axis in range(rank):
        size = hint(x.shape[2 + axis]) + pads[axis] + pads[axis + rank]
        positions *= (size - dilation[axis] * (codes.shape[2 + axis] - 1) - 1) // stride[axis] + 1
    moved = 1
    for dim in x.shape:
        moved *= hint(dim)
    out = codes.shape[0]
    return Cost(
        2.0 * positions * codes.numel(), moved + codes.numel() + positions * out, "int8", conv_kind(codes.shape), 1
    )


@conv_w8a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    cases = (
        ((2, 3, 8, 8), (4, 3, 3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 1),
        ((1, 4, 9, 7), (4, 1, 3, 3), [2, 1], [0, 1, 1, 2], [1, 2], 4),
        ((2, 4, 11), (6, 2, 3), [2], [1, 0], [1], 2),
        ((0, 3, 8, 8), (4, 3, 1, 1), [1, 1], [0, 0, 0, 0], [1, 1], 1),
    )
    for shape, kernel, stride, pads, dilation, groups in cases:
        x = torch.randn(shape, generator=generator)
        codes = torch.randint(-127, 128, kernel, generator=generator, dtype=torch.int8)
        scales = torch.rand(kernel[0], generator=generator) * 0.01 + 1e-3
        for bias, zero in ((torch.randn(kernel[0], generator=generator), 0), (None, 120)):
            yield x, codes, scales, bias, 0.03, 128, 0.05, zero, stride, pads, dilation, groups
