"""Concatenation of 8-bit values (asymmetric, per tensor), each with levels of its own.

Source: QLinearConcat of ONNX Runtime's contrib operators.
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
def concat_a8(
    xs: list[Tensor], scales: list[float], zeros: list[int], axis: int, y_scale: float, y_zero: int
) -> Tensor:
    """y = concatenation of the quantised xs, each rounded again to the levels of y.

    Args:
        xs: float, of equal shapes except along `axis`; `scales` and `zeros` give the 256 levels of each.
    """
    parts = [quantized(x, scale, zero) * scale for x, scale, zero in zip(xs, scales, zeros, strict=True)]
    return on_levels(torch.cat(parts, axis), y_scale, y_zero, xs[0].dtype)


@concat_a8.cost
def _(xs: list[Tensor], scales: list[float], zeros: list[int], axis: int, y_scale: float, y_zero: int) -> Cost:
    from fxopt.ir.graph import hint

    total = 0
    for x in xs:
        count = 1
        for dim in x.shape:
            count *= hint(dim)
        total += count
    return Cost(float(total), 2.0 * total, "int8", "elementwise", 1)  # one look-up per element


@concat_a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shapes, axis in ((((2, 3, 4, 4), (2, 5, 4, 4)), 1), (((3, 2), (3, 0), (3, 7)), -1)):
        xs = [torch.randn(shape, generator=generator) for shape in shapes]
        scales, zeros = [0.02, 0.011, 0.03][: len(xs)], [128, 0, 77][: len(xs)]
        yield xs, scales, zeros, axis, 0.025, 110
