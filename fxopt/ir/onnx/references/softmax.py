"""Softmax, LogSoftmax and Hardmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def _over_axis(call: Call, x: Tensor, axis: int | None, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`function` along one axis (default the last); below opset 13 along all axes from `axis` (default 1) on."""
    if call.version >= 13:
        return function(x, -1 if axis is None else axis)
    axis = 1 if axis is None else axis % x.dim()
    if axis == x.dim():
        return function(x.unsqueeze(-1), -1).squeeze(-1)
    return function(x.flatten(axis), -1).reshape(x.shape)


@operators.reference("Softmax")
def softmax(call: Call, x: Tensor, axis: int | None = None) -> Tensor:
    """exp(x) / sum(exp(x))."""
    return _over_axis(call, x, axis, torch.softmax)


@operators.reference("LogSoftmax")
def log_softmax(call: Call, x: Tensor, axis: int | None = None) -> Tensor:
    """x - log(sum(exp(x)))."""
    return _over_axis(call, x, axis, torch.log_softmax)


@operators.reference("Hardmax")
def hardmax(call: Call, x: Tensor, axis: int | None = None) -> Tensor:
    """1 at the first maximum along the axis, else 0."""

    def one_hot(values: Tensor, dim: int) -> Tensor:
        index = values.argmax(dim, keepdim=True)
        return torch.zeros_like(values).scatter(dim, index, 1.0)

    return _over_axis(call, x, axis, one_hot)
