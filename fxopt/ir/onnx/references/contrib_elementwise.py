"""Activations and normalisations of the domain `com.microsoft` (contributed operators of ONNX Runtime)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.common import at_least_float32, first
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")


@operators.reference("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    """x * Phi(x)."""
    return F.gelu(x)


@operators.reference("BiasGelu")
def bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias)."""
    return F.gelu(x + bias)


@operators.reference("FastGelu")
def fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh approximation of gelu(x + bias)."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operators.reference("QuickGelu")
def quick_gelu(call: Call, x: Tensor, alpha: float = 1.702) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(alpha * x)


def _total(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    total = x + skip
    return total if bias is None else total + bias


@operators.reference("SkipLayerNormalization")
def skip_layer_normalization(
    call: Call,
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float = 1e-12,
) -> Any:
    """layer_norm(x + skip + bias) * gamma + beta; further outputs: mean, 1 / deviation, the sum that is normalised."""
    total = _total(x, skip, bias)
    if call.outputs == 1:
        return F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    wide = at_least_float32(total)
    mean = wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(wide.var(-1, correction=0, keepdim=True) + epsilon)
    return first(call, F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), mean, inverse, total)


@operators.reference("SkipSimplifiedLayerNormalization")
def skip_rms_normalization(
    call: Call, x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, epsilon: float = 1e-12
) -> Any:
    """rms_norm(x + skip + bias) * gamma; further outputs: mean, 1 / root mean square, the sum that is normalised."""
    total = _total(x, skip, bias)
    wide = at_least_float32(total)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    y = (wide * inverse).to(total.dtype) * gamma
    return first(call, y, wide.mean(-1, keepdim=True), inverse, total)
