"""Exact integer products: MatMulInteger, ConvInteger, QLinearMatMul, QLinearConv.

Products are accumulated in float64, which is exact while |a| * |b| * K < 2**53 (8-bit operands: K < 2**37) and runs on
the fast matrix kernels; the sum is then taken modulo 2**32, as the int32 accumulator of the specification does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.references.common import along, require
from fxopt.ir.onnx.references.conv import convolve
from fxopt.ir.onnx.references.quantize import RANGES
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_NO_OVERFLOW = 2**15  # so many products of 8-bit differences (at most 255 * 255 each) fit in int32


def centred(x: Tensor, zero_point: Tensor | None) -> Tensor:
    """x - zero_point of 8-bit numbers as float64."""
    require(x.dtype in (torch.uint8, torch.int8), f"an integer product of {x.dtype} has no torch reference")
    if zero_point is None:
        return x.to(torch.float64)
    return (x.to(torch.int16) - zero_point.to(torch.int16)).to(torch.float64)


def to_int32(total: Tensor, terms: Any) -> Tensor:
    """An integral float64 sum of 8-bit products as int32, wrapping around where it overflows."""
    if isinstance(terms, int) and terms <= _NO_OVERFLOW:
        return total.to(torch.int32)
    return total.to(torch.int64).to(torch.int32)


def per_row(parameter: Tensor) -> Tensor:
    """A vector of scales or zero points of the left operand: one per row."""
    return parameter.unsqueeze(-1) if parameter.dim() == 1 and parameter.shape[0] != 1 else parameter


def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """(a - a_zero_point) @ (b - b_zero_point) in int32."""
    a_zero = None if a_zero_point is None else per_row(a_zero_point)
    product = torch.matmul(centred(a, a_zero), centred(b, b_zero_point))
    return to_int32(product, a.shape[-1])


@operators.reference("MatMulInteger")
def matmul_integer_reference(
    call: Call, a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """(a - a_zero_point) @ (b - b_zero_point) in int32."""
    return matmul_integer(a, b, a_zero_point, b_zero_point)


def requantize(total: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """saturate(round(total * scale) + zero_point) in the type of the zero point."""
    require(zero_point.dtype in RANGES, f"requantization to {zero_point.dtype} has no torch reference")
    low, high = RANGES[zero_point.dtype]
    rounded = torch.round(total.to(torch.float64) * scale.to(torch.float64))
    return torch.clamp(rounded + zero_point.to(torch.float64), low, high).to(torch.int32).to(zero_point.dtype)


@operators.reference("QLinearMatMul")
def qlinear_matmul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """quantize(dequantize(a) @ dequantize(b)), with an exact integer product."""
    require(y_scale.numel() == 1, "QLinearMatMul with a scale per row of y has no torch reference")
    total = matmul_integer(a, b, a_zero_point, b_zero_point)
    return requantize(total, per_row(a_scale) * b_scale / y_scale, y_zero_point)


def conv_integer(
    x: Tensor, w: Tensor, x_zero_point: Tensor | None, w_zero_point: Tensor | None, attributes: dict[str, Any]
) -> Tensor:
    """The convolution of (x - x_zero_point) with (w - w_zero_point) in int32; padding is with zero after the shift."""
    if w_zero_point is not None and w_zero_point.dim() == 1:
        w_zero_point = along(w_zero_point, w.dim(), 0)
    if x_zero_point is not None:
        x_zero_point = x_zero_point.reshape(())
    total = convolve(centred(x, x_zero_point), centred(w, w_zero_point), None, **attributes)
    terms: Any = 1
    for size in w.shape[1:]:
        terms = terms * size
    return to_int32(total, terms)


@operators.reference("ConvInteger")
def conv_integer_reference(
    call: Call,
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """The convolution of (x - x_zero_point) with (w - w_zero_point) in int32."""
    return conv_integer(x, w, x_zero_point, w_zero_point, attributes)


@operators.reference("QLinearConv")
def qlinear_conv(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    """quantize(conv(dequantize(x), dequantize(w)) + bias * x_scale * w_scale), with an exact integer convolution."""
    total = conv_integer(x, w, x_zero_point, w_zero_point, attributes)
    if bias is not None:
        total = total + along(bias, x.dim(), 1)
    if w_scale.dim() == 1:
        w_scale = along(w_scale, x.dim(), 1)
    scale = x_scale.reshape(()) * w_scale / y_scale.reshape(())
    return requantize(total, scale, y_zero_point.reshape(()))
