"""Convolutions and matrix products with a fused activation, and channels-last forms, of the domain `com.microsoft`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.references.contrib_matmul import fused_matmul
from fxopt.ir.onnx.references.conv import convolve
from fxopt.ir.onnx.references.matmul import gemm
from fxopt.ir.onnx.references.pool import max_pool
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")

Parameters = Sequence[float]

# activation -> (number of parameters, function of x and these)
_ACTIVATIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "": (0, lambda x: x),
    "Relu": (0, torch.relu),
    "Sigmoid": (0, torch.sigmoid),
    "Tanh": (0, torch.tanh),
    "Softplus": (0, lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    "Softsign": (0, F.softsign),
    "LeakyRelu": (1, lambda x, alpha: F.leaky_relu(x, alpha)),
    "Elu": (1, lambda x, alpha: F.elu(x, alpha)),
    "ThresholdedRelu": (1, lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x))),
    "Clip": (2, lambda x, low, high: torch.clamp(x, low, high)),
    "HardSigmoid": (2, lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1)),
    "ScaledTanh": (2, lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
    "ParametricSoftplus": (2, lambda x, a, b: a * torch.logaddexp(b * x, torch.zeros_like(x))),
    "Selu": (2, lambda x, alpha, gamma: gamma * torch.where(x > 0, x, alpha * torch.expm1(x))),
}


def activated(x: Tensor, name: str | None, parameters: Parameters) -> Tensor:
    """The named activation of x; its parameters come in the order of its attributes (alpha, beta or minimum, maximum).

    Raises:
        MissingReference: the activation is unknown, or has too few parameters.
    """
    known = _ACTIVATIONS.get(str(name or ""))
    if known is None:
        raise MissingReference(f"a fused activation {name!r} has no torch reference")
    count, function = known
    require(len(parameters) >= count, f"the fused activation {name!r} needs {count} parameters, not {len(parameters)}")
    return function(x, *parameters[:count])


def _given(*parameters: float | None) -> list[float]:
    """The parameters that the node has."""
    return [parameter for parameter in parameters if parameter is not None]


def to_channels_first(x: Tensor) -> Tensor:
    """[batch, space..., channels] as [batch, channels, space...]."""
    return x.movedim(-1, 1)


def to_channels_last(x: Tensor) -> Tensor:
    """[batch, channels, space...] as [batch, space..., channels]."""
    return x.movedim(1, -1)


@operators.reference("FusedConv")
def fused_conv(
    call: Call,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    activation: str | None = None,
    activation_params: Parameters = (),
    **attributes: Any,
) -> Tensor:
    """activation(conv(x, w) + bias + z)."""
    y = convolve(x, w, bias, **attributes)
    return activated(y if z is None else y + z, activation, activation_params)


@operators.reference("NhwcFusedConv")
def nhwc_fused_conv(
    call: Call,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    activation: str | None = None,
    activation_params: Parameters = (),
    **attributes: Any,
) -> Tensor:
    """activation(conv(x, w) + bias + z) with x, z and the result channels last, and w as in Conv."""
    y = to_channels_last(convolve(to_channels_first(x), w, bias, **attributes))
    return activated(y if z is None else y + z, activation, activation_params)


@operators.reference("NhwcMaxPool")
def nhwc_max_pool(call: Call, x: Tensor, **attributes: Any) -> Tensor:
    """MaxPool of a tensor with its channels last."""
    y: Tensor = max_pool(Call(12), to_channels_first(x), **attributes)
    return to_channels_last(y)


@operators.reference("FusedGemm")
def fused_gemm(
    call: Call,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    activation: str | None = None,
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    **attributes: Any,
) -> Tensor:
    """activation(alpha * a' @ b' + beta * c)."""
    y: Tensor = gemm(Call(13), a, b, c, **attributes)
    return activated(y, activation, _given(activation_alpha, activation_beta, activation_gamma))


@operators.reference("FusedMatMulActivation")
def fused_matmul_activation(
    call: Call,
    a: Tensor,
    b: Tensor,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    activation_axis: int = -1,
    **attributes: Any,
) -> Tensor:
    """activation(alpha * a' @ b'); the activation may be Softmax, over `activation_axis`."""
    y: Tensor = fused_matmul(call, a, b, **attributes)
    if str(activation) == "Softmax":
        return torch.softmax(y, activation_axis)
    return activated(y, activation, _given(activation_alpha, activation_beta, activation_gamma))


@operators.reference("GemmFastGelu")
def gemm_fast_gelu(call: Call, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh approximation of gelu(x @ w + bias)."""
    product = torch.matmul(x, w)
    return F.gelu(product if bias is None else product + bias, approximate="tanh")
