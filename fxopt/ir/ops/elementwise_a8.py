"""Element-wise operators between 8-bit values (asymmetric, per tensor), as integer kernels compute them.

Source: QLinearAdd and QLinearMul of ONNX Runtime's contrib operators; Krishnamoorthi (2018) for the affine levels.
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
def add_a8(
    x: Tensor,
    other: Tensor,
    x_scale: float,
    x_zero: int,
    other_scale: float,
    other_zero: int,
    y_scale: float,
    y_zero: int,
) -> Tensor:
    """y = round(quantize(x) + quantize(other)) on the levels of y, with broadcasting: integer outside, float between.

    A ReLU that follows is part of it when y_zero is 0: the clamp at zero is the ReLU.

    Args:
        x, other: float; `scale` and `zero` give the 256 levels scale * (0 - zero ... 255 - zero) of each.
    """
    total = quantized(x, x_scale, x_zero) * x_scale + quantized(other, other_scale, other_zero) * other_scale
    return on_levels(total, y_scale, y_zero, x.dtype)


@op
def mul_a8(
    x: Tensor,
    other: Tensor,
    x_scale: float,
    x_zero: int,
    other_scale: float,
    other_zero: int,
    y_scale: float,
    y_zero: int,
) -> Tensor:
    """y = round(quantize(x) * quantize(other)) on the levels of y, with broadcasting; arguments as in `add_a8`."""
    product = quantized(x, x_scale, x_zero) * quantized(other, other_scale, other_zero)
    return on_levels(product * (x_scale * other_scale), y_scale, y_zero, x.dtype)


_OPERATIONS = 4.0  # per element: two conversions, the operator, rounding


def _cost(x: Tensor, other: Tensor) -> Cost:
    from fxopt.ir.graph import hint

    counts = []
    for shape in (x.shape, other.shape, torch.broadcast_shapes(x.shape, other.shape)):  # type: ignore[no-untyped-call]
        count = 1
        for dim in shape:
            count *= hint(dim)
        counts.append(count)
    return Cost(_OPERATIONS * counts[-1], float(sum(counts)), "int8", "elementwise", 1)


@add_a8.cost
def _(
    x: Tensor,
    other: Tensor,
    x_scale: float,
    x_zero: int,
    other_scale: float,
    other_zero: int,
    y_scale: float,
    y_zero: int,
) -> Cost:
    return _cost(x, other)


@mul_a8.cost
def _(
    x: Tensor,
    other: Tensor,
    x_scale: float,
    x_zero: int,
    other_scale: float,
    other_zero: int,
    y_scale: float,
    y_zero: int,
) -> Cost:
    return _cost(x, other)


def _operands() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, other in (((2, 3, 5, 7), (2, 3, 5, 7)), ((2, 8, 4, 4), (2, 8, 1, 1)), ((0, 4), (0, 4)), ((33,), (33,))):
        x, y = torch.randn(shape, generator=generator), torch.randn(other, generator=generator)
        for zero in (0, 117):
            yield x, y, 0.02133, 128, 0.01747, 100, 0.03011, zero
    yield torch.randn(4, 6, generator=generator).t(), torch.randn(6, 4, generator=generator), 0.02, 0, 0.02, 255, 0.1, 9


@add_a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    yield from _operands()


@mul_a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    yield from _operands()
