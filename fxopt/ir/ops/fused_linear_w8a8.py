"""Linears on bytes with what follows them: activation, or residual and layer norm, and rounding to the next bytes.

In an encoder whose scales are static, values between its linears are bytes, and floats only on the residual path.
`inverse` maps a float result onto bytes: one factor per output, so that it may hold a smoothing vector too.

Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018); Xiao et al.,
"SmoothQuant" (2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import UnknownName
from fxopt.ir.op import op
from fxopt.ir.target import Cost

ACTIVATIONS = ("none", "relu", "gelu")


def _linear(x: Tensor, x_zero: int, codes: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    sums = torch.matmul(x.double() - x_zero, codes.double().t())  # exact: |sum| <= 255 * 127 * in < 2^53
    return sums * scales.double() + bias.double()


def _activated(y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return y
    if activation == "relu":
        return y.relu()
    if activation == "gelu":
        return torch.nn.functional.gelu(y)
    raise UnknownName(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")


def _bytes(y: Tensor, inverse: Tensor, y_zero: int) -> Tensor:
    return (torch.round(y * inverse.double()) + y_zero).clamp(0, 255).to(torch.uint8)


@op
def fused_linear_w8a8(x: Tensor, x_zero: int, codes: Tensor, scales: Tensor, bias: Tensor, activation: str) -> Tensor:
    """y = activation((x - x_zero) @ codes.T * scales + bias) as float32.

    Args:
        x: uint8 [..., in].
        codes: int8 [out, in], in -127 ... 127.
        scales: float32 [out], scale of the weight times scale of x.
        bias: float32 [out].
        activation: "none", "relu" or "gelu".
    """
    return _activated(_linear(x, x_zero, codes, scales, bias), activation).float()


@op
def fused_linear_w8a8_bytes(
    x: Tensor,
    x_zero: int,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    activation: str,
    inverse: Tensor,
    y_zero: int,
) -> Tensor:
    """round(y * inverse) + y_zero saturated to 0 ... 255, with y of `fused_linear_w8a8`: uint8 [..., out].

    Args:
        inverse: float32 [out].
    """
    return _bytes(_activated(_linear(x, x_zero, codes, scales, bias), activation), inverse, y_zero)


@op
def fused_linear_norm_w8a8(
    x: Tensor,
    x_zero: int,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    inverse: Tensor,
    y_zero: int,
) -> tuple[Tensor, Tensor]:
    """y = layer_norm((x - x_zero) @ codes.T * scales + bias + residual) * weight + shift, and its bytes.

    Args:
        residual: float32 [..., out].
        weight, shift, inverse: float32 [out].

    Returns:
        y, float32 [..., out], and round(y * inverse) + y_zero saturated to 0 ... 255, uint8 [..., out].
    """
    total = _linear(x, x_zero, codes, scales, bias) + residual.double()
    y = torch.nn.functional.layer_norm(total, total.shape[-1:], weight.double(), shift.double(), eps)
    return y.float(), _bytes(y, inverse, y_zero)


def _cost(x: Tensor, codes: Tensor, after: float, result_bytes: int) -> Cost:
    from fxopt.ir.graph import hint

    rows = 1
    for dim in x.shape[:-1]:
        rows *= hint(dim)
    out, inner = codes.shape
    macs = float(rows * out * inner)
    return Cost(
        2 * macs + after * rows * out, rows * (inner + out * result_bytes) + out * inner, "int8", "linear", 2, macs
    )


# Operations of the product's own rate per output, from benchmarks/fused_int8.py.
_AFTER = {"none": 32.0, "relu": 32.0, "gelu": 150.0, "norm": 300.0}


@fused_linear_w8a8.cost
def _(x: Tensor, x_zero: int, codes: Tensor, scales: Tensor, bias: Tensor, activation: str) -> Cost:
    return _cost(x, codes, _AFTER[activation], 4)


@fused_linear_w8a8_bytes.cost
def _(
    x: Tensor,
    x_zero: int,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    activation: str,
    inverse: Tensor,
    y_zero: int,
) -> Cost:
    return _cost(x, codes, _AFTER[activation], 1)


@fused_linear_norm_w8a8.cost
def _(
    x: Tensor,
    x_zero: int,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    inverse: Tensor,
    y_zero: int,
) -> Cost:
    return _cost(x, codes, _AFTER["norm"], 9)


def _operands() -> Iterator[tuple[Tensor, int, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for shape, out in (((4, 16), 8), ((2, 3, 20), 5), ((0, 8), 4), ((1, 64), 1), ((2, 5, 7, 12), 51)):
        x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        codes = torch.randint(-127, 128, (out, shape[-1]), generator=generator, dtype=torch.int8)
        scales = torch.rand(out, generator=generator) * 2e-4 + 1e-5
        bias = torch.randn(out, generator=generator)
        yield x, 117, codes, scales, bias
        yield x.transpose(0, -2).contiguous().transpose(0, -2), 0, codes, scales, bias


@fused_linear_w8a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    for operands in _operands():
        yield from ((*operands, activation) for activation in ACTIVATIONS)


@fused_linear_w8a8_bytes.samples
def _() -> Iterator[tuple[Any, ...]]:
    for operands in _operands():
        inverse = torch.rand(len(operands[4]), generator=torch.Generator().manual_seed(1)) * 40 + 10
        yield from ((*operands, activation, inverse, 30) for activation in ACTIVATIONS)


@fused_linear_norm_w8a8.samples
def _() -> Iterator[tuple[Any, ...]]:
    for operands in _operands():
        generator = torch.Generator().manual_seed(2)
        x, out = operands[0], len(operands[4])
        residual = torch.randn(*x.shape[:-1], out, generator=generator)
        weight, shift, inverse = (torch.rand(out, generator=generator) + 0.5 for _ in range(3))
        yield (*operands, residual, weight, shift, 1e-5, inverse * 40, 128)
