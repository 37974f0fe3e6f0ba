"""Activation functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("Relu")
def relu(call: Call, x: Tensor, consumed_inputs: list[int] | None = None) -> Tensor:
    """max(x, 0)."""
    return torch.relu(x)


@operators.reference("LeakyRelu")
def leaky_relu(call: Call, x: Tensor, alpha: float = 0.01, consumed_inputs: list[int] | None = None) -> Tensor:
    """x where x >= 0, else alpha * x."""
    return F.leaky_relu(x, alpha)


@operators.reference("PRelu")
def prelu(call: Call, x: Tensor, slope: Tensor, consumed_inputs: list[int] | None = None) -> Tensor:
    """x where x >= 0, else slope * x; below opset 7 the slope is per channel (axis 1)."""
    if call.version < 7 and slope.dim() == 1 and x.dim() > 2:
        slope = slope.reshape([-1] + [1] * (x.dim() - 2))
    return torch.where(x < 0, x * slope, x)


@operators.reference("Elu")
def elu(call: Call, x: Tensor, alpha: float = 1.0, consumed_inputs: list[int] | None = None) -> Tensor:
    """x where x >= 0, else alpha * (exp(x) - 1)."""
    return F.elu(x, alpha)


@operators.reference("Selu")
def selu(
    call: Call,
    x: Tensor,
    alpha: float | None = None,
    gamma: float | None = None,
    consumed_inputs: list[int] | None = None,
) -> Tensor:
    """gamma * (x where x > 0, else alpha * (exp(x) - 1))."""
    if alpha is None:
        alpha = 1.6732 if call.version < 6 else 1.67326319217681884765625
    if gamma is None:
        gamma = 1.0507 if call.version < 6 else 1.05070102214813232421875
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operators.reference("Celu")
def celu(call: Call, x: Tensor, alpha: float = 1.0) -> Tensor:
    """max(x, 0) + min(alpha * (exp(x / alpha) - 1), 0)."""
    return F.celu(x, alpha)


@operators.reference("HardSigmoid")
def hard_sigmoid(
    call: Call, x: Tensor, alpha: float = 0.2, beta: float = 0.5, consumed_inputs: list[int] | None = None
) -> Tensor:
    """max(0, min(1, alpha * x + beta))."""
    return torch.clamp(alpha * x + beta, 0, 1)


@operators.reference("HardSwish")
def hard_swish(call: Call, x: Tensor) -> Tensor:
    """x * max(0, min(1, x / 6 + 1/2))."""
    return F.hardswish(x)


@operators.reference("Gelu")
def gelu(call: Call, x: Tensor, approximate: str = "none") -> Tensor:
    """x * Phi(x), or its tanh approximation."""
    return F.gelu(x, approximate=str(approximate))


@operators.reference("Softplus")
def softplus(call: Call, x: Tensor) -> Tensor:
    """log(exp(x) + 1), with no cut-off for large x."""
    return torch.logaddexp(x, torch.zeros_like(x))


@operators.reference("Softsign")
def softsign(call: Call, x: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    return F.softsign(x)


@operators.reference("Mish")
def mish(call: Call, x: Tensor) -> Tensor:
    """x * tanh(softplus(x))."""
    return F.mish(x)


@operators.reference("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor, alpha: float = 1.0) -> Tensor:
    """x where x > alpha, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operators.reference("Shrink")
def shrink(call: Call, x: Tensor, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """x + bias where x < -lambd, x - bias where x > lambd, else 0."""
    positive = torch.where(x > lambd, x - bias, torch.zeros_like(x))
    return torch.where(x < -lambd, x + bias, positive).to(x.dtype)


@operators.reference("Swish")
def swish(call: Call, x: Tensor, alpha: float = 1.0) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operators.reference("SwiGLU")
def swiglu(call: Call, gate: Tensor, value: Tensor, alpha: float = 1.0) -> Tensor:
    """gate * sigmoid(alpha * gate) * value."""
    swished: Tensor = swish(call, gate, alpha)
    return swished * value
