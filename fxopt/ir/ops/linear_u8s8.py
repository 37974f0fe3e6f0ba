"""8-bit linears on codes that are rounded already, with what follows them; and the operators that make such codes.

Codes are uint8, value = (code - zero) / inverse, with `inverse` per channel: a scaling of the channels before the
rounding (SmoothQuant; Xiao et al., 2023) costs nothing then. Layer norm: Ba et al. (2016).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.ops.linear_w8a8 import linear_w8a8
from fxopt.ir.target import Cost

EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "residual", "layer_norm")


@op
def quantize_u8(x: Tensor, inverse: Tensor, zero: int) -> Tensor:
    """The codes round(x * inverse) + zero, saturated to 0 ... 255, as uint8 of x's shape.

    Args:
        x: float [..., channels].
        inverse: float32 [channels].
    """
    return (torch.round(x * inverse.to(x.dtype)) + zero).clamp(0, 255).to(torch.uint8)


@op
def layer_norm_u8(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, inverse: Tensor, zero: int) -> Tensor:
    """`quantize_u8` of the layer norm over the last axis; gamma, beta and inverse are float32 [channels]."""
    return quantize_u8.function(_norm(x, gamma, beta, eps), inverse, zero)


@op
def linear_u8s8(
    q: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    zero: int,
    epilogue: str,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> Tensor:
    """y = epilogue((q - zero) @ codes.T * scales + bias), float32 [..., out].

    Args:
        q: uint8 [..., in].
        codes: int8 [out, in], in -127 ... 127.
        scales: float32 [out]: those of the weight times that of q.
        bias: float32 [out].
        epilogue: "none", "relu", "gelu", "gelu_tanh", "residual" (plus `residual`), or "layer_norm" (of that sum).
        residual: float32 [..., out].
        gamma, beta: float32 [out], of the layer norm.
    """
    sums = torch.matmul(q.double() - zero, codes.double().t())  # exact
    y = sums.to(torch.float32) * scales + bias
    if epilogue == "relu":
        return torch.relu(y)
    if epilogue in ("gelu", "gelu_tanh"):
        return torch.nn.functional.gelu(y, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    if epilogue in ("residual", "layer_norm"):
        assert residual is not None
        y = y + residual
    if epilogue == "layer_norm":
        assert gamma is not None and beta is not None
        return _norm(y, gamma, beta, eps)
    return y


def _norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, gamma.shape, gamma.to(x.dtype), beta.to(x.dtype), eps)


def _rounding(x: Tensor) -> Cost:
    from fxopt.ir.graph import hint

    count = math.prod(hint(dim) for dim in x.shape)
    return Cost(float(4 * count), float(count * (x.dtype.itemsize + 1)), kind="elementwise", launches=1)


@quantize_u8.cost
def _(x: Tensor, inverse: Tensor, zero: int) -> Cost:
    return _rounding(x)


@layer_norm_u8.cost
def _(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, inverse: Tensor, zero: int) -> Cost:
    return _rounding(x)


@linear_u8s8.cost
def _(
    q: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    zero: int,
    epilogue: str,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> Cost:
    return linear_w8a8.cost_of(q, codes, scales, bias, 1.0, 0)


def _operands() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """q, codes, scales, bias, and a residual and a gamma of the result's size."""
    generator = torch.Generator().manual_seed(0)
    for shape, out in (((4, 16), 8), ((2, 3, 20), 5), ((1, 64), 48), ((2, 5, 7, 12), 3), ((130, 8), 65)):
        q = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        codes = torch.randint(-127, 128, (out, shape[-1]), generator=generator, dtype=torch.int8)
        scales = torch.rand(out, generator=generator) * 1e-4 + 1e-5
        bias, gamma = torch.randn(out, generator=generator), torch.rand(out, generator=generator) + 0.5
        yield q, codes, scales, bias, torch.randn(*shape[:-1], out, generator=generator), gamma


@linear_u8s8.samples
def _() -> Iterator[tuple[Any, ...]]:
    for q, codes, scales, bias, residual, gamma in _operands():
        for epilogue in EPILOGUES:
            added = residual if epilogue in ("residual", "layer_norm") else None
            norm = (gamma, bias) if epilogue == "layer_norm" else (None, None)
            yield q, codes, scales, bias, 131, epilogue, added, *norm, 1e-5


@quantize_u8.samples
def _() -> Iterator[tuple[Any, ...]]:
    for _, _, _, _, x, gamma in _operands():
        yield x, gamma * 40, 120
        yield x, torch.full_like(gamma, 50.0), 128


@layer_norm_u8.samples
def _() -> Iterator[tuple[Any, ...]]:
    for _, _, _, bias, x, gamma in _operands():
        yield x, gamma, bias, 1e-5, gamma * 40, 120
