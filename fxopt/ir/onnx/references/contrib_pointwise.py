"""Pointwise operators of the domain `com.microsoft` that fuse a bias, a gate or a mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.lane import to_scalar
from fxopt.ir.onnx.references.common import at_least_float32, first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")


@operators.reference("BiasAdd")
def bias_add(call: Call, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """x + bias + skip."""
    return x + bias + skip


@operators.reference("BiasSplitGelu")
def bias_split_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """left * gelu(right) of the halves of x + bias."""
    left, right = (x + bias).chunk(2, -1)
    return left * F.gelu(right)


@operators.reference("BiasSoftmax")
def bias_softmax(call: Call, data: Tensor, bias: Tensor, axis: int = 1, is_inner_broadcast: int = 0) -> Tensor:
    """softmax(data + bias) over the axes from `axis` on, taken as one.

    The bias has the axes of the softmax, and before these some of the others: the first ones when
    `is_inner_broadcast`, the last ones otherwise; axes of size 1 hold the place of those it lacks.
    """
    axis %= data.dim()
    missing = data.dim() - bias.dim()
    if missing and is_inner_broadcast:
        lead = bias.dim() - (data.dim() - axis)
        bias = bias.reshape([*bias.shape[:lead], *[1] * missing, *bias.shape[lead:]])
    total = data + bias
    return torch.softmax(total.flatten(axis), axis).reshape(total.shape)


def _inference(ratio: Any, training_mode: Any) -> None:
    """Refuse a dropout that draws random numbers."""
    training = training_mode is not None and bool(to_scalar(training_mode))
    require(not training or (ratio is not None and float(to_scalar(ratio)) == 0), "dropout in training mode is random")


@operators.reference("BiasDropout", "BitmaskBiasDropout")
def bias_dropout(
    call: Call,
    data: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    ratio: Any = None,
    training_mode: Any = None,
    seed: int = 0,
) -> Tensor:
    """data + bias + residual: the operator at inference, without its mask."""
    _inference(ratio, training_mode)
    require(call.outputs == 1, "the mask of a fused dropout has no torch reference")
    total = data + bias
    return total if residual is None else total + residual


@operators.reference("BitmaskDropout")
def bitmask_dropout(call: Call, data: Tensor, ratio: Any = None, training_mode: Any = None, seed: int = 0) -> Tensor:
    """The data: the operator at inference, without its mask."""
    _inference(ratio, training_mode)
    require(call.outputs == 1, "the packed mask of BitmaskDropout has no torch reference")
    return data.clone()


@operators.reference("SwiGLU")
def swiglu(
    call: Call,
    gate: Tensor,
    up: Tensor | None = None,
    limit: float = 0.0,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    round_activation: int = 0,
) -> Tensor:
    """g * sigmoid(alpha * g) * (l + beta), with g at most `limit` and l within it; one input holds both halves."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    dtype = gate.dtype
    wide, linear = at_least_float32(gate), at_least_float32(up)
    if limit > 0:
        wide, linear = wide.clamp(max=limit), linear.clamp(-limit, limit)
    swished = wide * torch.sigmoid(activation_alpha * wide)
    if round_activation:
        swished = swished.to(dtype).to(wide.dtype)
    return (swished * (linear + activation_beta if activation_beta else linear)).to(dtype)


@operators.reference("ScaledSiLU")
def scaled_silu(call: Call, x: Tensor, scale: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """z * sigmoid(z) of z = scale * x (or alpha * x), rounded at every step."""
    factor = alpha if scale is None else scale.reshape(())
    z = (at_least_float32(x) * factor).to(x.dtype)
    return z * torch.sigmoid(z)


@operators.reference("GatedAdd")
def gated_add(call: Call, x: Tensor, y: Tensor, gate: Tensor, gate_weight: Tensor | None = None) -> Tensor:
    """x + y * gate with one gate per row; with a weight, the gate is sigmoid(gate @ weight)."""
    if gate_weight is not None:
        gate = torch.sigmoid(torch.matmul(gate, gate_weight))
    return x + y * gate


@operators.reference("LinearAttentionGate")
def linear_attention_gate(call: Call, a: Tensor, dt_bias: Tensor, decay_scale: Tensor, b: Tensor | None = None) -> Any:
    """decay_scale * softplus(a + dt_bias), and sigmoid(b)."""
    wide = at_least_float32(a) + dt_bias
    decay = (decay_scale * torch.logaddexp(wide, torch.zeros_like(wide))).to(a.dtype)
    return first(call, decay, None if b is None else torch.sigmoid(b))


@operators.reference("IsAllFinite")
def is_all_finite(call: Call, *values: Tensor, isinf_only: int = 0, isnan_only: int = 0) -> Tensor:
    """True when no element is infinite or not a number; attributes look for only one of the two."""
    test = torch.isinf if isinf_only else torch.isnan if isnan_only else lambda x: ~torch.isfinite(x)
    found = torch.stack([test(value).any() for value in values])
    return ~found.any()


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(at_least_float32(x).contiguous())


@operators.reference("ComplexMul")
def complex_mul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers, with real and imaginary parts in the last axis."""
    return torch.view_as_real(_complex(a) * _complex(b)).to(a.dtype)


@operators.reference("ComplexMulConj")
def complex_mul_conj(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """The product of a with the conjugate of b, with real and imaginary parts in the last axis."""
    return torch.view_as_real(_complex(a) * _complex(b).conj()).to(a.dtype)


@operators.reference("MulInteger")
def mul_integer(
    call: Call, a: Tensor, a_zero_point: Tensor | None = None, b: Tensor | None = None, b_zero_point: Any = None
) -> Tensor:
    """(a - a_zero_point) * (b - b_zero_point) in int32."""
    assert b is not None
    left = a.to(torch.int32) if a_zero_point is None else a.to(torch.int32) - a_zero_point.to(torch.int32)
    right = b.to(torch.int32) if b_zero_point is None else b.to(torch.int32) - b_zero_point.to(torch.int32)
    return left * right


@operators.reference("ReduceSumInteger")
def reduce_sum_integer(call: Call, data: Tensor, axes: list[int], keepdims: int = 1) -> Tensor:
    """The sum of 8-bit numbers over the axes, in 32 bits."""
    dtype = torch.uint32 if data.dtype == torch.uint8 else torch.int32
    return data.to(torch.int64).sum(list(axes), keepdim=bool(keepdims)).to(dtype)
