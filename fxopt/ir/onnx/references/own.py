"""Operators of our own custom-operator library, so that saved results can be read, run in torch and compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxopt.ir.onnx.registry import Call, Operators
from fxopt.ir.ops.attention_u8 import attention_u8
from fxopt.ir.ops.linear_u8s8 import EPILOGUES, layer_norm_u8, linear_u8s8, quantize_u8

operators = Operators("fxopt")
PANEL = 64  # rows


@operators.reference("FusedLinearInt8")
def fused_linear_int8(
    call: Call,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor,
    inverse: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    x_zero: int = 0,
    y_zero: int = 0,
    epilogue: int = 0,
    floats: int = 1,
    codes: int = 0,
    eps: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_u8s8`, and (or, where only they are asked for) its codes."""
    y = linear_u8s8.function(x, weight, scales, bias, x_zero, EPILOGUES[epilogue], residual, gamma, beta, eps)
    if call.outputs == 1:
        return y
    assert inverse is not None
    return y, quantize_u8.function(y, inverse, y_zero)


@operators.reference("SparseLinearInt8")
def sparse_linear_int8(
    call: Call,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor,
    inverse: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    x_zero: int = 0,
    y_zero: int = 0,
    epilogue: int = 0,
    floats: int = 1,
    codes: int = 0,
    eps: float = 0.0,
    x_panels: int = 0,
    codes_panels: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sparse_linear_u8s8`, and its codes; x and the codes may lie as panels."""
    rows = as_rows(x) if x_panels else x
    y = linear_u8s8.function(rows, weight, scales, bias, x_zero, EPILOGUES[epilogue], residual, gamma, beta, eps)
    if call.outputs == 1:
        return y
    assert inverse is not None
    made = quantize_u8.function(y, inverse, y_zero)
    return y, as_panels(made) if codes_panels else made


def as_panels(rows: Tensor) -> Tensor:
    """Codes [..., n] with every 64 rows feature-major, one such panel behind the other, in the same shape.

    The rows that do not fill a panel stay as they are, behind the panels.
    """
    size = rows.shape[-1]
    return _turned(rows, (PANEL, size))


def as_rows(panels: Tensor) -> Tensor:
    """What `as_panels` was made of."""
    size = panels.shape[-1]
    return _turned(panels, (size, PANEL))


def _turned(x: Tensor, panel: tuple[int, int]) -> Tensor:
    count = math.prod(panel)
    flat = x.reshape(-1)
    whole = flat.shape[0] // count * count if count else 0
    turned = flat[:whole].reshape(-1, *panel).transpose(1, 2).reshape(-1)
    return torch.cat([turned, flat[whole:]]).reshape(x.shape)


@operators.reference("QuantizeRows")
def quantize_rows(call: Call, x: Tensor, inverse: Tensor, zero: int = 0) -> Tensor:
    """`quantize_u8`."""
    return quantize_u8.function(x, inverse, zero)


@operators.reference("LayerNormQuantizeRows")
def layer_norm_quantize_rows(
    call: Call, x: Tensor, inverse: Tensor, gamma: Tensor, beta: Tensor, zero: int = 0, eps: float = 0.0
) -> Tensor:
    """`layer_norm_u8`."""
    return layer_norm_u8.function(x, gamma, beta, eps, inverse, zero)


@operators.reference("AttentionInt8")
def attention_int8(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inverse: Tensor,
    mask: Tensor | None = None,
    num_heads: int = 1,
    factor: float = 1.0,
    zero: int = 0,
) -> Tensor:
    """`attention_u8`."""
    return attention_u8.function(q, k, v, inverse, mask, num_heads, factor, zero)
