"""Operators of early ONNX drafts, in no version of its specification, which ONNX Runtime still runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.ir.onnx.references.common import along
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("Affine")
def affine(call: Call, x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha * x + beta."""
    return alpha * x + beta


@operators.reference("Scale")
def scale(call: Call, x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x."""
    return x * scale


@operators.reference("ScaledTanh")
def scaled_tanh(call: Call, x: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha * tanh(beta * x)."""
    return alpha * torch.tanh(beta * x)


@operators.reference("ParametricSoftplus")
def parametric_softplus(call: Call, x: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha * log(exp(beta * x) + 1)."""
    return alpha * torch.logaddexp(beta * x, torch.zeros_like(x))


@operators.reference("ImageScaler")
def image_scaler(call: Call, x: Tensor, bias: list[float], scale: float = 1.0) -> Tensor:
    """scale * x + a bias per channel."""
    return scale * x + along(torch.tensor(bias, dtype=x.dtype, device=x.device), x.dim(), 1)


@operators.reference("Crop")
def crop(call: Call, x: Tensor, border: list[int], scale: list[int] | None = None) -> Tensor:
    """Images without the border (left, top, right, bottom); with `scale`, that height and width from the corner."""
    left, top, right, bottom = border
    if scale is not None:
        return x[:, :, top : top + scale[0], left : left + scale[1]]
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]
