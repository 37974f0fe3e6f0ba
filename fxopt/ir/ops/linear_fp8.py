"""Linear with float8 (e4m3) weights, scaled per output channel, and float8 activations, scaled per row or per tensor.

Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0; Micikevicius et al., "FP8 formats for deep
learning" (2022). E4M3 has no infinities; what is above its largest number, 448, saturates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.ops.linear_w8a8 import eight_bit_cost
from fxopt.ir.target import Cost

LARGEST = 448.0  # of e4m3
_LEAST_STEP = torch.finfo(torch.float32).tiny  # a row of zeros has no range


def row_steps(x: Tensor) -> Tensor:
    """The scale of each row, float32 [..., 1]: its largest magnitude becomes the largest float8 number."""
    return (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=_LEAST_STEP)


def to_e4m3(x: Tensor, step: Tensor | float) -> Tensor:
    """x / step rounded to float8 (to nearest, ties to even), saturated; NaN stays NaN."""
    return (x.float() / step).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


@op
def linear_fp8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float | None) -> Tensor:
    """y = (float8(x / step) @ codes.T) * step * scales + bias, with sums in float32.

    Args:
        x: float [..., in], in > 0. A row that holds an infinity or NaN gives NaN, unless `x_scale` is given: then
            infinities saturate.
        codes: float8_e4m3fn [out, in].
        scales: float32 [out]; weight = codes * scales[:, None].
        bias: float [out] or None.
        x_scale: the step of all rows; None: that of each row is its largest magnitude / 448.
    """
    step = row_steps(x) if x_scale is None else x_scale
    sums = torch.matmul(to_e4m3(x, step).float(), codes.float().t())
    y = sums * step * scales.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@linear_fp8.cost
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float | None) -> Cost:
    return eight_bit_cost(x, codes, "dynamic" if x_scale is None else "static", "float8")


@linear_fp8.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, out in (((4, 16), 8), ((2, 3, 17), 5), ((0, 8), 4), ((1, 64), 1), ((2, 5, 7, 9), 3), ((18, 32), 16)):
        x = torch.randn(shape, generator=generator)
        codes = (torch.randn(out, shape[-1], generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales = torch.rand(out, generator=generator) * 0.02 + 1e-3
        yield x, codes, scales, torch.randn(out, generator=generator), None
        yield x.transpose(0, -2).contiguous().transpose(0, -2), codes, scales, None, 0.008
