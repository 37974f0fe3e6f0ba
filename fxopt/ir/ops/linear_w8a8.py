"""Linear with 8-bit weights (symmetric, per output channel) and 8-bit activations (asymmetric, per tensor).

Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), equations for affine
and symmetric quantisation; `DynamicQuantizeLinear` of the ONNX specification for the dynamic range.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.target import Cost


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (both zero-dimensional, of the dtype of x) that map x onto 0 ... 255, zero exact."""
    if x.numel() == 0:
        return x.new_ones(()), x.new_zeros(())
    low = x.amin().clamp(max=0)
    high = x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale).clamp(0, 255)


def quantized(x: Tensor, scale: Tensor | float, zero: Tensor | float) -> Tensor:
    """round(x / scale) + zero, saturated to 0 ... 255, minus zero: the integers as a float64 tensor."""
    return (torch.round(x / scale) + zero).clamp(0, 255).double() - zero


def on_levels(y: Tensor, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
    """The nearest of the values scale * (0 - zero ... 255 - zero), saturated; y is float64."""
    return (((torch.round(y / scale) + zero).clamp(0, 255) - zero) * scale).to(dtype)


def _linear(q: Tensor, scale: Tensor | float, codes: Tensor, scales: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    accumulated = torch.matmul(q, codes.double().t())  # exact: |sum| <= 255 * 127 * in < 2^53
    y = accumulated.to(x.dtype) * (scales.to(x.dtype) * scale)
    return y if bias is None else y + bias.to(x.dtype)


@op
def linear_w8a8_dynamic(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """y = dequantize(quantize(x) @ codes.T) + bias, with the range of x found at run time.

    Args:
        x: float [..., in].
        codes: int8 [out, in], in -127 ... 127.
        scales: float32 [out]; weight = codes * scales[:, None].
        bias: float [out] or None.
    """
    scale, zero = dynamic_range(x)
    return _linear(quantized(x, scale, zero), scale, codes, scales, bias, x)


@op
def linear_w8a8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float, x_zero: int) -> Tensor:
    """y = dequantize(quantize(x) @ codes.T) + bias, with the calibrated range x_scale * (0 - x_zero ... 255 - x_zero).

    Args:
        x: float [..., in].
        codes: int8 [out, in], in -127 ... 127.
        scales: float32 [out]; weight = codes * scales[:, None].
        bias: float [out] or None.
    """
    return _linear(quantized(x, x_scale, x_zero), x_scale, codes, scales, bias, x)


# Finding the range of x and rounding it, in operations of the product's own rate per element of x: fitted on the rows
# of benchmarks/host_rates.py.
_ROUNDING = {"dynamic": 64.0, "static": 43.0}


def eight_bit_cost(x: Tensor, codes: Tensor, kind: str, dtype: str = "int8") -> Cost:
    """Work of a linear whose operands have 8 bits each; `kind` is "dynamic" or "static"."""
    from fxopt.ir.graph import hint

    rows = 1
    for dim in x.shape[:-1]:
        rows *= hint(dim)
    out, inner = codes.shape
    size = x.dtype.itemsize
    moved = rows * inner * (size + 1) + out * inner + rows * out * size
    macs = float(rows * out * inner)
    return Cost(2 * macs + _ROUNDING[kind] * rows * inner, moved, dtype, "linear", 2, macs)


@linear_w8a8_dynamic.cost
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Cost:
    return eight_bit_cost(x, codes, "dynamic")


@linear_w8a8.cost
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float, x_zero: int) -> Cost:
    return eight_bit_cost(x, codes, "static")


def _operands() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    for shape, out in (((4, 16), 8), ((2, 3, 17), 5), ((0, 8), 4), ((1, 64), 1), ((2, 5, 7, 9), 3)):
        x = torch.randn(shape, generator=generator)
        codes = torch.randint(-127, 128, (out, shape[-1]), generator=generator, dtype=torch.int8)
        scales = torch.rand(out, generator=generator) * 0.02 + 1e-3
        yield x, codes, scales, torch.randn(out, generator=generator)
        yield x.transpose(0, -2).contiguous().transpose(0, -2), codes, scales, None


@linear_w8a8_dynamic.samples
def _() -> Iterator[tuple[Any, ...]]:
    yield from _operands()


@linear_w8a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    for operands in _operands():
        yield (*operands, 0.03, 128)
